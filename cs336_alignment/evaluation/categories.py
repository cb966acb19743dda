"""Columns of the evaluation data that sort its rows: subject, level, source."""

from __future__ import annotations

from cs336_alignment.data.row import Row
from cs336_alignment.data.sources import open_source
from cs336_alignment.data.splits import PreparedData

COLUMNS = ("category", "subject", "type", "topic", "task", "source", "level", "difficulty")
MOST_VALUES = 100  # of a column that sorts rows; one with more tells them apart


def find_categories(data: PreparedData, *, seed: int) -> dict[str, dict[int, str]]:
    """Read the columns that sort the rows.

    Args:
        data: evaluation data.
        seed: of the built-in task.

    Returns:
        Column → number of the example → its value there; empty if there is no such column.
    """
    numbers: dict[str, list[int]] = {}
    for number, place in enumerate(data.places):
        numbers.setdefault(place, []).append(number)
    found: dict[str, dict[int, str]] = {column: {} for column in COLUMNS}
    for source in data.sources:
        for row in open_source(source.ledger.source, seed=seed, default_split="test").rows():
            if not isinstance(row, Row):
                continue
            for column in COLUMNS:
                value = row.fields.get(column)
                if isinstance(value, str | int) and str(value).strip():
                    for number in numbers.get(str(row.place), ()):
                        found[column][number] = str(value).strip()
    return {
        column: values
        for column, values in found.items()
        if 1 < len(set(values.values())) <= MOST_VALUES
    }
