"""What a finished or unfinished run left, read for comparison with others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cs336_alignment.tracking.metrics import read_metrics
from cs336_alignment.training.report import show_metric
from cs336_alignment.training.run_folder import LEDGER, MANIFEST, METRICS, STATUS

ACCURACY, FORMAT = "eval/answer_reward", "eval/format_reward"
# In the order of tables, where they were measured.
SHOWN = (
    ACCURACY,
    FORMAT,
    "eval/loss",
    "eval/response_entropy",
    "eval/response_length",
    "train/loss",
)


@dataclass(frozen=True)
class RunResult:
    """One run.

    Attributes:
        folder: of the run.
        state: of `status.json`; "absent" if there is none.
        step: that a checkpoint holds.
        examples: trained on; None if the run did not come so far.
        exported: the step whose weights are in `model/`; None if there are none.
        rows: of `metrics.jsonl`.
    """

    folder: Path
    state: str
    step: int
    examples: int | None
    exported: int | None
    rows: Sequence[dict[str, Any]]

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """Give a metric's values as (step, value)."""
        return [(row["step"], row[metric]) for row in self.rows if row.get(metric) is not None]

    def metrics(self, *, at_start: bool = False) -> dict[str, float]:
        """Give the value of each metric at the exported step, or the last one before it; or at the
        start.
        """
        rows = [row for row in self.rows if self.exported is None or row["step"] <= self.exported]
        if at_start:
            rows = [row for row in self.rows if row["step"] == 0][::-1]
        names = {name: None for row in rows for name in row if name.startswith(("eval/", "train/"))}
        found = {}
        for name in names:
            values = [row[name] for row in rows if row.get(name) is not None]
            if values:
                found[name] = float(values[-1])
        return found


def read_result(folder: Path) -> RunResult:
    """Read a run's folder; what is not there, or not whole, counts as not there."""
    status, ledger = _read(folder / STATUS), _read(folder / LEDGER)
    path = folder / METRICS
    return RunResult(
        folder,
        str(status.get("state", "absent")),
        int(status.get("step", 0)),
        ledger.get("train", {}).get("examples"),
        _read(folder / MANIFEST).get("export_step"),
        read_metrics(path) if path.is_file() else [],
    )


def shown_metrics(results: Sequence[RunResult]) -> list[str]:
    """Choose the metrics that a table of these runs shows."""
    measured = {name for result in results for name in result.metrics()}
    return [name for name in SHOWN if name in measured]


def cell(metrics: dict[str, float], name: str) -> str:
    """Write a metric for a table; empty where it was not measured."""
    return show_metric(name, metrics[name]) if name in metrics else ""


def to_markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table as Markdown, the first column left-aligned."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    cells = [[str(c).replace("|", "\\|").replace("\n", " ") for c in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
