"""The picture of a run shows what metrics.jsonl holds, whatever is missing from it."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import IO

import matplotlib
import numpy as np
import pytest
from matplotlib import image, pyplot
from matplotlib.figure import Figure

from cs336_alignment.data.ledger import LedgerEntry
from cs336_alignment.tracking.curves import Curve, read_curves
from cs336_alignment.tracking.metrics import MetricsFile
from cs336_alignment.tracking.panels import Panel
from cs336_alignment.tracking.plots import (
    _smoothed,
    plot_lengths,
    plot_loss,
    plot_panels,
    save_plots,
)
from cs336_alignment.tracking.run_record import read_run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Keep the figures that are saved, to look into them."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: object, **options: object) -> None:
        figures.append(self)
        save(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def write_run(path: Path, steps: int) -> None:
    file = MetricsFile(path)
    for step in range(1, steps + 1):
        losses = {"train/loss": 2 * math.exp(-step / 40) + 0.1 * (-1) ** step}
        norm = math.inf if step == 7 else 1.0 / step
        file.write(
            step, losses | {"train/grad_norm": norm, "train/learning_rate": 1e-5 * step / steps}
        )
        if step % 20 == 0:
            file.write(step, {"eval/loss": 2.0})
    file.close()


def test_a_long_run_is_smoothed_and_labelled(tmp_path: Path, drawn: list[Figure]) -> None:
    write_run(tmp_path / "metrics.jsonl", 120)
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "my run")
    top, bottom, rates = drawn[0].axes
    assert top.get_title() == "my run"
    raw, smooth, held_out = top.get_lines()
    assert (len(raw.get_xdata()), len(smooth.get_xdata())) == (120, 120)
    roughness = [sum(abs(b - a) for a, b in pairwise(y))
                 for y in (raw.get_ydata(), smooth.get_ydata())]  # fmt: skip
    assert roughness[1] < roughness[0] / 5
    assert list(held_out.get_xdata()) == [20, 40, 60, 80, 100, 120]
    shown = [text.get_text() for text in top.get_legend().get_texts()]
    assert shown == ["train/loss (smoothed)", "eval/loss"]
    assert top.get_ylabel() and bottom.get_xlabel() == "step"
    assert (bottom.get_ylabel(), rates.get_ylabel()) == ("gradient norm", "learning rate")
    assert len(bottom.get_lines()[0].get_xdata()) == len(rates.get_lines()[0].get_xdata()) == 120
    picture = image.imread(tmp_path / "loss.png")
    assert min(picture.shape[:2]) > 500
    assert pyplot.get_fignums() == []  # none stays in memory
    assert matplotlib.get_backend().lower() == "agg"


@pytest.mark.parametrize("steps", [1, 3])
def test_a_short_run_shows_its_points(tmp_path: Path, drawn: list[Figure], steps: int) -> None:
    write_run(tmp_path / "metrics.jsonl", steps)
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "short")
    for axes in drawn[0].axes:
        (line,) = axes.get_lines()
        assert len(line.get_xdata()) == steps
        assert line.get_marker() == "."


def test_a_run_with_evaluations_only_is_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "time": 1.0, "eval/loss": 2.0}\n')
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "evaluation")
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_lengths_are_drawn_with_their_percentiles(tmp_path: Path, drawn: list[Figure]) -> None:
    lengths = {"train": [10] * 30 + [40] * 10, "eval": [20, 30]}
    content = {}
    for name, values in lengths.items():
        entry = LedgerEntry()
        entry.measure(np.array(values))
        content[name] = entry.as_dict()
    (tmp_path / "data_ledger.json").write_text(json.dumps(content))
    plot_lengths(tmp_path / "data_ledger.json", tmp_path / "lengths.png", "my run")
    for axes, values in zip(drawn[0].axes, lengths.values(), strict=True):
        (bars,) = axes.patches
        assert sum(bars.get_data().values) == len(values)
        assert (bars.get_data().edges[0], bars.get_data().edges[-1]) == (min(values), max(values))
        median, high = axes.get_lines()
        assert median.get_xdata()[0] == int(np.percentile(values, 50))
        assert high.get_xdata()[0] == int(np.percentile(values, 95))
    assert (tmp_path / "lengths.png").stat().st_size > 0


def test_a_failure_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "metrics.jsonl", 3)
    (tmp_path / "loss.png").write_bytes(b"old")

    def fail(self: Figure, file: IO[bytes], **options: object) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "run")
    assert (tmp_path / "loss.png").read_bytes() == b"old"
    assert pyplot.get_fignums() == []


def test_smoothing_has_no_bias_at_the_start() -> None:
    assert _smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    assert _smoothed([1.0, 0.0])[1] == pytest.approx(0.9 / 1.9)


PANEL = Panel("two", "Two", "mean", "share", "more", {"eval/a": "first", "train/b": "second"})


def some_curves(scale: float, steps: int = 5) -> dict[str, Curve]:
    rows = [
        {"step": s, "time": 0.0, "eval/a": scale * s, "train/b": None if s == 2 else scale}
        for s in range(steps)
    ]
    return read_curves(rows)


def test_runs_have_a_colour_and_metrics_a_kind_of_line(tmp_path: Path, drawn: list[Figure]) -> None:
    paths = [tmp_path / "two.png", tmp_path / "two.pdf"]
    plot_panels(paths, [PANEL], {"x": some_curves(0.1), "y": some_curves(0.2)}, "both")
    assert paths[0].read_bytes().startswith(b"\x89PNG") and paths[1].read_bytes().startswith(
        b"%PDF"
    )
    assert drawn[0] is drawn[1]  # one figure in two formats
    (axes,) = drawn[0].axes
    lines = axes.get_lines()
    labels = [line.get_label() for line in lines]
    assert labels == ["x, first", "x, second", "y, first", "y, second"]
    looks = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert looks == [("C0", "-"), ("C0", "--"), ("C1", "-"), ("C1", "--")]
    assert axes.get_ylabel() == "mean (%)"
    assert list(lines[2].get_ydata()) == pytest.approx([0, 20, 40, 60, 80])
    assert np.isnan(lines[3].get_ydata()[2])
    plot_panels(paths[:1], [PANEL], {"x": some_curves(0.1)}, "one")
    looks = [(line.get_color(), line.get_linestyle()) for line in drawn[2].axes[0].get_lines()]
    assert looks == [("C0", "-"), ("C1", "-")]
    assert pyplot.get_fignums() == []


def test_the_plots_of_a_run(tmp_path: Path, drawn: list[Figure]) -> None:
    run = tmp_path / "r"
    run.mkdir()
    file = MetricsFile(run / "metrics.jsonl")
    for step in range(1, 4):
        file.write(step, {"train/loss": 1 / step, "eval/loss/a": 1.0, "my/own": 2.0})
    file.write(3, {"eval/reward": 0.5, "eval/answer_reward": 0.5})
    file.close()
    run = run.rename(tmp_path / "a $formula")  # is none
    names = save_plots(tmp_path / "plots", [read_run(run)])
    assert names == ["overview", "loss", "loss_by_source", "rewards", "my_own"]
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("png", "pdf")
    }
    assert [axes.get_title() for axes in drawn[0].axes] == ["Loss", "Rewards"]
    assert save_plots(tmp_path / "none", []) == [] and not (tmp_path / "none").exists()


def test_smoothing_passes_over_what_is_not_a_number() -> None:
    assert _smoothed([3.0, math.nan, 3.0])[::2] == pytest.approx([3.0, 3.0])
