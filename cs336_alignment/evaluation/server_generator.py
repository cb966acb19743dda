"""Generation by an OpenAI-compatible server: many requests at once, each response kept as it
comes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from transformers import PreTrainedTokenizerBase

from cs336_alignment.data.tokenize import decode, special_prefix
from cs336_alignment.evaluation.conversations import Asked
from cs336_alignment.evaluation.sampling import Generation, Request, Sampling
from cs336_alignment.evaluation.server_answers import (
    Answer,
    NoAnswer,
    read_answer,
    to_generation,
)
from cs336_alignment.evaluation.server_client import Refused, ServerClient, rubbish
from cs336_alignment.evaluation.server_dialect import Dialect, Prompt, refusal


class PromptForms:
    """Makes of a prompt's tokens the forms that a server may take.

    Args:
        tokenizer: that made them.
        conversations: by their prompt's tokens, where rows are conversations and are sent as such.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversations: Mapping[tuple[int, ...], Asked] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._conversations = conversations or {}
        self._prefix = special_prefix(tokenizer)

    def __call__(self, prompt_ids: Sequence[int]) -> Prompt:
        """Give a prompt in all forms."""
        length = len(self._prefix)
        # The server's tokenizer adds its prefix to a text by itself.
        own = length if list(prompt_ids[:length]) == self._prefix else 0
        text = decode(self._tokenizer, prompt_ids[own:])
        asked = self._conversations.get(tuple(prompt_ids))
        if asked is not None:
            return Prompt(prompt_ids, text, asked.messages, asked.tools)
        return Prompt(prompt_ids, text, ({"role": "user", "content": text},))


@dataclass
class ServerGenerator:
    """Generates by a server; see `Generator`.

    Args:
        client: of the server.
        dialect: how it is asked.
        tokenizer: of the model.
        forms: of prompts.
        eos: texts of the tokens that end a response.
        concurrency: requests at once.
        warn: takes a line of what is not as it should be, once.
    """

    client: ServerClient
    dialect: Dialect
    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    forms: PromptForms
    eos: Collection[str]
    concurrency: int
    warn: Callable[[str], None] = lambda _: None
    _counted: bool = field(default=False, init=False)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        advance: Callable[[int], None] = lambda _: None,
        on_done: Callable[[int, Generation], None] = lambda _, __: None,
    ) -> list[Generation]:
        """Generate one response for each request; see `Generator`.

        Raises:
            UserError: the server is gone, refuses, or answers with rubbish (74, 78); what it had
                answered before has gone to `on_done`.
        """
        waiting: SimpleQueue[int] = SimpleQueue()
        for number in range(len(requests)):
            waiting.put(number)
        answered: SimpleQueue[tuple[int, Generation | Exception]] = SimpleQueue()
        over = threading.Event()

        def work() -> None:
            while not over.is_set():
                try:
                    number = waiting.get_nowait()
                except Empty:
                    return
                try:
                    answered.put((number, self._answer(requests[number], sampling, over)))
                except Exception as failure:  # raised where people are told
                    answered.put((number, failure))
                    return

        found: dict[int, Generation] = {}

        def take(number: int, answer: Generation | Exception) -> None:
            if isinstance(answer, Exception):
                raise answer
            found[number] = answer
            on_done(number, answer)

        # Threads that end with the process: a slow server must not keep one that was told to stop.
        for _ in range(min(self.concurrency, len(requests))):
            threading.Thread(target=work, daemon=True).start()
        try:
            while len(found) < len(requests):
                take(*answered.get())
                advance(1)
        finally:
            over.set()
            while not answered.empty():
                number, answer = answered.get()
                if isinstance(answer, Generation):
                    take(number, answer)
        return [found[number] for number in range(len(requests))]

    def _answer(self, request: Request, sampling: Sampling, over: threading.Event) -> Generation:
        prompt = self.forms(request.prompt_ids)
        body = self.dialect.body(prompt, sampling, request.seed)
        answer: Any = None
        try:
            answer = self.client.insist(self.dialect.path, body, gave_up=over.wait)
            read = read_answer(answer, self.dialect.model)
            self._compare(prompt, read)
            return to_generation(read, sampling, self.tokenizer, self.eos)
        except Refused as refused:
            raise refusal(self.client, self.dialect, refused) from refused
        except NoAnswer as failure:
            raise rubbish(self.client.url, str(failure), answer) from failure

    def _compare(self, prompt: Prompt, answer: Answer) -> None:
        """Tell once if the server makes other tokens of a prompt than were meant."""
        count, meant = answer.num_prompt_tokens, len(prompt.ids)
        if self.dialect.as_ids or count in (None, meant) or self._counted:
            return
        self._counted = True
        what = "chat template or its tokenizer" if self.dialect.api == "chat" else "tokenizer"
        self.warn(
            f"the server's {what} makes {count:,} tokens of a prompt that has {meant:,} here: it "
            "is asked something else than model.name_or_path would be"
        )
