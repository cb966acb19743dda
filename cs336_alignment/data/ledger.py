"""The data ledger: what became of every row of a source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cs336_alignment.data.tokenize import TokenRow

PERCENTILES = (5, 25, 50, 75, 95, 99)
HISTOGRAM_BINS = 24
MOST_LATE_COLUMNS = 20
PLACES_SHOWN = 5
BARS = "▁▂▃▄▅▆▇█"


@dataclass
class LedgerEntry:
    """Counts of one source; tokens are those of the kept examples.

    Attributes:
        source: its path.
        format: as detected, with columns and reason.
        rows_read: rows found, readable or not.
        bad_rows: of these, rows that could not be made into an example.
        kept: examples; with `split` a row can become several.
        truncated: rows cut at the end.
        split: rows cut into pieces.
        pieces: what they were cut into.
        dropped: reason → rows.
        filtered: reason → examples that `data.filter` left out.
        bad_places: the first bad rows that were dropped, with the code of what is wrong.
        late_columns: columns that the first row does not have, and whether they are read → rows.
        tokens: of all examples.
        response_tokens: of these, trained ones.
        longest: tokens of the longest example.
        ends_with_stop: examples whose last trained token ends a response.
        largest_token_id: in any example.
        lengths: percentiles of the examples' lengths, and a histogram.
    """

    source: str = ""
    format: str = ""
    rows_read: int = 0
    bad_rows: int = 0
    kept: int = 0
    truncated: int = 0
    split: int = 0
    pieces: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    bad_places: list[str] = field(default_factory=list)
    late_columns: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    response_tokens: int = 0
    longest: int = 0
    ends_with_stop: int = 0
    largest_token_id: int = 0
    lengths: dict[str, Any] = field(default_factory=dict)

    def drop(self, reason: str, count: int = 1) -> None:
        """Count rows that are not trained on."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count

    def come_late(self, column: str, count: int = 1) -> None:
        """Count rows with a column that the first row does not have; of many, some."""
        if column in self.late_columns or len(self.late_columns) < MOST_LATE_COLUMNS:
            self.late_columns[column] = self.late_columns.get(column, 0) + count

    def keep(self, row: TokenRow, *, stops: frozenset[int]) -> None:
        """Count an example."""
        ids = row.input_ids
        self.kept += 1
        self.tokens += len(ids)
        self.response_tokens += int((row.spans[:, 1] - row.spans[:, 0]).sum())
        self.longest = max(self.longest, len(ids))
        self.ends_with_stop += int(ids[row.spans[-1, 1] - 1]) in stops
        self.largest_token_id = max(self.largest_token_id, int(ids.max()))

    def merge(self, other: LedgerEntry) -> None:
        """Add the counts of another part of the same source."""
        for name in ("rows_read", "bad_rows", "kept", "truncated", "split", "pieces", "tokens",
                     "response_tokens", "ends_with_stop"):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("longest", "largest_token_id"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))
        for reason, count in other.dropped.items():
            self.drop(reason, count)
        for reason, count in other.filtered.items():
            self.filtered[reason] = self.filtered.get(reason, 0) + count
        for column, count in other.late_columns.items():
            self.come_late(column, count)

    def measure(self, lengths: NDArray[np.integer]) -> None:
        """Take the lengths' percentiles and histogram.

        Args:
            lengths: (examples,) tokens of each.
        """
        counts, edges = np.histogram(lengths, bins=HISTOGRAM_BINS)
        values = np.percentile(lengths, PERCENTILES)
        self.lengths = {
            "percentiles": {str(p): int(v) for p, v in zip(PERCENTILES, values, strict=True)},
            "histogram": {"edges": edges.round(1).tolist(), "counts": counts.tolist()},
        }

    @property
    def prompt_share(self) -> float:
        """The share of tokens that are only read."""
        return 1 - self.response_tokens / self.tokens if self.tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Give everything for `data_ledger.json`."""
        return {**asdict(self), "prompt_share": round(self.prompt_share, 4)}

    def rows(self) -> Iterable[tuple[str, str]]:
        """Yield the lines of the table that people see."""
        yield "rows read", f"{self.rows_read:,}"
        for reason, count in self.dropped.items():
            yield f"dropped: {reason.replace('_', ' ')}", f"{count:,}"
        for reason, count in self.filtered.items():
            yield f"filtered: {reason}", f"{count:,}"
        if self.bad_places:
            more = ", …" if self.bad_rows > PLACES_SHOWN else ""
            yield "bad rows", ", ".join(self.bad_places[:PLACES_SHOWN]) + more
        for column, count in self.late_columns.items():
            yield f"later column {column}", f"{count:,}"
        if self.truncated:
            yield "truncated", f"{self.truncated:,}"
        if self.split:
            yield "split", f"{self.split:,} into {self.pieces:,}"
        yield "examples", f"{self.kept:,}"
        yield "tokens", f"{self.tokens:,}"
        yield "trained tokens", f"{self.response_tokens:,} ({1 - self.prompt_share:.1%})"
        yield "end with a stop token", f"{self.ends_with_stop / max(1, self.kept):.1%}"
        if percentiles := self.lengths.get("percentiles"):
            yield "length, median", f"{percentiles['50']:,}"
            yield "length, 95 %", f"{percentiles['95']:,}"
        yield "length, longest", f"{self.longest:,}"
        if histogram := self.lengths.get("histogram"):
            low, high = histogram["edges"][0], histogram["edges"][-1]
            yield "lengths", f"{low:,.0f} {draw_bars(histogram['counts'])} {high:,.0f}"


def draw_bars(counts: Sequence[int]) -> str:
    """Draw a histogram in one line: a sign for each bin, a blank for an empty one.

    Example:
        >>> draw_bars([0, 1, 4, 8])
        ' ▁▄█'
    """
    most = max(counts, default=0)
    return "".join(BARS[-(-len(BARS) * n // most) - 1] if n else " " for n in counts)
