"""`report.html`: a run, or several side by side, as one page that opens offline."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from cs336_alignment.config import MISSING, Config, flatten
from cs336_alignment.files import write_text
from cs336_alignment.html_page import build_page
from cs336_alignment.tracking.curves import Curve, read_curves
from cs336_alignment.tracking.panels import panels_for
from cs336_alignment.tracking.run_clock import EVALUATION_SHARE
from cs336_alignment.tracking.run_record import METRICS, RunRecord, read_run, running_seconds
from cs336_alignment.tracking.shown_generations import BUDGET_BYTES, choose_generations

REPORT = "report.html"
STYLES = ("uPlot.min.css", "report.css")
SCRIPTS = ("base.js", "charts.js", "generations.js", "tables.js", "report.js")
LIBRARY = "uPlot.iife.min.js"
STRETCHES = 1000  # of all runs of a page together, but at least:
FEWEST_STRETCHES = 200
# Tiles at the head of the page: label, metric, how it is written, what it says below.
BEFORE_AND_AFTER = (
    ("Held-out loss", "eval/loss", "number"),
    ("Answer reward", "eval/answer_reward", "share"),
    ("Format reward", "eval/format_reward", "share"),
)


def write_own_report(run: Path, warn: Callable[[str], None]) -> None:
    """Write a run's page at its end; what goes wrong is told and stops nothing.

    Args:
        run: its folder; one without metrics has nothing to show.
        warn: prints a warning.
    """
    if not (run / METRICS).is_file():
        return
    try:
        write_report(run / REPORT, [read_run(run)])
    except Exception as failure:  # a page must not fail a run whose weights are done
        warn(f"{REPORT} could not be written ({failure})")


def write_report(path: Path, runs: Sequence[RunRecord]) -> None:
    """Write the page of some runs.

    Args:
        path: the HTML file, replaced at once.
        runs: at least one; the first is what the others are compared with.

    Raises:
        OSError: the disk refuses.
    """
    folder = resources.files("cs336_alignment") / "tracking" / "page"

    def read(names: Sequence[str]) -> str:
        return "\n".join((folder / name).read_text("utf-8") for name in names)

    code = {"style": read(STYLES), "script": read(SCRIPTS), "library": read([LIBRARY])}
    title = " · ".join(run.name for run in runs)
    page = build_page(read(["report.html"]), title=title, data=page_data(runs), code=code)
    write_text(path, page)


def page_data(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Give what the page holds.

    Returns:
        `made`: Unix seconds; `panels`: see `Panel`; `defaults`: key → value of every config key
        that has one; `runs`: for each what `_run_data` gives.
    """
    curves = [read_curves(run.rows) for run in runs]
    names = {name for found in curves for name in found}
    stretches = max(FEWEST_STRETCHES, STRETCHES // len(runs))
    return {
        "made": time.time(),
        "panels": [panel.__dict__ for panel in panels_for(names)],
        "defaults": {key: value for key, value in flatten(Config()) if value != MISSING},
        "runs": [
            _run_data(run, found, stretches, BUDGET_BYTES // len(runs))
            for run, found in zip(runs, curves, strict=True)
        ],
    }


def _run_data(
    run: RunRecord, curves: Mapping[str, Curve], stretches: int, budget: int
) -> dict[str, Any]:
    return {
        "name": run.name,
        "folder": str(run.folder),
        "status": run.status,
        "total_steps": run.manifest.get("total_steps"),
        "last_step": run.rows[-1]["step"] if run.rows else None,
        "last_line": run.rows[-1]["time"] if run.rows else None,
        "tiles": key_numbers(run, curves),
        "metrics": {name: curve.describe() for name, curve in curves.items()},
        "curves": {name: curve.as_json(stretches) for name, curve in curves.items()},
        "generations": choose_generations(run.folder, budget),
        "ledger": run.ledger,
        "config": run.config,
        "manifest": run.manifest,
        "troubles": run.troubles,
    }


def key_numbers(run: RunRecord, curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """Give the numbers that a run is judged by at a glance; those that it does not have are left
    out.

    Evaluations before the questions changed do not compare, and the later one is of the step that
    was exported, where another was chosen than the last.

    Returns:
        `label`, `kind` (see `Panel`), `value`, and where the number has a past, `before` and the
        `steps` of both.
    """
    tiles: list[dict[str, Any]] = []
    facts = {name: curve.describe() for name, curve in curves.items()}

    def add(label: str, kind: str, first: list[Any] | None, last: list[Any] | None) -> None:
        if first is not None and last is not None:
            tile = {"label": label, "kind": kind, "value": last[1]}
            if first[0] != last[0]:
                tile |= {"before": first[1], "steps": [first[0], last[0]]}
            tiles.append(tile)

    loss = facts.get("train/loss", {})
    add("Training loss", "number", loss.get("first"), loss.get("last"))
    since = run.manifest.get("evaluation_since_step", 0)
    until = run.manifest.get("export_step", float("inf"))
    for label, name, kind in BEFORE_AND_AFTER:
        if name in curves:
            curve = curves[name]
            fits = (curve.steps >= since) & (curve.steps <= until)
            part = Curve(curve.steps[fits], curve.values[fits]).describe()
            add(label, kind, part["first"], part["last"])
    for label, name, which, kind in (
        ("Tokens/s, median", "perf/tokens_per_second", "median", "count"),
        ("Peak memory", "perf/peak_memory_gib", "greatest", "gib"),
    ):
        value = facts.get(name, {}).get(which)
        if value is not None:
            tiles.append(
                {"label": label, "kind": kind, "value": value[1] if which != "median" else value}
            )
    seconds = running_seconds(run.rows)
    if seconds is not None:
        tiles.append({"label": "Wall time", "kind": "duration", "value": seconds})
    share = facts.get(EVALUATION_SHARE, {}).get("last")
    if share is not None:
        tiles.append({"label": "In evaluation", "kind": "share", "value": share[1]})
    return tiles
