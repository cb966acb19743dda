"""Pictures that compare runs: a curve for each, and where each ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cs336_alignment.tracking.plots import open_figure

Points = Sequence[tuple[float, float]]
LOG_FROM = 8.0  # the largest value by the smallest, from where a logarithmic axis reads better


@dataclass(frozen=True)
class ComparisonPanel:
    """One set of axes.

    Attributes:
        x_label: of the values below.
        y_label: of those at the left.
        lines: name → points in order; one without a name is drawn without a legend.
        logarithmic: the x axis.
    """

    x_label: str
    y_label: str
    lines: Mapping[str, Points]
    logarithmic: bool = False


def reads_best_logarithmic(values: Sequence[float]) -> bool:
    """Tell whether values lie so far apart that a logarithmic axis shows them better.

    Example:
        >>> reads_best_logarithmic([128, 1024]), reads_best_logarithmic([0, 1024])
        (True, False)
    """
    return min(values) > 0 and max(values) >= LOG_FROM * min(values)


def plot_comparison(png_path: Path, title: str, panels: Sequence[ComparisonPanel]) -> None:
    """Draw panels one above another into a PNG; replaces an older one at once.

    Args:
        png_path: the picture.
        title: of the picture.
        panels: at least one.
    """
    size = (8.0, 3.2 * len(panels))
    with open_figure(len(panels), 1, size, [png_path]) as (figure, grid):
        figure.suptitle(title)
        for axes, panel in zip(grid.flat, panels, strict=True):
            for name, points in panel.lines.items():
                xs, ys = [x for x, _ in points], [y for _, y in points]
                axes.plot(xs, ys, "o-", markersize=4, linewidth=1.5, label=name or None)
            if panel.logarithmic:
                axes.set_xscale("log")
                ticks = sorted({x for points in panel.lines.values() for x, _ in points})
                axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
                axes.minorticks_off()
            elif all(x == int(x) for points in panel.lines.values() for x, _ in points):
                axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlabel(panel.x_label)
            axes.set_ylabel(panel.y_label)
            axes.grid(alpha=0.3)
            if any(panel.lines):
                axes.legend(fontsize="small")
