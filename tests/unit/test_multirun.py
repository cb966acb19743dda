"""Several runs from one command: each is told, none hides another, and all are compared."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from cs336_alignment import multirun
from cs336_alignment.config import Config
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.experiments.results import read_result, to_markdown_table
from cs336_alignment.experiments.run_table import panels_of, show_multirun
from cs336_alignment.multirun import Outcome, SweptRun, run_all, status_of


def swept(root: Path, **values: str) -> list[SweptRun]:
    runs = []
    for name, value in values.items():
        config = Config(run_name=f"base-{name}", output_root=str(root))
        runs.append(SweptRun(config, "base", {"data.max_train_examples": value}))
    return runs


def leave(folder: Path, examples: int, rewards: list[float]) -> None:
    """Write what a finished run leaves."""
    folder.mkdir(parents=True)
    lines = [
        {"step": 10 * i, "eval/answer_reward": r, "eval/format_reward": 1.0, "eval/loss": 1 - r}
        for i, r in enumerate(rewards)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "status.json").write_text(json.dumps({"state": "completed", "step": 20}))
    (folder / "manifest.json").write_text(json.dumps({"export_step": 10}))
    (folder / "data_ledger.json").write_text(json.dumps({"train": {"examples": examples}}))


def test_a_run_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(config: Config) -> ExitStatus:
        if config.run_name == "base-a":
            raise UserError("D301", "no rows")
        if config.run_name == "base-b":
            raise RuntimeError("oh")
        return ExitStatus.DONE

    outcomes = run_all(swept(tmp_path, a="1", b="2", c="3"), job)
    assert [int(o.status) for o in outcomes] == [65, 70, 0]
    assert status_of(outcomes) == ExitStatus.BAD_DATA
    printed = capsys.readouterr()
    assert "error[D301]: no rows" in printed.err and "error[X001]" in printed.err
    assert "[3/3] base-c" in printed.out


def test_a_request_to_stop_ends_them_all(tmp_path: Path) -> None:
    outcomes = run_all(swept(tmp_path, a="1", b="2"), lambda _: ExitStatus.STOPPED)
    assert len(outcomes) == 1 and status_of(outcomes) == ExitStatus.STOPPED
    assert status_of([]) == ExitStatus.DONE


def test_the_time_limit_is_that_of_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, given = 0.0, []
    monkeypatch.setattr(multirun, "time", SimpleNamespace(monotonic=lambda: now))

    def job(config: Config) -> ExitStatus:
        nonlocal now
        now += 1800
        given.append(config.trainer.max_hours)
        return ExitStatus.DONE

    runs = swept(tmp_path, a="1", b="2", c="3")
    for run in runs:
        run.config.trainer.max_hours = 0.75
    outcomes = run_all(runs, job)
    assert given == [0.75, 0.25] and status_of(outcomes) == ExitStatus.STOPPED


def test_what_they_came_to_is_compared_at_the_exported_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = swept(tmp_path, a="100", b="null", c="5")
    leave(tmp_path / "base-a", 100, [0.0, 0.25, 0.125])
    leave(tmp_path / "base-b", 900, [0.0, 0.5, 0.75])
    outcomes = [
        Outcome(runs[0], ExitStatus.DONE), Outcome(runs[1], ExitStatus.DONE),
        Outcome(runs[2], ExitStatus.BAD_DATA, "error[D301]: no rows\n  hint: h"),
    ]  # fmt: skip
    show_multirun(outcomes)
    written = json.loads((tmp_path / "base/runs.json").read_text())
    assert [run["metrics"].get("eval/answer_reward") for run in written["runs"]] == [
        0.25,
        0.5,
        None,
    ]
    assert written["runs"][1]["metrics_at_start"]["eval/answer_reward"] == 0.0
    assert [run["exit_code"] for run in written["runs"]] == [0, 0, 65]
    page = (tmp_path / "base/runs.md").read_text()
    assert "| all 900 | 900 | 20 | 50.0 % |" in page and "error[D301]: no rows" in page
    assert (tmp_path / "base/curves.png").read_bytes().startswith(b"\x89PNG")
    assert "error[D301]" in capsys.readouterr().err


def test_the_end_is_drawn_over_the_number_of_examples(tmp_path: Path) -> None:
    runs = swept(tmp_path, a="100", b="null")
    leave(tmp_path / "base-a", 100, [0.0, 0.25, 0.125])
    leave(tmp_path / "base-b", 900, [0.0, 0.5, 0.75])
    outcomes = [Outcome(run, ExitStatus.DONE) for run in runs]
    panels = panels_of(outcomes, [read_result(tmp_path / f"base-{n}") for n in "ab"])
    assert [panel.y_label for panel in panels[:2]] == ["eval/answer_reward", "eval/format_reward"]
    assert panels[0].lines["900 examples"] == [(0, 0.0), (10, 0.5), (20, 0.75)]
    end = panels[2]
    assert end.x_label == "training examples" and end.logarithmic
    assert end.lines["eval/answer_reward"] == [(100.0, 0.25), (900.0, 0.5)]


def test_a_table_survives_what_is_in_its_cells() -> None:
    assert to_markdown_table(["a", "b"], [["x|y", "1"]]).splitlines()[2] == "| x\\|y | 1 |"
