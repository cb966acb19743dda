"""The date in chat templates: the same one on every day, or no run could be continued tomorrow."""

from __future__ import annotations

import copy
import re
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from cs336_alignment.errors import UserError

ASKS_DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")  # Llama 3.2's, gpt-oss's
ASKS_DATE_SOMEHOW = re.compile(r"strftime_now\s*\(")
FIXED_DATE = datetime(2024, 7, 26)  # what Llama 3's templates write where they know no date


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the chat template asks for the date; it gets the same one on every day, or no
    run could be continued tomorrow.
    """
    return "strftime_now" in str(tokenizer.chat_template)


def with_fixed_date(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give the tokenizer a chat template that writes the same date every day.

    Raises:
        UserError: it asks for the date in a way that cannot be answered so (78).
    """
    if not writes_date(tokenizer):
        return tokenizer
    template: Any = tokenizer.chat_template

    def fix(text: str) -> str:
        return ASKS_DATE.sub(lambda asks: repr(FIXED_DATE.strftime(asks[2])), text)

    # Several templates may have names: `default`, `tool_use`.
    named = isinstance(template, dict)
    fixed = {name: fix(text) for name, text in template.items()} if named else fix(template)
    if ASKS_DATE_SOMEHOW.search(str(fixed)):
        raise UserError(
            "D409",
            "the chat template asks for the date in a way that cannot be given a fixed one",
            hint="write the date itself into its chat_template.jinja",
        )
    pinned = copy.copy(tokenizer)
    pinned.chat_template = fixed
    return pinned
