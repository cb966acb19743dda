"""A run leaves its page however it ends, and the page says how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.conftest import TINY, Sft
from tests.unit.test_token_page import Page


def page_of(run: Path) -> dict[str, Any]:
    text = (run / "report.html").read_text(encoding="utf-8")
    (shown,) = json.loads(Page(text).texts["script"][0])["runs"]
    return shown


def test_completed_refused_and_failed(sft: Sft, rows: Path, tmp_path: Path) -> None:
    command = ("train", *TINY, f"data.train_path={rows}", f"data.eval_path={rows}", "run_name=r",
               "data.max_eval_examples=3", "evaluation.generation_steps=2", "evaluation.max_new_tokens=5",
               "trainer.save_steps=2", "data.lint.eval_overlap=off")  # fmt: skip
    run = tmp_path / "outputs/r"
    done = sft(*command, "trainer.max_steps=4")
    assert done.returncode == 0, done.stderr
    assert f"report   {Path('outputs/r/report.html')}  (opens offline)" in done.stdout
    shown = page_of(run)
    assert shown["status"] == json.loads((run / "status.json").read_text())
    assert shown["status"]["state"] == "completed" and shown["total_steps"] == 4
    assert [one["step"] for one in shown["generations"]["evaluations"]] == [0, 2, 4]
    # At each evaluation one response, after its line; at the end three.
    lines = done.stdout.splitlines()
    for place, line in enumerate(lines):
        if line.startswith("evaluation at step"):
            assert [word.split()[0] for word in lines[place + 1 : place + 4]] == [
                "prompt",
                "response",
                "truth",
            ]
    assert sum(line.startswith("  response") for line in lines) == 3 + 3
    before = (run / "report.html").read_bytes()
    refused = sft(*command, "trainer.max_steps=2")
    assert refused.returncode == 78 and (run / "report.html").read_bytes() == before
    again = sft(*command, "trainer.max_steps=4")
    assert again.returncode == 0 and (run / "report.html").read_bytes() == before
    rows.write_text(rows.read_text() + "{\n")
    failed = sft(*command, "trainer.max_steps=6")
    assert failed.returncode == 65
    shown = page_of(run)
    assert shown["status"]["state"] == "failed" and "error[D" in shown["status"]["error"]
    assert shown["last_step"] == 4 and shown["generations"]["rows"]


def test_a_run_that_never_began_leaves_no_page(sft: Sft, rows: Path, tmp_path: Path) -> None:
    rows.write_text("{\n")
    done = sft("train", *TINY, f"data.train_path={rows}", "run_name=r")
    assert done.returncode == 65
    assert not (tmp_path / "outputs/r/report.html").exists()
    shown = sft("report", "r")
    assert shown.returncode == 0 and "nothing was logged yet" in shown.stdout
    assert page_of(tmp_path / "outputs/r")["status"]["exit_code"] == 65
