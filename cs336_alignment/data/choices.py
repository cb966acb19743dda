"""Multiple-choice rows: the lettered choices, which of them is right, and how they are asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from cs336_alignment.data.row import Row, is_number, wrong

LETTERS = "ABCDEFGHIJ"
FEWEST = 2
MMLU = tuple("ABCD")
# How data sets call the columns of single choices, before the letter.
_PREFIXES = ("", "choice_", "option_", "choice", "option", "choice ", "option ")
_SPLIT = re.compile(r"[_.-](?:test|val|valid|validation|dev|train|eval)$")


def lettered_columns(present: Sequence[str]) -> tuple[str, ...]:
    """Find the columns that hold one choice each: A, B, C … or choice_a, option_b and the like.

    Args:
        present: the columns of a row.

    Returns:
        Those columns in the order of their letters, from A on without a gap; empty unless there
        are A and B.
    """
    for prefix in _PREFIXES:
        for letters in (LETTERS, LETTERS.lower()):
            by_name = {name.lower() if prefix else name: name for name in present}
            names = (f"{prefix}{letter.lower() if prefix else letter}" for letter in letters)
            found = tuple(by_name[name] for name in takewhile(by_name.__contains__, names))
            if len(found) >= FEWEST:
                return found
    return ()


def read_choices(row: Row, column: str, values: Any) -> list[Any]:
    """Check the choices of a row.

    Args:
        row: as read.
        column: of the choices, or of the first one.
        values: what stands there; empty ones at the end are no choices.

    Returns:
        Texts, stripped, and numbers.

    Raises:
        UserError: they are neither, one is empty, or there are fewer than two or more than ten
            (65).
    """
    listed = values if isinstance(values, list) else []
    choices = [v.strip() if isinstance(v, str) else v for v in listed]
    while choices and choices[-1] in (None, ""):
        choices.pop()
    sound = all((isinstance(choice, str) and choice) or is_number(choice) for choice in choices)
    if not sound or not FEWEST <= len(choices) <= len(LETTERS):
        expected = f"{FEWEST} to {len(LETTERS)} texts, none empty"
        raise wrong("D218", "the choices are no list of texts", row.at(column), expected, values)
    return choices


def read_letter(row: Row, column: str, choices: Sequence[Any]) -> str:
    """Read which choice is right: its letter, its number from 0, or its text.

    Args:
        row: as read.
        column: of the answer.
        choices: of the row.

    Raises:
        UserError: it names no choice, or can be read as two different ones (65).
    """
    value = row.fields[column]
    readings = _readings(value, choices)
    if len(set(readings.values())) == 1:
        return LETTERS[next(iter(readings.values()))]
    message, hint = f"{column} names none of the {len(choices)} choices", None
    if readings:
        ways = " and ".join(f"{LETTERS[i]} by its {way}" for way, i in readings.items())
        message, hint = f"{column} can be read as {ways}", "give the letters of the right choices"
    expected = f"a letter of A to {LETTERS[len(choices) - 1]}, a number of 0 to "
    expected += f"{len(choices) - 1}, or the text of one choice"
    raise wrong("D216", message, row.at(column), expected, value, hint=hint)


def _readings(value: Any, choices: Sequence[Any]) -> dict[str, int]:
    """Give every choice that a value may mean, by the way of reading it."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of floats is what nulls make of integers
    if isinstance(value, bool) or not isinstance(value, int | str):
        return {}
    text = str(value).strip()
    found = {}
    letter = re.fullmatch(r"\(?([A-Ja-j])\)?\.?", text)
    if letter and LETTERS.index(letter[1].upper()) < len(choices):
        found["letter"] = LETTERS.index(letter[1].upper())
    if text.isascii() and text.isdigit() and int(text[:9]) < len(choices):
        found["number"] = int(text[:9])
    # A number and a text are never the same: 2 beside the choices "1" and "2" is a number from 0.
    sought = text if isinstance(value, str) else value
    same = [number for number, choice in enumerate(choices) if choice == sought]
    if len(same) == 1:
        found["text"] = same[0]
    return found


def ask(question: str, choices: Sequence[Any]) -> str:
    """Write a question with its lettered choices, a line each.

    Example:
        >>> print(ask("2 + 2 = ?", ["3", "4"]))
        2 + 2 = ?
        A. 3
        B. 4
    """
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False)]
    return "\n".join([question.rstrip(), *lines])


def columns_without_header(first: Sequence[str], second: Sequence[str] = ()) -> list[str] | None:
    """Tell a table that begins with MMLU's row (question, four choices, letter) from one with a
    header.

    Only with four choices: with another number, what comes first might be a subject or an index.

    Args:
        first: the cells of the first row.
        second: those of the second, empty if there is none.

    Returns:
        The names that the columns lack; None if the first row may be a header.
    """
    names = ["question", *MMLU, "answer"]
    shaped = all(
        len(row) == len(names) and row[-1].strip() in MMLU for row in (first, second or first)
    )
    asks = len(first[0].split()) > 1 and any(map(str.isalpha, first[0])) if first else False
    named = bool(lettered_columns(first)) or "question" in (cell.strip().lower() for cell in first)
    return names if shaped and asks and not named else None


def subject_of(path: Path) -> str:
    """Give the subject that a file's name says.

    Example:
        >>> subject_of(Path("mmlu/abstract_algebra_test.csv"))
        'abstract_algebra'
    """
    return _SPLIT.sub("", path.name.split(".", 1)[0])
