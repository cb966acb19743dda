"""Conversations to text, by the tokenizer's chat template, and what of the text is trained."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from cs336_alignment.data.chat_date import with_fixed_date
from cs336_alignment.data.chat_lint import ChatLint, said
from cs336_alignment.data.chat_probe import TEMPLATE_ERRORS, probe_template
from cs336_alignment.data.messages import (
    Message,
    clean_message,
    inside,
    other_calls,
    spell_arguments,
    weight_of,
)
from cs336_alignment.data.row import wrong
from cs336_alignment.data.spans import Rendered, Span, count_changed
from cs336_alignment.errors import Place, UserError

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
EXCERPT = 40
# Templates come from strangers. Real ones have up to 20,000 characters and add little to a text.
MOST_TEMPLATE = 2**20  # characters
MOST_RENDERED = 2**27


class _Chat(NamedTuple):
    """One conversation as the template gets it, and what it renders."""

    messages: list[Message]
    tools: list[Any] | None
    place: Place
    text: str = ""


class _Mismatch(NamedTuple):
    """A beginning of a conversation that the whole rendering does not begin with."""

    which: str
    text: str


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template and finds what is trained.

    An assistant turn is trained from where generation would begin, after the template's generation
    prompt, up to and including the special token that ends it. The template's `{% generation %}`
    tags say where that is, if each marks one turn. Without them it is found by rendering beginnings
    of the conversation, each of which must begin the whole rendering too; where one does not, the
    conversation is refused. What the template writes before every turn is never trained, even where
    its generation prompt leaves it out.

    Args:
        tokenizer: with a chat template.
        train_on: `response` or `assistant` (every assistant turn), `last_turn` (the last one
            alone), `all` (every token).

    Raises:
        UserError: the tokenizer has no chat template (78).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: str) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "D403",
                "the tokenizer has no chat template",
                hint="use the instruct model's tokenizer, put a chat_template.jinja into its "
                "folder, or choose a data.prompt_template other than chat",
            )
        if len(str(tokenizer.chat_template)) > MOST_TEMPLATE:
            raise UserError(
                "D409",
                "the tokenizer's chat template is too large to be one",
                expected=f"at most {MOST_TEMPLATE:,} characters",
                got=f"{len(str(tokenizer.chat_template)):,}",
                hint="look at its chat_template.jinja",
            )
        tokenizer = with_fixed_date(tokenizer)
        self.tokenizer: Any = tokenizer  # transformers' own types leave out half of what it takes
        self.train_on = train_on
        if getattr(tokenizer, "split_special_tokens", False):
            raise UserError(
                "D410",
                "split_special_tokens would cut the chat template's own tokens into pieces",
                hint="load the tokenizer without it (tokenizer_config.json)",
            )
        self._habits = probe_template(tokenizer)
        self._seen_tools: set[str] = set()
        self._read_keys: dict[tuple[str, str], bool] = {}
        self._lint = ChatLint(tokenizer)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, place: Place
    ) -> Rendered:
        """Render a conversation.

        Tool-call `arguments` given as a JSON object in a string are parsed, since a template that
        writes JSON would escape the string; a template that fails on the object, or writes it as
        Python does, gets a string.

        Args:
            messages: dicts of `role`, `content`, and what else the template reads; an assistant's
                may hold `train` (bool) and `weight` (at least 0), which the template does not get.
            tools: JSON schemas, if there are any.
            place: of the row, for errors.

        Returns:
            The text and its spans; no spans if no assistant turn is trained.

        Raises:
            UserError: a message is malformed, or the template refuses the conversation, ignores its
                tools, or does not let its turns be found (65).
        """
        if not messages:
            raise wrong("D405", "the conversation is empty", place, "at least one message")
        flags = self.train_on != "all"
        places = [inside(place, index) for index in range(len(messages))]
        pairs = list(zip(messages, places, strict=True))
        clean = [clean_message(message, where, self._habits.joiner) for message, where in pairs]
        weights = [weight_of(message, where, flags) for message, where in pairs]
        chat = self._whole(clean, list(tools) if tools else None, place)
        changed = count_changed([text for message in clean for text in said(message)], chat.text)
        turns = [i for i, message in enumerate(clean) if message["role"] == "assistant"]
        last = turns[-1:] if self.train_on == "last_turn" else turns
        trained = [i for i in last if weights[i] > 0]
        findings = tuple(self._lint.check(clean, places, trained, partial(self._reads, chat)))
        if self.train_on == "all":
            whole = (Span(0, len(chat.text)),) if chat.text else ()
            return Rendered(chat.text, whole, changed, findings)
        spans = tuple(
            Span(start, end, weights[i])
            for i, (start, end) in zip(trained, self._find(chat, trained, turns), strict=True)
            if start < end
        )
        return Rendered(chat.text, spans, changed, findings)

    def _whole(self, messages: list[Message], tools: list[Any] | None, place: Place) -> _Chat:
        """Render all of a conversation, its tool arguments spelled as the template wants them."""
        has_calls = any(message.get("tool_calls") for message in messages)
        chat = _Chat(
            spell_arguments(messages, as_text=False) if has_calls else messages, tools, place
        )
        refusal: UserError | None = None
        try:
            chat = chat._replace(text=self._text(chat))
        except UserError as error:
            refusal = error
        if has_calls and (refusal or _shows_python(chat)):
            other = _Chat(spell_arguments(messages, as_text=True), tools, place)
            with contextlib.suppress(UserError):  # the first refusal, or the first text, stands
                chat, refusal = other._replace(text=self._text(other)), None
        if refusal:
            raise refusal
        for index, message in enumerate(chat.messages if has_calls else ()):
            for number, part, other_call in other_calls(message):
                calls = [*message["tool_calls"]]
                calls[number] = other_call
                changed = [*chat.messages]
                changed[index] = message | {"tool_calls": calls}
                if self._same_text(chat, chat._replace(messages=changed)):
                    hint = "remove it from the data, or use a template that writes it"
                    what = f"the {part} of tool call {number} of message {index}"
                    raise wrong("D404", f"the chat template ignores {what}", place, hint=hint)
        self._check_tools(chat)
        return chat

    def _check_tools(self, chat: _Chat) -> None:
        """Refuse a template that leaves a tool out; each list of tools is looked at once."""
        tools = chat.tools or []
        key = json.dumps(tools, sort_keys=True, default=str)
        if not tools or key in self._seen_tools:
            return
        self._seen_tools.add(key)
        for index in range(len(tools)):
            fewer = tools[:index] + tools[index + 1 :]
            if self._same_text(chat, chat._replace(tools=fewer or None)):
                hint = "remove it from the data, or use a template that writes it"
                raise wrong("D404", f"the chat template ignores tool {index}", chat.place,
                            hint=hint)  # fmt: skip

    def _same_text(self, chat: _Chat, other: _Chat) -> bool:
        """Whether another conversation renders to the same text; not if the template refuses it."""
        with contextlib.suppress(UserError):
            return self._text(other) == chat.text
        return False

    def _reads(self, chat: _Chat, index: int, key: str) -> bool:
        """Whether the template writes another text without a key of a message; asked once for each
        key of each role.
        """
        message = chat.messages[index]
        kind = (message["role"], key)
        if kind not in self._read_keys:
            fewer = [*chat.messages]
            fewer[index] = {name: value for name, value in message.items() if name != key}
            same = self._same_text(chat, chat._replace(messages=fewer))
            self._read_keys[kind] = not same
        return self._read_keys[kind]

    def _text(self, chat: _Chat, count: int | None = None, *, prompt: bool = False) -> str:
        """Render the first messages, and the generation prompt if asked for."""
        try:
            text = self.tokenizer.apply_chat_template(
                chat.messages[:count],
                tools=chat.tools,
                tokenize=False,
                add_generation_prompt=prompt,
            )
            assert isinstance(text, str)
            if len(text) > MOST_RENDERED:
                raise wrong("D411", "the chat template makes too long a text of it", chat.place,
                            found=f"{len(text):,} characters")  # fmt: skip
            text.encode()
        except UnicodeEncodeError as error:
            raise wrong("D405", "the text holds half of a surrogate pair", chat.place,
                         got=error.object[error.start]) from error  # fmt: skip
        except TEMPLATE_ERRORS as error:
            first = "" if count is None else f" up to message {count - 1}"
            raise wrong("D402", f"the chat template refuses the conversation{first}: {error}",
                         chat.place) from error  # fmt: skip
        return text

    def _find(self, chat: _Chat, trained: list[int], turns: list[int]) -> list[tuple[int, int]]:
        """Find the borders of the trained turns."""
        tagged = self._tagged(chat, turns) if trained else None
        found, header = [], self._habits.header
        for index in trained:
            borders = self._borders(chat, index) if tagged is None else tagged[index]
            if isinstance(borders, _Mismatch):
                raise self._unstable(chat, borders, turns[-1])
            start, end = borders
            # What is written before every turn is left out, should a generation prompt not have it.
            if header.strip() and chat.text.startswith(header, start, end):
                start += len(header)
            found.append((start, end))
        return found

    def _borders(self, chat: _Chat, index: int) -> tuple[int, int] | _Mismatch:
        """Find where generation of a turn would begin and where it would stop."""
        opening = self._opening(chat, index)
        if opening is None or not chat.text.startswith(opening):
            return _Mismatch(f"before message {index}, with its generation prompt,", opening or "")
        start, message = len(opening), chat.messages[index]
        content = message["content"]
        is_plain = self._habits.keeps_turns and not any(
            message.get(key) for key in message.keys() - {"role", "content"}
        )
        stop = self._habits.end.stop
        if is_plain and stop and chat.text.startswith(content + stop, start):
            return start, start + len(content) + len(stop)  # no need to render it again
        is_last = index + 1 == len(chat.messages)
        closing = chat.text if is_last else self._text(chat, index + 1)
        if not closing.startswith(opening):
            return _Mismatch(f"up to message {index}", closing)
        end = start + self._habits.end.find(closing[start:], content or "")
        closing = closing[:end]
        if not chat.text.startswith(closing):
            return _Mismatch(f"up to message {index}", closing)
        eos = self.tokenizer.eos_token  # some templates leave it out after the last turn alone
        if eos and not stop and chat.text.startswith(eos, end):
            end += len(eos)
        return start, end

    def _opening(self, chat: _Chat, index: int) -> str | None:
        """Render what a turn is generated from; None if that cannot be told."""
        if index:
            return self._text(chat, index, prompt=True)
        # No template renders an empty conversation: the generation prompt is what it adds to this.
        text = self._text(chat, 1)
        prompt = self._text(chat, 1, prompt=True).removeprefix(text)
        at = text.find(prompt)
        return text[: at + len(prompt)] if prompt and at >= 0 else None

    def _tagged(self, chat: _Chat, turns: list[int]) -> dict[int, tuple[int, int]] | None:
        """Find every turn by the template's `{% generation %}` tags; None if they do not say."""
        template = self.tokenizer.get_chat_template(tools=chat.tools)
        if not GENERATION_TAG.search(template):
            return None
        render: Any = render_jinja_template
        texts, marked = render(
            [[{k: v for k, v in m.items() if v is not None} for m in chat.messages]],
            tools=chat.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        # Tags around something else than one whole turn each cannot be told from wrong ones.
        if texts[0] != chat.text or len(marked[0]) != len(turns):
            return None
        found = {}
        for index, (start, end) in zip(turns, marked[0], strict=True):
            content = (chat.messages[index]["content"] or "").strip()
            if content not in chat.text[start:end]:
                return None
            found[index] = (start, self._habits.end.extend(chat.text, start, end))
        return found

    def _unstable(self, chat: _Chat, mismatch: _Mismatch, last: int) -> UserError:
        """Say where the whole conversation does not begin with what a part of it renders."""
        which, text = mismatch
        pairs = enumerate(zip(text, chat.text, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(chat.text)))
        hint = "put {% generation %} tags around what the assistant says in the chat template"
        if GENERATION_TAG.search(self.tokenizer.get_chat_template(tools=chat.tools)):
            hint = "let its {% generation %} tags mark each of the assistant's messages once"
        if not isinstance(self._borders(chat, last), _Mismatch):
            hint = f"set data.train_on=last_turn, since that turn can be found, or {hint}"
        return wrong(
            "D401",
            f"the chat template writes the messages {which} differently alone and in the whole "
            "conversation, so the trained turn cannot be found",
            chat.place,
            f'"{_excerpt(text, at)}"',
            hint=hint,
            found=f'"{_excerpt(chat.text, at)}" from character {at} of the whole',
        )


def _shows_python(chat: _Chat) -> bool:
    """Whether the template wrote the arguments of a tool call as Python shows a dict."""
    calls = (call for message in chat.messages for call in message.get("tool_calls") or ())
    functions = (call.get("function", call) for call in calls)
    arguments = (function.get("arguments") for function in functions)
    shown = {str(dict(each)) for each in arguments if isinstance(each, Mapping) and each}
    texts = [text for message in chat.messages for text in said(message)]
    return any(  # a message may hold the same words
        chat.text.count(each) > sum(text.count(each) for text in texts) for each in shown
    )


def _excerpt(text: str, at: int) -> str:
    """Give at most 40 characters around a place, on one line."""
    start = max(0, at - EXCERPT // 4)
    return text[start : start + EXCERPT].replace("\n", "\\n")[:EXCERPT]
