"""After a multirun: every run's swept keys beside what it came to: a table, JSON, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from cs336_alignment.errors import ExitStatus
from cs336_alignment.experiments.results import (
    ACCURACY,
    FORMAT,
    RunResult,
    cell,
    read_result,
    shown_metrics,
    to_markdown_table,
)
from cs336_alignment.files import write_json, write_text
from cs336_alignment.multirun import Outcome
from cs336_alignment.tracking.comparison_plots import (
    ComparisonPanel,
    plot_comparison,
    reads_best_logarithmic,
)
from cs336_alignment.tracking.console import Console

TABLE, PAGE, PICTURE = "runs.json", "runs.md", "curves.png"
# Of the table on the page, what the one on the screen lacks.
DETAILS = ("examples", "eval/response_entropy", "eval/response_length", "train/loss")
SIZE_KEY = "data.max_train_examples"


def show_multirun(outcomes: Sequence[Outcome]) -> None:
    """Write `runs.json`, `runs.md` and `curves.png` into `<output_root>/<base run_name>/`, and show
    the table.

    Args:
        outcomes: of runs of the verb `train`, at least one.
    """
    console = Console()
    results = [read_result(_folder_of(outcome)) for outcome in outcomes]
    folder = Path(outcomes[0].run.config.output_root).expanduser() / _common_name(outcomes)
    folder.mkdir(parents=True, exist_ok=True)
    columns, rows = table_of(outcomes, results)
    failed = [outcome for outcome in outcomes if outcome.status != ExitStatus.DONE]
    text = f"# {folder.name}\n\n{to_markdown_table(columns, rows)}"
    for outcome in failed:
        text += f"\n**{outcome.run.config.run_name}**: {_told(outcome)}\n"
    write_json(folder / TABLE, to_json(outcomes, results))
    write_text(folder / PAGE, text)
    panels = panels_of(outcomes, results)
    if panels:
        plot_comparison(folder / PICTURE, folder.name, panels)
    console.table(f"{folder.name}: {len(outcomes)} runs", *_brief(columns, rows))
    for outcome in failed:
        console.warn(f"{outcome.run.config.run_name}: {_told(outcome)}")
    pictures = f", picture {folder / PICTURE}" if panels else ""
    console.note(f"table    {folder / PAGE}, {folder / TABLE}{pictures}")


def table_of(
    outcomes: Sequence[Outcome], results: Sequence[RunResult]
) -> tuple[list[str], list[list[str]]]:
    """Make the table of runs: what was swept, examples, steps, metrics of the exported step."""
    keys, names = list(outcomes[0].run.swept), shown_metrics(results)
    columns = [*keys, "examples", "step", *names, "status"]
    rows = []
    for outcome, result in zip(outcomes, results, strict=True):
        metrics = result.metrics()
        rows.append([
            *(_value(outcome, result, key) for key in keys),
            "" if result.examples is None else f"{result.examples:,}",
            f"{result.step:,}",
            *(cell(metrics, name) for name in names),
            "done" if outcome.status == ExitStatus.DONE else f"{int(outcome.status)}",
        ])  # fmt: skip
    return columns, rows


def _value(outcome: Outcome, result: RunResult, key: str) -> str:
    value = outcome.run.swept.get(key, "")
    if key == SIZE_KEY and value == "null" and result.examples is not None:
        return f"all {result.examples:,}"
    return value


def _brief(
    columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Leave out of a table what a terminal of 80 characters has no room for."""
    shown = [i for i, name in enumerate(columns) if name not in DETAILS]
    names = [columns[i].removeprefix("eval/").rsplit(".", 1)[-1] for i in shown]
    return names, [[row[i] for i in shown] for row in rows]


def to_json(outcomes: Sequence[Outcome], results: Sequence[RunResult]) -> dict[str, Any]:
    """Give the content of `runs.json`."""
    runs = [
        {
            "run_name": outcome.run.config.run_name,
            "folder": str(result.folder),
            "swept": outcome.run.swept,
            "exit_code": int(outcome.status),
            "state": result.state,
            "error": outcome.error,
            "examples": result.examples,
            "step": result.step,
            "exported_step": result.exported,
            "metrics_at_start": result.metrics(at_start=True),
            "metrics": result.metrics(),
        }
        for outcome, result in zip(outcomes, results, strict=True)
    ]
    return {"swept": list(outcomes[0].run.swept), "runs": runs}


def panels_of(outcomes: Sequence[Outcome], results: Sequence[RunResult]) -> list[ComparisonPanel]:
    """Choose what is drawn: accuracy and format over the steps, or losses where nothing was
    generated; and, where one number was swept, the end over that number.
    """
    names = [name for name in (ACCURACY, FORMAT) if any(r.curve(name) for r in results)]
    if not names:
        loss = next(
            (n for n in ("eval/loss", "train/loss") if any(r.curve(n) for r in results)), ""
        )
        names = [loss] if loss else []
    labels = [_label(outcome, result) for outcome, result in zip(outcomes, results, strict=True)]
    panels = [
        ComparisonPanel("step", name, {
            label: result.curve(name) for label, result in zip(labels, results, strict=True)
        })
        for name in names
    ]  # fmt: skip
    values = _numbers(outcomes, results)
    if values and len(set(values)) > 1:
        key = next(iter(outcomes[0].run.swept))
        label = "training examples" if key == SIZE_KEY else key
        lines = {
            name: sorted(
                (value, result.metrics()[name])
                for value, result in zip(values, results, strict=True)
                if name in result.metrics()
            )
            for name in names
        }
        panels.append(ComparisonPanel(label, "at the end", lines, reads_best_logarithmic(values)))
    return panels


def _numbers(outcomes: Sequence[Outcome], results: Sequence[RunResult]) -> list[float]:
    """Give the number that each run was swept to; [] if it is not one number each."""
    keys = list(outcomes[0].run.swept)
    if len(keys) != 1:
        return []
    if keys == [SIZE_KEY]:  # null is all of them, and a source may hold fewer
        sizes = [result.examples for result in results if result.examples is not None]
        return [float(size) for size in sizes] if len(sizes) == len(results) else []
    try:
        return [float(outcome.run.swept[keys[0]]) for outcome in outcomes]
    except ValueError:
        return []


def _label(outcome: Outcome, result: RunResult) -> str:
    swept = outcome.run.swept
    if list(swept) == [SIZE_KEY] and result.examples is not None:
        return f"{result.examples:,} examples"
    return " ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in swept.items())


def _folder_of(outcome: Outcome) -> Path:
    config = outcome.run.config
    return Path(config.output_root).expanduser() / (config.run_name or "")


def _common_name(outcomes: Sequence[Outcome]) -> str:
    """Name the runs together: what their names begin with, where model or data are swept."""
    letters = zip(*(outcome.run.base_name for outcome in outcomes), strict=False)
    common = "".join(row[0] for row in takewhile(lambda row: len(set(row)) == 1, letters))
    return common.rstrip("._-") or "multirun"


def _told(outcome: Outcome) -> str:
    if outcome.error is None:
        return f"stopped (exit status {int(outcome.status)}); the same command continues"
    return outcome.error.splitlines()[0]
