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


# An error's exit status follows from its code: the area's, unless the code is named below.
OF_AREA = {
    "C": ExitStatus.BAD_CONFIG, "D": ExitStatus.BAD_DATA, "L": ExitStatus.BAD_DATA,
    "M": ExitStatus.BAD_CONFIG, "R": ExitStatus.INTERNAL,
}  # fmt: skip
OF_CODE = {
    ExitStatus.USAGE: "C001 C002 C003 C144 C152 C153 C154 C174",
    ExitStatus.BAD_DATA: "R310 R382",
    ExitStatus.NOT_FOUND: "D101 D102 D104 D105 D109 D110 D112 M101 M102 M103 M107 M109 M122 "
    "R202 R331 R332 R333 R361",
    ExitStatus.INTERNAL: "D311",
    ExitStatus.CANNOT_CREATE: "D310 R101 R102 R103 R104 R105 R106 R107 R360",
    ExitStatus.IO: "R201 R203 R204 R205 R206 R207 R209 R210 R211 R306 R341 R342 R344 R371",
    ExitStatus.BAD_CONFIG: "D403 D408 D409 D410 R304 R308 R312 R313 R343 R345 R347",
}
STATUS_OF = {code: status for status, codes in OF_CODE.items() for code in codes.split()}


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
        code: stable identifier, a letter for the area (C config, D data, L linter, M model, R run)
            and three digits. The exit status of the command follows from it.
        message: what is wrong, in one sentence without a full stop.
        place: where it is wrong, if it has a place.
        expected: what would have been right.
        got: what was found instead (shortened to 80 characters, so that no data leaks into logs).
        hint: what to type or change.
        status: the exit status, where an error stands for one that another process met.

    Example:
        >>> place = Place("train.jsonl", 418, "response")
        >>> print(UserError("D203", "response is empty", place=place, expected="non-empty string"))
        error[D203]: response is empty
          --> train.jsonl:418, field "response"
          expected: non-empty string
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        place: Place | None = None,
        expected: str | None = None,
        got: str | None = None,
        hint: str | None = None,
        status: ExitStatus | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status or STATUS_OF.get(code, OF_AREA[code[0]])
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
        super().__init__(first.code, first.message, place=first.place, status=first.status)

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
            code, f"{key} needs {extra}", got=str(failure),
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
