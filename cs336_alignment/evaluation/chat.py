"""A conversation with a model: the prompt of each turn as it was trained, and the reply token by
token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.data.chat_date import with_fixed_date
from cs336_alignment.data.chat_probe import TEMPLATE_ERRORS
from cs336_alignment.data.templates import PromptTemplate
from cs336_alignment.data.tokenize import decode, tokenize_plain, tokenize_prompts
from cs336_alignment.errors import UserError
from cs336_alignment.evaluation.generate import draw
from cs336_alignment.evaluation.sampling import UNFINISHED, Sampling, end_of_stop
from cs336_alignment.model.loading import eos_ids
from cs336_alignment.model.padded_decoder import PaddedDecoder

Message = dict[str, str]


class Conversation:
    """What was said so far, and the prompt that it makes with the next question.

    With the tokenizer's chat template all turns are one conversation. With a prompt template of
    ours each question is a prompt of its own, as in training.

    Args:
        tokenizer: of the model; with a chat template if `template` is None.
        template: that questions fill; None: the chat template.
        add_special_tokens: whether a filled template gets the tokenizer's special prefix.

    Attributes:
        turns: questions with their replies.
        system: the system message, if there is one.

    Raises:
        UserError: there is neither template (78).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate | None,
        *,
        add_special_tokens: bool = True,
    ) -> None:
        if template is None and not tokenizer.chat_template:
            raise UserError(
                "D403",
                "the tokenizer has no chat template",
                hint="data.prompt_template=r1_zero, question_only or alpaca asks without one",
            )
        self.tokenizer: Any = with_fixed_date(tokenizer) if template is None else tokenizer
        self.template = template
        self.add_special_tokens = add_special_tokens
        self.turns: list[tuple[str, str]] = []
        self.system: str | None = None

    def messages(self, question: str | None = None) -> list[Message]:
        """Give all turns as messages, and a question that has no reply yet."""
        said = [] if self.system is None else [{"role": "system", "content": self.system}]
        for asked, reply in self.turns:
            said += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
        return said if question is None else [*said, {"role": "user", "content": question}]

    def prompt_ids(self, question: str) -> list[int]:
        """Tokenize the prompt that a question makes.

        Raises:
            UserError: the chat template refuses the conversation (65).
        """
        if self.template is not None:
            prompt = self.template.fill(question)
            return tokenize_prompts([prompt], self.tokenizer, self.add_special_tokens)[0]
        return tokenize_plain([self._render(self.messages(question))], self.tokenizer)[0]

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TEMPLATE_ERRORS as error:
            raise UserError(
                "D402", f"the chat template refuses the conversation: {error}"
            ) from error
        return text

    def reads_system(self, text: str) -> bool:
        """Whether a system message changes the prompt.

        Raises:
            UserError: the chat template refuses it (65).
        """
        asked = {"role": "user", "content": "?"}
        return self.template is None and (
            self._render([{"role": "system", "content": text}, asked]) != self._render([asked])
        )

    def rows(self) -> list[dict[str, list[Message]]]:
        """Give what was said as rows that `data.train_path` takes: one conversation, or one for
        each question where each was a prompt of its own. A turn without a reply is left out, since
        nothing of it could be trained.
        """
        answered = [turn for turn in self.turns if turn[1].strip()]
        groups = [[turn] for turn in answered] if self.template is not None else [answered]
        rows = []
        for group in groups:
            part = Conversation(self.tokenizer, self.template)
            part.turns, part.system = group, self.system
            if group:
                rows.append({"messages": part.messages()})
        return rows


@dataclass(frozen=True)
class Reply:
    """A response as it was streamed: its exact text, and why it ended."""

    text: str
    stopped: Literal["eos", "stop", "length", "interrupted"]


def context_of(model: PreTrainedModel) -> int | None:
    """Give the number of positions that a model has; None: no limit is known."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if positions is None else int(positions)


@torch.no_grad()
def stream_reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    sampling: Sampling,
    *,
    seed: int,
    show: Callable[[str], None],
    interrupted: Callable[[], bool] = lambda: False,
    autocast_dtype: torch.dtype | None = None,
) -> Reply:
    """Generate one response and show it as it comes; its text is that of `LocalGenerator`.

    Args:
        model: in eval mode.
        tokenizer: of the model.
        prompt_ids: not empty, and shorter than the model's context.
        sampling: how tokens are chosen and what ends a response.
        seed: of the choice.
        show: gets the text piece by piece, whole characters only.
        interrupted: asked before each token whether to end here.
        autocast_dtype: compute dtype; None: the weights' own.
    """
    ends, context = eos_ids(model.generation_config, tokenizer), context_of(model)
    limit = sampling.max_new_tokens
    if context is not None:
        limit = min(limit, context - len(prompt_ids))
    draws = torch.rand(limit, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    decoder = PaddedDecoder(model, slots=1, autocast_dtype=autocast_dtype)
    tokens: list[int] = []
    text = shown = ""
    stopped: Literal["eos", "stop", "length", "interrupted"] = "length"
    logits = decoder.admit([prompt_ids])  # (1, V)
    while len(tokens) < limit:
        if interrupted():
            stopped = "interrupted"
            break
        early = len(tokens) < sampling.min_new_tokens
        if early and ends:
            logits[:, sorted(ends)] = float("-inf")
        if sampling.temperature == 0:
            token = logits.argmax(-1).cpu()
        else:
            place = draws[len(tokens), None].to(logits.device)
            token = draw(logits, place, sampling.temperature, sampling.top_p).cpu()
        if int(token) in ends:
            stopped = "eos"
            break
        tokens.append(int(token))
        earlier, text = text, decode(tokenizer, tokens)
        end = end_of_stop(text, earlier, sampling.stop)
        if len(tokens) >= sampling.min_new_tokens and end is not None:
            text, stopped = text[:end], "stop"
            break
        if not text.endswith(UNFINISHED) and text.startswith(shown):
            show(text[len(shown) :])
            shown = text
        if len(tokens) < limit:
            logits = decoder.step(token)
    show(text[len(shown) :] if text.startswith(shown) else text)
    return Reply(text, stopped)
