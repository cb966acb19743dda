"""The final answer of a response: where the response marks it, or its last number."""

from __future__ import annotations

import re

from cs336_alignment.data.final_answers import FINAL_MARK, last_boxed

OPENING, CLOSING = "<answer>", "</answer>"
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-−+])?[$€£]?(?:\d+(?:,\d{3})+|\d+|(?<!\d)\.(?=\d))(?:\.?\d+)?(?:[eE][-+]?\d+)?"
    r"(?:/\d+|:\d\d)?%?"
)


def in_answer_tags(response: str) -> str | None:
    """Give the stripped text of the last `<answer>…</answer>`; None if there is none, or the last
    `<answer>` is never closed.
    """
    start = response.rfind(OPENING)
    end = response.find(CLOSING, start)
    return None if start < 0 or end < 0 else response[start + len(OPENING) : end].strip()


def marked_answer(response: str) -> str | None:
    """Give the answer that a response marks.

    Args:
        response: what the model wrote.

    Returns:
        The first of these that the response has: the rest of the line after its last `####`, the
        text in its last answer tags, what its last `\\boxed{}` holds. None if it has none of them,
        or that one is empty or never closed.

    Example:
        >>> marked_answer("48 / 2 = 24\\n#### 24")
        '24'
    """
    if FINAL_MARK in response:
        found: str | None = response.rpartition(FINAL_MARK)[2].partition("\n")[0].strip()
    elif OPENING in response:
        found = in_answer_tags(response)
    else:
        found = last_boxed(response)
    return found or None


def last_number(text: str) -> str | None:
    """Give the last number of a text as it is spelled there.

    Example:
        >>> last_number("6 boxes at $1,200.50 each.")
        '$1,200.50'
    """
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None
