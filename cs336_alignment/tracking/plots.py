"""Pictures of a run from its metrics and its data ledger."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cs336_alignment.files import replacing
from cs336_alignment.tracking.metrics import read_metrics

SMOOTH_FROM = 50  # steps; shorter runs are read best raw
SMOOTHING = 0.9


def plot_loss(metrics_path: Path, png_path: Path, title: str) -> None:
    """Draw loss, learning rate and gradient norm over the steps into a PNG; replaces an older one
    at once.

    Args:
        metrics_path: a `metrics.jsonl`.
        png_path: the picture.
        title: of the picture.
    """
    pyplot = _pyplot()
    rows = read_metrics(metrics_path)
    train = [row for row in rows if row.get("train/loss") is not None]
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1.4), layout="constrained"
    )
    try:
        _draw_losses(top, train, [row for row in rows if row.get("eval/loss") is not None])
        top.set_title(title)
        _draw_norm_and_rate(bottom, train)
        with replacing(png_path) as file:
            figure.savefig(file, dpi=120, format="png")
    finally:
        pyplot.close(figure)


def plot_lengths(ledger_path: Path, png_path: Path, title: str) -> None:
    """Draw how long the examples are, training and evaluation data each; replaces an older PNG.

    Args:
        ledger_path: a `data_ledger.json`.
        png_path: the picture.
        title: of the picture.
    """
    pyplot = _pyplot()
    splits = json.loads(ledger_path.read_text(encoding="utf-8"))
    figure, rows = pyplot.subplots(
        len(splits), 1, figsize=(8, 3 * len(splits)), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    try:
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
        with replacing(png_path) as file:
            figure.savefig(file, dpi=120, format="png")
    finally:
        pyplot.close(figure)


@contextmanager
def picture(png_path: Path, title: str, rows: int) -> Iterator[list[Any]]:
    """Open axes one above another; they become a PNG, at once, when the block ends well.

    Args:
        png_path: the picture.
        title: of the picture.
        rows: number of axes.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        rows, 1, figsize=(8, 3.2 * rows), squeeze=False, layout="constrained"
    )
    try:
        axes[0, 0].set_title(title)
        yield list(axes[:, 0])
        with replacing(png_path) as file:
            figure.savefig(file, dpi=120, format="png")
    finally:
        pyplot.close(figure)


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
    """Exponential mean with the bias of its start taken out."""
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(mean / weight)
    return smoothed
