"""A row of a source: its fields, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cs336_alignment.errors import Place


@dataclass(frozen=True)
class Row:
    """One row as it was found."""

    fields: dict[str, Any]
    place: Place
