"""Errors meant for the person at the keyboard: a code, the place, what was expected, what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

MAX_SHOWN = 20
MAX_GOT_CHARS = 80


class ExitStatus(IntEnum):
    """Exit statuses of every command (the numbers are those of BSD's sysexits)."""

    DONE = 0
    USAGE = 2
    BAD_DATA = 65
    NOT_FOUND = 66
    INTERNAL = 70
    CANNOT_CREATE = 73
    IO = 74
    STOPPED = 75
    BAD_CONFIG = 78
    INTERRUPTED = 130


@dataclass(frozen=True)
class Place:
    """Where in the user's input something is: a file, its 1-based physical line, a field of the
    row.
    """

    path: str | Path
    line: int | None = None
    field: str | None = None

    def __str__(self) -> str:
        line = "" if self.line is None else f":{self.line}"
        field = "" if self.field is None else f', field "{self.field}"'
        return f"{self.path}{line}{field}"


class UserError(Exception):
    """One mistake that the user can mend; the command line prints it without a traceback.

    Args:
        code: stable identifier, a letter for the area (C config, D data, M model, R run, X other)
            and three digits.
        message: what is wrong, in one sentence without a full stop.
        status: the exit status of the command.
        place: where it is wrong, if it has a place.
        expected: what would have been right.
        got: what was found instead (shortened to 80 characters, so that no data leaks into logs).
        hint: what to type or change.

    Example:
        >>> place = Place("train.jsonl", 418, "response")
        >>> print(UserError("D203", "response is empty", ExitStatus.BAD_DATA, place=place,
        ...                 expected="non-empty string"))
        error[D203]: response is empty
          --> train.jsonl:418, field "response"
          expected: non-empty string
    """

    def __init__(
        self,
        code: str,
        message: str,
        status: ExitStatus,
        *,
        place: Place | None = None,
        expected: str | None = None,
        got: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status
        self.place = place
        self.expected = expected
        self.got = got
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders; Exception's own way gives `message` to __init__ alone.
        return _rebuild, (type(self), self.__dict__)

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.message}"]
        if self.place is not None:
            lines.append(f"  --> {self.place}")
        found = []
        if self.expected is not None:
            found.append(f"expected: {self.expected}")
        if self.got is not None:
            found.append(f"got: {self.got}")
        if found:
            lines.append("  " + "; ".join(found))
        if self.hint is not None:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)


def _rebuild(kind: type[UserError], state: dict[str, Any]) -> UserError:
    error = kind.__new__(kind, state["message"])
    error.__dict__.update(state)
    return error


class UserErrors(UserError):
    """Several mistakes found in one pass, shown together (the first 20, with the total).

    Args:
        errors: at least one error; the status is that of the first.
        total: how many there were, if more than `errors` holds.
    """

    def __init__(self, errors: Sequence[UserError], total: int | None = None) -> None:
        self.errors = list(errors)
        self.total = len(self.errors) if total is None else total
        first = self.errors[0]
        super().__init__(first.code, first.message, first.status, place=first.place)

    def __str__(self) -> str:
        shown = self.errors[:MAX_SHOWN]
        text = "\n".join(str(error) for error in shown)
        more = self.total - len(shown)
        if more > 0:
            text += f"\n... and {more} more; {self.total} errors in all"
        elif self.total > 1:
            text += f"\n{self.total} errors in all"
        return text


def first_line(failure: BaseException) -> str:
    """Give the first line that a failure says, or else its kind."""
    return (str(failure).strip() or type(failure).__name__).splitlines()[0]


@contextmanager
def needing(code: str, key: str, extra: str, instead: str) -> Iterator[None]:
    """Say in a block that imports an optional library what wants it, and how it is had."""
    try:
        yield
    except ImportError as failure:
        raise UserError(
            code, f"{key} needs {extra}", ExitStatus.BAD_CONFIG, got=str(failure),
            hint=f"pip install 'cs336_alignment[{extra}]', or {instead}",
        ) from failure  # fmt: skip


def first_few(names: Sequence[str], separator: str = ", ") -> str:
    """Join the first three names and count the rest."""
    more = f"{separator.rstrip(' ,')} and {len(names) - 3} more" if len(names) > 3 else ""
    return separator.join(names[:3]) + more


def describe(value: object) -> str:
    """Show a value with its type in at most about 80 characters, as the `got` of an error.

    Example:
        >>> describe("")
        '"" (str, length 0)'
        >>> describe(None)
        'null'
        >>> describe(3)
        '3 (int)'
    """
    if value is None:
        return "null"
    if isinstance(value, str):
        text = value if len(value) <= MAX_GOT_CHARS else value[:MAX_GOT_CHARS] + "…"
        shown = text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
        return f'"{shown}" (str, length {len(value)})'
    try:
        text = json.dumps(value, ensure_ascii=False)  # as it stands in the user's file
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    text = text if len(text) <= MAX_GOT_CHARS else text[:MAX_GOT_CHARS] + "…"
    return f"{text} ({type(value).__name__})"
