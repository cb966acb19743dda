"""Rewards in the commands that use them: MMLU by subject, a user's function that fails, hangs, dies."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, Sft
from tests.zygote import Zygote

MODEL = ("model.name_or_path=builtin:arithmetic", "model.random_init=true")
SHORT = ("evaluation.max_new_tokens=4",)
MINE = ("evaluation.reward=mine:score", "evaluation.allow_custom_reward=true")
FUNCTION = """
import os, time

def score(response, ground_truth):
    if ground_truth in {bad!r}:
        {how}
    good = float(ground_truth == "3")
    return {{"reward": good, "format_reward": 1.0, "answer_reward": good, "letters": len(response)}}
"""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Six rows whose ground truths are 0 to 5."""
    rows = [
        {"question": f"{n} + 0 = ?", "answer": f"Nothing is added.\n#### {n}"} for n in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "data.eval_path=rows.jsonl"


def write_function(folder: Path, how: str, bad: str = "24") -> None:
    (folder / "mine.py").write_text(FUNCTION.format(bad=bad, how=how))


def is_gone(process: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_mmlu_by_subject(sft: Sft, tmp_path: Path) -> None:
    folder = tmp_path / "mmlu"
    folder.mkdir()
    for subject, letters in (("anatomy", "AB"), ("physics", "CDC")):
        rows = [f'"What is it, {n}?",w,x,y,z,{letter}\n' for n, letter in enumerate(letters)]
        (folder / f"{subject}_test.csv").write_text("".join(rows))
    options = (*MODEL, *SHORT, "data.eval_path=mmlu/*.csv")
    done = sft("evaluate", *options, "evaluation.reward=multiple_choice", "run_name=mmlu")
    assert done.returncode == 0, done.stderr
    assert "without a header" in done.stdout and "multiple_choice (" in done.stdout
    assert "multiple_choice reads" not in done.stderr
    report = json.loads((tmp_path / "outputs/mmlu/evaluation.json").read_text())
    groups = report["groups"]["subject"]
    assert {name: group["num_prompts"] for name, group in groups.items()} == {
        "anatomy": 2,
        "physics": 3,
    }
    rows = lines(tmp_path / "outputs/mmlu/generations.jsonl")
    assert [row["ground_truth"] for row in rows] == [*"ABCDC"]
    assert "What is it, 0?\nA. w\nB. x\nC. y\nD. z\n" in rows[0]["prompt"]
    assert "## Reward by subject" in (tmp_path / "outputs/mmlu/evaluation.md").read_text()

    done = sft("evaluate", *options, "run_name=other", "data.prompt_template=question_only")
    assert done.returncode == 0, done.stderr
    assert "evaluation.reward=multiple_choice" in done.stderr
    assert "the prompt template question_only does not ask for it" in done.stderr

    (folder / "physics_test.csv").write_text(
        "question,A,B,answer\nWhat is it?,x,y,B\nWhat is it?,x,y,C\n"
    )
    done = sft("evaluate", *options, "evaluation.reward=multiple_choice", "run_name=bad")
    assert done.returncode == 65
    assert 'physics_test.csv:3, field "answer"' in done.stderr and "error[D216]" in done.stderr
    done = sft("prepare", MODEL[0], "data.train_path=mmlu/physics_test.csv", "data.on_bad_row=drop",
               "data.max_bad_fraction=1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "physics_test.csv:3" in done.stdout and "D216" in done.stdout


def test_failures_are_told_once_and_count_as_zero(sft: Sft, tmp_path: Path, data: str) -> None:
    write_function(tmp_path, "raise KeyError(ground_truth)")
    done = sft("evaluate", *MODEL, *SHORT, *MINE, data, "run_name=some")
    assert done.returncode == 0, done.stderr
    assert f"mine:score of {tmp_path / 'mine.py'}, in a process of its own" in done.stdout
    told = [line for line in done.stderr.splitlines() if "the reward failed" in line]
    assert len(told) == 1 and "2 of 6" in told[0] and "prompt 3: it raised KeyError: '2'" in told[0]
    rows = lines(tmp_path / "outputs/some/generations.jsonl")
    assert [row["reward"] for row in rows] == [0, 0, 0, 1, 0, 0]
    assert ["reward_error" in row for row in rows] == [False, False, True, False, True, False]
    assert rows[3]["letters"] == len(rows[3]["response"]) and rows[2]["format_reward"] == 0
    report = json.loads((tmp_path / "outputs/some/evaluation.json").read_text())
    assert report["eval/reward_errors"] == 2 and report["eval/reward"] == pytest.approx(1 / 6)


def test_if_all_fail_nothing_is_reported_and_no_response_lost(
    sft: Sft, tmp_path: Path, data: str
) -> None:
    write_function(tmp_path, "os._exit(9)", bad="012345")
    command = ("evaluate", *MODEL, *SHORT, *MINE, data, "run_name=all")
    done = sft(*command)
    assert done.returncode == 70 and "error[R320]" in done.stderr
    assert "prompt 1: its process ended with status 9" in done.stderr
    assert not (tmp_path / "outputs/all/evaluation.json").exists()
    write_function(tmp_path, "pass", bad="")
    done = sft(*command)
    assert done.returncode == 0, done.stderr
    assert "going on: 6 responses" in done.stdout
    assert "eval/reward_errors" not in (tmp_path / "outputs/all/evaluation.json").read_text()


def test_code_runs_only_if_it_is_allowed(sft: Sft, tmp_path: Path, data: str) -> None:
    (tmp_path / "mine.py").write_text("open('ran', 'w')\ndef score(response, truth): pass\n")
    done = sft("evaluate", *MODEL, *SHORT, MINE[0], data)
    assert done.returncode == 78 and "evaluation.allow_custom_reward=true" in done.stderr
    assert not (tmp_path / "ran").exists()
    wrong = "evaluation.reward=mine:scor"
    for command in (("evaluate", *MODEL), ("train", *TINY, "data.train_path=rows.jsonl",
                                           "evaluation.generation_steps=0")):  # fmt: skip
        done = sft(*command, *SHORT, wrong, MINE[1], data, "run_name=wrong")
        assert done.returncode == 78 and "error[C142]" in done.stderr, done.stderr
        assert "loading" not in done.stdout and "reading" not in done.stdout


def test_a_run_that_is_stopped_or_killed_takes_the_function_with_it(
    zygote: Zygote, tmp_path: Path, data: str
) -> None:
    hang = "open('pid', 'w').write(str(os.getpid())); sum(iter(int, 1))"
    write_function(tmp_path, hang)
    command = ["evaluate", *MODEL, *SHORT, *MINE, data, "evaluation.reward_seconds=600"]
    for number, status in ((signal.SIGTERM, 75), (signal.SIGKILL, -9)):
        (tmp_path / "pid").unlink(missing_ok=True)
        process = zygote.start(command, tmp_path, tmp_path)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
                break
            time.sleep(0.02)
        child = int((tmp_path / "pid").read_text())
        os.kill(process, number)
        assert zygote.wait(process) == status
        assert is_gone(child)


def test_while_training(sft: Sft, tmp_path: Path, data: str) -> None:
    write_function(tmp_path, "return 1")
    done = sft("train", *TINY, *SHORT, *MINE, data, "data.train_path=rows.jsonl", "trainer.max_steps=1",
               "evaluation.generation_steps=0", "data.lint.eval_overlap=off", "run_name=run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [row for row in lines(tmp_path / "outputs/run/metrics.jsonl") if "eval/reward" in row]
    assert [row["eval/reward_errors"] for row in found] == [2, 2]
    assert done.stderr.count("the reward failed on 2 of 6") == 2


@pytest.mark.distributed
def test_several_processes_each_have_their_own(sft: Sft, tmp_path: Path, data: str) -> None:
    write_function(tmp_path, "sum(iter(int, 1))")
    options = (*MODEL, *SHORT, *MINE, data, "evaluation.reward_seconds=0.5")
    done = sft("evaluate", *options, "run_name=two", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the reward failed on 2 of 6") == 1
    assert sft("evaluate", *options, "run_name=one").returncode == 0
    one, two = (lines(tmp_path / "outputs" / name / "generations.jsonl") for name in ("one", "two"))
    assert "took longer than 0.5 seconds" in two[4]["reward_error"]
    for row in (*one, *two):
        del row["token_entropy"]  # its last digits depend on who shares a batch
    assert one == two
