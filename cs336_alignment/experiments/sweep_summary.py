"""What a sweep found: a table, JSON, a picture, and the command to type."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from cs336_alignment.experiments.results import read_result, to_markdown_table
from cs336_alignment.experiments.study import Study, Trial
from cs336_alignment.files import write_json, write_text
from cs336_alignment.tracking.comparison_plots import ComparisonPanel, plot_comparison
from cs336_alignment.tracking.console import Console

RESULT, PAGE, PICTURE = "sweep.json", "sweep.md", "sweep.png"


def show_sweep(
    folder: Path,
    study: Study,
    metric: str,
    maximize: bool,
    fixed: Sequence[str],
    console: Console,
) -> None:
    """Write `sweep.json`, `sweep.md` and `sweep.png`, show the table and the best command.

    Args:
        folder: of the sweep.
        study: its trials.
        metric: that was searched by.
        maximize: whether a greater one is better.
        fixed: what was typed for every trial, and where the sweep is.
        console: shows it.
    """
    trials = study.trials
    ranked = rank(trials, maximize)
    importances = study.importances()
    keys = list(trials[0].values) if trials else []
    columns = ["trial", *keys, metric, "step", "state"]
    rows = [_row(trial, keys, folder) for trial in ranked]
    lines = [f"# {folder.name}", "", to_markdown_table(columns, rows)]
    best, command = (ranked[0] if ranked and ranked[0].value is not None else None), ""
    if best is not None:
        words = [*fixed, *(f"{key}={value}" for key, value in best.values.items())]
        command = shlex.join(["cs336-sft", "train", *words, f"run_name={folder.name}-best"])
        lines += ["The best one's command:", "", "```", command, "```", ""]
    if importances:
        lines += ["Share of each key in how much the metric varies:", ""]
        lines += [f"- `{key}`: {share:.0%}" for key, share in importances.items()] + [""]
    failed = [trial for trial in trials if trial.error]
    lines += [f"- trial {t.number} failed: {(t.error or '').splitlines()[0]}" for t in failed]
    write_text(folder / PAGE, "\n".join(lines).rstrip() + "\n")
    write_json(folder / RESULT, {
        "metric": metric,
        "greater_is_better": maximize,
        "best": None if best is None else best.number,
        "command": command,
        "importances": importances,
        "trials": [vars(trial) for trial in trials],
    })  # fmt: skip
    if best is not None:
        plot_comparison(folder / PICTURE, folder.name, panels_of(trials, metric, maximize, keys))
    shown = ["trial", *(key.rsplit(".", 1)[-1] for key in keys), metric, "step", "state"]
    console.table(f"{folder.name}: {len(trials)} trials, best first", shown, rows)
    for trial in failed:
        console.warn(f"trial {trial.number} failed: {(trial.error or '').splitlines()[0]}")
    if importances:
        shares = ", ".join(f"{key} {share:.0%}" for key, share in importances.items())
        console.note(f"varies by {shares}")
    if command:
        console.note(f"best     {command}")
    console.note(f"table    {folder / PAGE}, {folder / RESULT}, picture {folder / PICTURE}")


def rank(trials: Sequence[Trial], maximize: bool) -> list[Trial]:
    """Order trials: complete ones by their metric, the best first, then the others as they came."""
    sign = -1 if maximize else 1

    def place(trial: Trial) -> tuple[bool, float, int]:
        return trial.value is None, sign * (trial.value or 0.0), trial.number

    return sorted(trials, key=place)


def panels_of(
    trials: Sequence[Trial], metric: str, maximize: bool, keys: Sequence[str]
) -> list[ComparisonPanel]:
    """Choose what is drawn: the metric over the trials with the best so far, and over each number
    that was searched.
    """
    complete = [trial for trial in trials if trial.value is not None]
    values = [(float(trial.number), float(trial.value or 0.0)) for trial in complete]
    better = max if maximize else min
    best = [
        (number, better(value for _, value in values[: index + 1]))
        for index, (number, _) in enumerate(values)
    ]
    panels = [ComparisonPanel("trial", metric, {"each": values, "best so far": best})]
    for key in keys:
        try:
            points = [(float(trial.values[key]), float(trial.value or 0.0)) for trial in complete]
        except ValueError:  # no number
            continue
        panels.append(ComparisonPanel(key, metric, {"": sorted(points)}))
    return panels


def _row(trial: Trial, keys: Sequence[str], folder: Path) -> list[str]:
    step = read_result(folder / f"trial-{trial.number:03d}").step
    value = "" if trial.value is None else f"{trial.value:.4f}"
    values = [_short(trial.values.get(key, "")) for key in keys]
    return [str(trial.number), *values, value, f"{step:,}", trial.state]


def _short(value: str) -> str:
    """Write a drawn number with so many digits as people compare."""
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value
