"""What a chat template would pass over without a word: keys, texts, turns of a conversation."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from cs336_alignment.data.messages import inside
from cs336_alignment.data.row import wrong
from cs336_alignment.errors import Place

# transformers fills each of these from the others before a template sees the message.
REASONING = ("reasoning_content", "thinking", "reasoning")
# `tool_calls` that are not written are refused; ids only tie a result to its call.
CHECKED_ELSEWHERE = frozenset({"role", "content", "tool_calls", "tool_call_id", "id", *REASONING})
# What other frameworks call `train` and `weight`.
FLAGS_ELSEWHERE = ("loss", "loss_mask", "mask", "training", "train_detail", "trainable")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
NOTHING: tuple[Any, ...] = (None, "", [], {})


class ChatLint:
    """Looks for what is lost or dangerous in messages that render without complaint.

    Args:
        tokenizer: with a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._template = COMMENT.sub("", str(tokenizer.chat_template))
        self._special = special_spelling(tokenizer)

    def check(
        self,
        messages: Sequence[Mapping[str, Any]],
        places: Sequence[Place],
        trained: Collection[int],
        reads: Callable[[int, str], bool],
    ) -> Iterator[tuple[str, Place]]:
        """Yield the names of linter checks that a conversation shows, and where.

        Args:
            messages: checked ones.
            places: of each.
            trained: the numbers of the trained ones.
            reads: whether the template writes the key of a message.

        Raises:
            UserError: a message has another framework's flag for what is trained (65).
        """
        for index, (message, place) in enumerate(zip(messages, places, strict=True)):
            for key in sorted(message.keys() - CHECKED_ELSEWHERE):
                is_flag = key in FLAGS_ELSEWHERE and message[key] is not None
                if is_flag and not re.search(rf"(\.|\[['\"]){key}\b", self._template):
                    raise wrong("D407", f"{key} says nothing here", inside(place, key),
                                hint="say what is trained with `train` (true or false) and "
                                "`weight`, or remove the key")  # fmt: skip
                if message[key] not in NOTHING and not reads(index, key):
                    yield "ignored_keys", inside(place, key)
            texts = list(said(message))
            if any(self._special.search(text) for text in texts):
                yield "special_text", place
            is_empty = not message.get("tool_calls") and not any(text.strip() for text in texts)
            if index in trained and is_empty:
                yield "empty_turn", place


def said(message: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of a message: its reasoning, then its content."""
    reasoning = next((message[key] for key in REASONING if message.get(key)), None)
    for text in (reasoning, message.get("content")):
        if isinstance(text, str):
            yield text


def special_spelling(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Give what finds the special tokens that a text spells."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
