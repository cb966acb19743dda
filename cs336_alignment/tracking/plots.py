"""Pictures from metrics and data ledgers: of one run, and of any metric of several runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cs336_alignment.files import replacing
from cs336_alignment.tracking.curves import Curve, read_curves
from cs336_alignment.tracking.metrics import read_metrics
from cs336_alignment.tracking.panels import Panel, panels_for
from cs336_alignment.tracking.run_record import RunRecord

SMOOTH_FROM = 50  # steps; shorter runs are read best raw
SMOOTHING = 0.9
OVERVIEW = ("loss", "rewards", "response_lengths", "entropy")
FORMATS = ("png", "pdf")
DASHES = ("-", "--", ":", "-.")


def plot_loss(metrics_path: Path, png_path: Path, title: str) -> None:
    """Draw loss, learning rate and gradient norm over the steps into a PNG; replaces an older one
    at once.

    Args:
        metrics_path: a `metrics.jsonl`.
        png_path: the picture.
        title: of the picture.
    """
    rows = read_metrics(metrics_path)
    train = [row for row in rows if row.get("train/loss") is not None]
    options: dict[str, Any] = {"dpi": 120, "sharex": True, "height_ratios": (3, 1.4)}
    with open_figure(2, 1, (8, 6), [png_path], **options) as (_, grid):
        top, bottom = grid[:, 0]
        _draw_losses(top, train, [row for row in rows if row.get("eval/loss") is not None])
        top.set_title(title)
        _draw_norm_and_rate(bottom, train)


def plot_lengths(ledger_path: Path, png_path: Path, title: str) -> None:
    """Draw how long the examples are, training and evaluation data each; replaces an older PNG.

    Args:
        ledger_path: a `data_ledger.json`.
        png_path: the picture.
        title: of the picture.
    """
    splits = json.loads(ledger_path.read_text(encoding="utf-8"))
    size = (8, 3 * len(splits))
    with open_figure(len(splits), 1, size, [png_path], dpi=120, sharex=True) as (_, rows):
        for axes, (name, split) in zip(rows[:, 0], splits.items(), strict=True):
            histogram, percentiles = split["lengths"]["histogram"], split["lengths"]["percentiles"]
            axes.stairs(histogram["counts"], histogram["edges"], fill=True, color="tab:blue")
            for percentile, style in (("50", "-"), ("95", "--")):
                value = percentiles[percentile]
                label = f"{percentile} %: {value:,} tokens"
                axes.axvline(value, color="tab:orange", linestyle=style, label=label)
            axes.set_ylabel(f"{name}: examples")
            axes.grid(alpha=0.3)
            axes.legend()
        rows[0, 0].set_title(title)
        rows[-1, 0].set_xlabel("tokens of an example, prompt and response")


def save_plots(folder: Path, runs: Sequence[RunRecord]) -> list[str]:
    """Draw every panel that the runs have values for, and the most asked for beside each other,
    each as PNG and as PDF.

    Args:
        folder: of the pictures, made if need be; older ones are replaced.
        runs: told apart by colour.

    Returns:
        The pictures' names.

    Raises:
        OSError: the disk refuses.
    """
    curves = {label: read_curves(run.rows) for label, run in zip(_labels(runs), runs, strict=True)}
    panels = panels_for({name for found in curves.values() for name in found})
    pictures = {panel.name: [panel] for panel in panels}
    overview = [panel for name in OVERVIEW for panel in panels if panel.name == name]
    if len(overview) > 1:
        pictures = {"overview": overview, **pictures}
    title = " · ".join(curves)
    for name, shown in pictures.items():
        folder.mkdir(parents=True, exist_ok=True)
        plot_panels([folder / f"{name}.{kind}" for kind in FORMATS], shown, curves, title)
    return list(pictures)


def plot_panels(
    paths: Sequence[Path],
    panels: Sequence[Panel],
    runs: Mapping[str, Mapping[str, Curve]],
    title: str,
) -> None:
    """Draw panels beside each other, two in a row, over the steps of all runs.

    A run has one colour where there are several, and then a metric one kind of line; in a single
    run each metric has its colour.

    Args:
        paths: of the same picture in several formats, each replaced at once; the ending names the
            format.
        panels: at least one.
        runs: label → the run's curves, see `read_curves`.
        title: of the picture; of a single panel its own stands beside it.
    """
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    size = (5.2 * columns, 3.4 * lines + 0.3)
    with open_figure(lines, columns, size, paths) as (figure, grid):
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw_panel(axes, panel, runs)
        if len(panels) > 1:
            figure.suptitle(title)
        else:
            grid[0, 0].set_title(f"{panels[0].title}: {title}")


@contextmanager
def open_figure(
    lines: int, columns: int, size: tuple[float, float], paths: Sequence[Path], dpi: int = 150,
    **options: Any,
) -> Iterator[tuple[Any, Any]]:  # fmt: skip
    """Give a figure with its axes; save it into all paths when the block ends well."""
    pyplot = _pyplot()
    figure, grid = pyplot.subplots(
        lines, columns, figsize=size, squeeze=False, layout="constrained", **options
    )
    try:
        yield figure, grid
        for path in paths:
            with replacing(path) as file:
                figure.savefig(file, dpi=dpi, format=path.suffix.removeprefix("."))
            figure.set_layout_engine("none")  # the next format looks the same, and is faster
    finally:
        pyplot.close(figure)


def _draw_panel(axes: Any, panel: Panel, runs: Mapping[str, Mapping[str, Curve]]) -> None:
    lines = [
        (label, name, words, found[name])
        for label, found in runs.items()
        for name, words in panel.metrics.items()
        if name in found
    ]
    colors = list(runs) if len(runs) > 1 else list(panel.metrics)
    dashes = list(panel.metrics) if len(runs) > 1 else []
    for label, name, words, curve in lines:
        legend = (
            words if len(runs) == 1 else label if len(panel.metrics) == 1 else f"{label}, {words}"
        )
        style = {
            "color": f"C{colors.index(label if len(runs) > 1 else name)}",
            "linestyle": DASHES[dashes.index(name) % len(DASHES)] if dashes else "-",
        }
        values = curve.values * (100 if panel.kind == "share" else 1)
        noisy = not name.startswith("eval/") and panel.kind != "rate"
        if noisy and len(values) >= SMOOTH_FROM:
            axes.plot(curve.steps, values, alpha=0.25, linewidth=1, **style)
            axes.plot(
                curve.steps, _smoothed(values.tolist()), linewidth=1.8,
                label=f"{legend} (smoothed)", **style,
            )  # fmt: skip
        else:
            marker = "." if len(values) < SMOOTH_FROM else None
            axes.plot(curve.steps, values, linewidth=1.5, marker=marker, label=legend, **style)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    unit = f"{panel.unit} (%)" if panel.kind == "share" else panel.unit
    axes.set_ylabel(unit or panel.title.lower())
    if panel.kind == "rate":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_title(panel.title)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize="small")


def _labels(runs: Sequence[RunRecord]) -> list[str]:
    """The runs' names; where two are the same, their folders."""
    names = [run.name for run in runs]
    labels = names if len(set(names)) == len(names) else [str(run.folder) for run in runs]
    return [label.replace("$", r"\$") for label in labels]  # no formulas


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw_losses(
    axes: Any, train: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]]
) -> None:
    steps, losses = _columns(train, "train/loss")
    if len(losses) < SMOOTH_FROM:
        axes.plot(steps, losses, ".-", color="tab:blue", linewidth=1.2, label="train/loss")
    else:
        axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1.2)
        label = "train/loss (smoothed)"
        axes.plot(steps, _smoothed(losses), color="tab:blue", linewidth=2, label=label)
    if held_out:
        axes.plot(*_columns(held_out, "eval/loss"), "o-", color="tab:orange", label="eval/loss")
    axes.set_ylabel("nats per response token")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_norm_and_rate(axes: Any, train: Sequence[Mapping[str, Any]]) -> None:
    marker = "." if len(train) < SMOOTH_FROM else None  # a line through one point is invisible
    norms = _columns(train, "train/grad_norm")
    axes.plot(*norms, color="tab:green", linewidth=1, marker=marker)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("gradient norm", color="tab:green")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    rates = axes.twinx()
    rates.plot(
        *_columns(train, "train/learning_rate"), color="tab:gray", linewidth=1.5, marker=marker
    )
    rates.set_ylabel("learning rate", color="tab:gray")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _columns(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    return [row["step"] for row in rows], [row[name] for row in rows]


def _smoothed(values: list[float]) -> list[float]:
    """Exponential mean with the bias of its start taken out; NaN is passed over."""
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isnan(value):
            smoothed.append(value)
            continue
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(mean / weight)
    return smoothed
