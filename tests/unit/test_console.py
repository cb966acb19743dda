"""Piped, the console writes plain lines; on a terminal, bars with everything else above them."""

from __future__ import annotations

import re
from io import StringIO

import pytest
from rich.console import Console as RichConsole

from cs336_alignment.tracking import console as module
from cs336_alignment.tracking.console import Console

METRICS = {
    "train/loss": 0.43125,
    "train/learning_rate": 1.9e-5,
    "train/grad_norm": 0.811,
    "perf/tokens_per_second": 1234.4,
    "perf/step_seconds": 0.5,
}


def make(terminal: bool, enabled: bool = True) -> tuple[Console, StringIO]:
    text = StringIO()
    rich_console = RichConsole(
        file=text, force_terminal=terminal, width=120, highlight=False, soft_wrap=True
    )
    return Console(enabled, rich_console), text


@pytest.fixture(autouse=True)
def capable_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_piped_steps_are_plain_aligned_lines_with_the_time_left() -> None:
    console, text = make(terminal=False)
    console.start(300, 0)
    console.step(9, METRICS, show=True)
    console.step(10, METRICS, show=False)
    console.step(40, METRICS, show=True)
    console.stop()
    assert text.getvalue().splitlines() == [
        "step   9/300  loss 0.4313  lr 1.90e-05  grad 0.81  1,234 tok/s  eta 2m26s",
        "step  40/300  loss 0.4313  lr 1.90e-05  grad 0.81  1,234 tok/s  eta 2m10s",
    ]


def test_the_time_left_follows_the_last_steps() -> None:
    console, text = make(terminal=False)
    console.start(200, 0)
    for step in range(1, 101):
        seconds = 100.0 if step <= 50 else 40.0
        console.step(step, METRICS | {"perf/step_seconds": seconds}, show=step == 100)
    assert text.getvalue().rstrip().endswith("eta 1h06m")  # 100 steps of 40 s, not of 70 s


def test_what_the_user_wrote_is_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    for terminal in (False, True):
        console, text = make(terminal)
        console.note("[red]x[/red] [/wrong]")
        console.table("Results", ["metric", "after"], [["[bold]eval[/bold]", "1.5"]])
        console.warn("[b]careful")
        shown = text.getvalue() + capsys.readouterr().err
        assert "[red]x[/red] [/wrong]" in shown
        assert "[bold]eval[/bold]" in shown
        assert "warning: [b]careful" in shown


def test_long_lines_and_cells_are_not_cut() -> None:
    console, text = make(terminal=False)
    console.note("a" * 500)
    assert "a" * 500 in text.getvalue()
    console.table("Paths", ["metric", "after"], [["/folder/" + "b" * 200, "1.5"]])
    assert text.getvalue().count("b") == 200


def test_piped_warnings_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    console, text = make(terminal=False)
    console.warn("the disk is nearly full")
    assert text.getvalue() == ""
    assert capsys.readouterr().err == "warning: the disk is nearly full\n"


def test_piped_progress_prints_now_and_then_and_nothing_for_the_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    console, text = make(terminal=False)
    with console.progress("reading", 3) as advance:
        for _ in range(3):
            now += 1.0
            advance(1)
    assert text.getvalue() == ""
    with console.progress("tokenizing", 40) as advance:
        for _ in range(40):
            now += 1.0
            advance(1)
    lines = text.getvalue().splitlines()
    assert lines[0] == "tokenizing: 11/40"
    assert len(lines) == 3


def test_another_process_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for terminal in (False, True):
        console, text = make(terminal, enabled=False)
        console.start(2, 0)
        console.note("a")
        console.warn("b")
        console.table("c", ["d"], [["e"]])
        with console.progress("f", 1) as advance:
            advance(1)
        console.step(1, METRICS, show=True)
        console.stop()
        assert text.getvalue() == ""
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_a_terminal_shows_both_bars_and_lines_above_them() -> None:
    console, text = make(terminal=True)
    console.start(30, 4)
    console.step(5, METRICS, show=True)
    with console.progress("evaluating", 8) as advance:
        advance(8)
        console.note("within")
    console.step(6, METRICS, show=True)
    console.stop()
    console.note("after")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())
    # A note redraws what is live: itself first, then the bars.
    both = shown.split("within", 1)[1]
    assert both.index("training") < both.index("evaluating")
    assert re.search(r"training .* 5/30 loss 0\.4313 +1,234 tok/s", both)
    assert re.search(r"evaluating .* [08]/8", both)  # as when last refreshed
    last = shown.rsplit("training", 1)[1]
    assert "6/30" in last
    assert "evaluating" not in last
    assert last.rstrip().endswith("after")
    assert "lr 1.90e-05" not in shown  # the bar stands for the lines


def test_a_failure_within_progress_takes_its_bar_away() -> None:
    console, text = make(terminal=True)
    with pytest.raises(RuntimeError, match="boom"), console.progress("loading", 2):
        raise RuntimeError("boom")
    before = text.getvalue()
    console.note("plain")
    # No bar is redrawn, and the cursor is shown again.
    assert text.getvalue()[len(before) :] == "plain\n"
    assert before.count("\x1b[?25l") == before.count("\x1b[?25h")


def test_the_bars_fit_a_terminal_of_80_columns() -> None:
    text = StringIO()
    console = Console(True, RichConsole(file=text, force_terminal=True, width=80))
    console.start(3000, 0)
    with console.progress("evaluation loss", 1000) as advance:
        console.step(1000, METRICS | {"perf/tokens_per_second": 99_999.0}, show=True)
        advance(1000)
    console.stop()
    assert "1000/3000" in text.getvalue()
    assert "…" not in text.getvalue()
