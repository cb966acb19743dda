"""Pictures of a run from its metrics file."""

from __future__ import annotations

from pathlib import Path

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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(metrics_path)
    train = [row for row in rows if row.get("train/loss") is not None]
    held_out = [row for row in rows if row.get("eval/loss") is not None]
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1.4), layout="constrained"
    )
    try:
        steps = [row["step"] for row in train]
        losses = [row["train/loss"] for row in train]
        smooth = len(losses) >= SMOOTH_FROM
        marker = None if smooth else "."  # a line through one point is invisible
        top.plot(
            steps,
            losses,
            color="tab:blue",
            alpha=0.35 if smooth else 1.0,
            linewidth=1.2,
            marker=marker,
            label=None if smooth else "train/loss",
        )
        if smooth:
            top.plot(
                steps,
                _smoothed(losses),
                color="tab:blue",
                linewidth=2,
                label="train/loss (smoothed)",
            )
        if held_out:
            top.plot(
                [row["step"] for row in held_out],
                [row["eval/loss"] for row in held_out],
                "o-",
                color="tab:orange",
                label="eval/loss",
            )
        top.set_ylabel("nats per response token")
        top.set_title(title)
        top.grid(alpha=0.3)
        if top.get_legend_handles_labels()[0]:
            top.legend()
        norms = [row["train/grad_norm"] for row in train]
        bottom.plot(steps, norms, color="tab:green", linewidth=1, marker=marker)
        bottom.xaxis.get_major_locator().set_params(integer=True)
        bottom.set_ylabel("gradient norm", color="tab:green")
        bottom.set_xlabel("step")
        bottom.grid(alpha=0.3)
        rates = bottom.twinx()
        rates.plot(
            steps,
            [row["train/learning_rate"] for row in train],
            color="tab:gray",
            linewidth=1.5,
            marker=marker,
        )
        rates.set_ylabel("learning rate", color="tab:gray")
        rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        temporary = png_path.with_name(f".{png_path.name}")
        figure.savefig(temporary, dpi=120, format="png")
        temporary.replace(png_path)
    finally:
        pyplot.close(figure)


def _smoothed(values: list[float]) -> list[float]:
    """Exponential mean with the bias of its start taken out."""
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(mean / weight)
    return smoothed
