"""What the iterations came to: a table, JSON and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cs336_alignment.experiments.results import (
    ACCURACY,
    FORMAT,
    cell,
    read_result,
    to_markdown_table,
)
from cs336_alignment.experiments.samples import read_sampling
from cs336_alignment.files import write_json, write_text
from cs336_alignment.metric_names import greater_is_better
from cs336_alignment.tracking.comparison_plots import ComparisonPanel, plot_comparison
from cs336_alignment.tracking.console import Console

RESULT, PAGE, PICTURE = "expert_iteration.json", "expert_iteration.md", "expert_iteration.png"
ENTROPY = "eval/response_entropy"
COMPARED = (ACCURACY, FORMAT, ENTROPY, "eval/loss")


def summarize_iterations(parts: Sequence[Path]) -> list[dict[str, Any]]:
    """Gather what is known of each iteration; the first entry is the model before them, number 0.

    Args:
        parts: the iterations' folders, in order, each a run that is complete.
    """
    before = read_result(parts[0]).metrics(at_start=True)
    entries: list[dict[str, Any]] = [{"iteration": 0, "metrics": _evaluated(before)}]
    for number, part in enumerate(parts, start=1):
        result, sampling = read_result(part), read_sampling(part)
        counts = {name: value for name, value in sampling.items() if name != "request"}
        entries.append({
            "iteration": number,
            "folder": str(part),
            "sampling": counts,
            "examples": result.examples,
            "step": result.step,
            "metrics": _evaluated(result.metrics()),
        })  # fmt: skip
    return entries


def choose_iteration(parts: Sequence[Path], metric: str | None) -> tuple[int, float | None]:
    """Choose whose model is the result: the last iteration's, or by a metric the best one's, of
    equals the first.

    Args:
        parts: the iterations' folders, in order.
        metric: an `eval/…` whose name says which way is better; None: the last.

    Returns:
        Its number, and its metric.
    """
    if metric is None:
        return len(parts), None
    values = [read_result(part).metrics().get(metric) for part in parts]
    sign = 1 if greater_is_better(metric) else -1
    known = [(sign * value, -number) for number, value in enumerate(values, 1) if value is not None]
    if not known:
        return len(parts), None
    number = -max(known)[1]
    return number, values[number - 1]


def show_summary(folder: Path, parts: Sequence[Path], chosen: int, console: Console) -> None:
    """Write `expert_iteration.json`, `.md` and `.png`, and show the table.

    Args:
        folder: of the whole.
        parts: the iterations' folders, in order.
        chosen: the iteration whose model is the result.
        console: shows it.
    """
    entries = summarize_iterations(parts)
    columns = ["iteration", "samples", "correct", "kept", "solved"]
    names = [name for name in COMPARED if any(name in entry["metrics"] for entry in entries)]
    rows = [[str(entry["iteration"]), *_counts(entry), *(cell(entry["metrics"], n) for n in names)]
            for entry in entries]  # fmt: skip
    write_json(folder / RESULT, {"exported_iteration": chosen, "iterations": entries})
    legend = (
        "Iteration 0 is the model before. *correct*: of the samples; *kept*: each different "
        "correct response to a question once; *solved*: questions with a correct response; "
        "`eval/…`: on the held-out data, after the iteration's training."
    )
    table = to_markdown_table([*columns, *names], rows)
    write_text(folder / PAGE, f"# {folder.name}\n\n{table}\n{legend}\n")
    plot_comparison(folder / PICTURE, folder.name, panels_of(entries))
    shown = [
        name.removeprefix("eval/").removeprefix("response_").removesuffix("_reward")
        for name in names
    ]
    brief = [[row[0], *row[2:]] for row in rows]  # a terminal of 80 characters
    title = f"{folder.name}: samples, and held-out data, by iteration"
    console.table(title, [columns[0], *columns[2:], *shown], brief)
    console.note(f"table    {folder / PAGE}, {folder / RESULT}, picture {folder / PICTURE}")


def panels_of(entries: Sequence[dict[str, Any]]) -> list[ComparisonPanel]:
    """Choose what is drawn over the iterations: shares, entropies, the number of kept samples."""

    def measured(name: str) -> list[tuple[float, float]]:
        return [(e["iteration"], e["metrics"][name]) for e in entries if name in e["metrics"]]

    def counted(name: str) -> list[tuple[float, float]]:
        return [(e["iteration"], e["sampling"][name]) for e in entries[1:]]

    shares = {
        ACCURACY: measured(ACCURACY), FORMAT: measured(FORMAT),
        "samples correct": counted("correct_share"), "questions solved": counted("solved_share"),
    }  # fmt: skip
    entropies = {ENTROPY: measured(ENTROPY), "of the samples": counted("response_entropy")}
    return [
        ComparisonPanel(
            "iteration", "share", {name: line for name, line in shares.items() if line}
        ),
        ComparisonPanel(
            "iteration", "entropy, nats per token", {n: v for n, v in entropies.items() if v}
        ),
        ComparisonPanel("iteration", "samples kept", {"": counted("kept")}),
    ]


def _evaluated(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("eval/")}


def _counts(entry: dict[str, Any]) -> list[str]:
    sampling = entry.get("sampling")
    if sampling is None:
        return ["", "", "", ""]
    return [
        f"{sampling['samples']:,}", f"{sampling['correct_share']:.1%}", f"{sampling['kept']:,}",
        f"{sampling['solved_share']:.1%}",
    ]  # fmt: skip
