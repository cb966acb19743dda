"""A row of a source: its fields and what stands in them, its place, and the error of a bad one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from cs336_alignment.errors import Place, UserError, describe


@dataclass(frozen=True)
class Row:
    """One row as it was found."""

    fields: dict[str, Any]
    place: Place

    def at(self, column: str) -> Place:
        """Name one of its fields."""
        return Place(self.place.path, self.place.line, column)


def parsed(value: Any) -> Any:
    """Read a list or object that stands as JSON in a cell of text; all else stays as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def is_number(value: Any) -> bool:
    """Tell whether a value is a number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def wrong(
    code: str,
    message: str,
    place: Place,
    expected: str | None = None,
    got: Any = ...,
    *,
    hint: str | None = None,
    found: str | None = None,
) -> UserError:
    """Make the error of a bad row; `got` is described, `found` shown as it stands."""
    shown = found if got is ... else describe(got)
    return UserError(code, message, place=place, expected=expected, got=shown, hint=hint)
