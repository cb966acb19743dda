"""Evaluation rows as the conversations they are, for a server that takes messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from cs336_alignment.config import DataConfig
from cs336_alignment.data.chat_date import with_fixed_date
from cs336_alignment.data.messages import Message, clean_message
from cs336_alignment.data.splits import evaluation_examples
from cs336_alignment.errors import Place


@dataclass(frozen=True)
class Asked:
    """What is said before a response: messages, and tools if there are some."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None


def find_conversations(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[int]],
    *,
    seed: int,
) -> dict[tuple[int, ...], Asked]:
    """Read the rows of prompts again, as messages.

    Args:
        config: the data section.
        tokenizer: whose chat template rendered them.
        prompts: place of the row → tokens of the prompt.
        seed: of built-in data.

    Returns:
        Tokens of the prompt → what it renders; without the rows that are no conversations, and
        those whose messages, rendered anew, are other tokens.
    """
    found: dict[tuple[int, ...], Asked] = {}
    tokenizer = with_fixed_date(tokenizer)
    for example in evaluation_examples(config, seed=seed):
        prompt = prompts.get(str(example.place))
        if prompt is None or example.messages is None:
            continue
        place = Place(example.place.path, example.place.line)
        messages = [clean_message(message, place, "") for message in example.messages]
        for end in range(len(messages) - 1, 0, -1):
            if messages[end]["role"] != "assistant":
                continue
            asked = Asked(messages[:end], example.tools)
            if _render(asked, tokenizer) == list(prompt):
                found[tuple(prompt)] = asked
                break
    return found


def _render(asked: Asked, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    text = tokenizer.apply_chat_template(
        list(asked.messages),
        tools=list(asked.tools or ()) or None,
        add_generation_prompt=True,
        tokenize=False,
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
