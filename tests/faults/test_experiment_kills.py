"""Expert iteration, killed in every phase: the same command ends with the same rows and weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cs336_alignment import cli
from cs336_alignment.evaluation import kept_responses
from cs336_alignment.experiments import expert_iteration as whole_module
from cs336_alignment.experiments import samples
from cs336_alignment.training.checkpoint_writer import CheckpointWriter
from tests.conftest import TINY, Sft
from tests.faults.injection import KILLED
from tests.faults.tally import Tally

ROWS = 8
QUESTIONS = [f"{i} + {i} = ?" for i in range(ROWS)]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers 7 or 8 whatever is asked, and training data where one of them is right."""
    folder = tmp_path_factory.mktemp("start")
    with (folder / "seen.jsonl").open("w") as seen:
        for i in range(64):
            response = f" So. </think> <answer> {7 + i % 2} </answer>"
            row = {"prompt": f"User: {QUESTIONS[i % ROWS]}", "response": response}
            seen.write(json.dumps(row) + "\n")
    with (folder / "asked.jsonl").open("w") as asked:
        for i, question in enumerate(QUESTIONS):
            row = {"prompt": f"User: {question}", "response": "7", "ground_truth": str(7 + i % 2)}
            asked.write(json.dumps(row) + "\n")
    status = in_child(lambda: cli.run([
        "train", *TINY, f"data.train_path={folder / 'seen.jsonl'}", "trainer.max_steps=60",
        "trainer.num_train_epochs=99", "trainer.global_batch_size=16", "run_name=model",
        "optimizer.learning_rate=0.01", f"output_root={folder}", "trainer.logging_steps=0",
        "data.lint.duplicate_rows=off",
    ]))  # fmt: skip
    assert status == 0
    return folder


def command(start: Path, root: Path, *more: str) -> list[str]:
    return [
        "expert-iteration", *TINY, "model.random_init=false",
        f"model.name_or_path={start / 'model/model'}", f"data.train_path={start / 'asked.jsonl'}",
        f"data.eval_path={start / 'asked.jsonl'}", f"output_root={root}", "run_name=e",
        "expert_iteration.num_questions=6", "evaluation.max_new_tokens=24",
        "evaluation.batch_size=1", "trainer.max_steps=4", "trainer.num_train_epochs=9",
        "trainer.save_steps=2", "optimizer.learning_rate=0.002", "data.lint.eval_overlap=off", *more,
    ]  # fmt: skip


def in_child(work: Callable[[], Any]) -> int:
    """Do work in a process of its own; gives its exit status."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = int(work())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(owner: Any, name: str, call: int, *, after: bool = False) -> None:
    """Let the process die in this call of a function."""
    before, calls = getattr(owner, name), 0

    def dying(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            os._exit(KILLED)
        result = before(*args, **options)
        if calls == call:
            os._exit(KILLED)
        return result

    setattr(owner, name, dying)


def left(folder: Path) -> dict[str, str]:
    """Give the hashes of all rows, samples and weights."""
    wanted = [*folder.glob("iteration-*/*.jsonl"), *folder.rglob("model.safetensors")]
    wanted = [p for p in wanted if p.name != "metrics.jsonl" and "checkpoints" not in p.parts]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(wanted)
    }


PHASES = {
    "in the sampling": lambda: die_at(kept_responses.KeptResponses, "add", 3, after=True),
    "before the samples are written": lambda: die_at(samples, "write_generations", 1),
    "before the rows are written": lambda: die_at(samples, "write_generations", 2),
    "after the rows are written": lambda: die_at(samples, "write_generations", 2, after=True),
    "before the training": lambda: die_at(whole_module, "train", 1),
    "in the training": lambda: die_at(CheckpointWriter, "finish", 1, after=True),
    "after the training": lambda: die_at(whole_module, "train", 1, after=True),
    "in the second sampling": lambda: die_at(kept_responses.KeptResponses, "add", 2),
    "in the second training": lambda: die_at(CheckpointWriter, "begin", 2),
    "before the model is copied": lambda: die_at(whole_module, "copy_whole", 1),
    "before the summary": lambda: die_at(whole_module, "show_summary", 1),
}


@pytest.mark.slow
@pytest.mark.fault("expert iteration killed")
def test_a_kill_in_any_phase_changes_neither_rows_nor_weights(
    start: Path, tmp_path: Path, tally: Tally
) -> None:
    assert in_child(lambda: cli.run(command(start, tmp_path / "whole"))) == 0
    whole = left(tmp_path / "whole/e")
    assert {"iteration-01/rows.jsonl", "iteration-02/model/model.safetensors"} <= set(whole)
    assert whole["model/model.safetensors"] == whole["iteration-02/model/model.safetensors"]
    assert whole["model/model.safetensors"] != whole["iteration-01/model/model.safetensors"]
    for phase, prepare in PHASES.items():  # one folder, killed again and again

        def work(prepare: Callable[[], None] = prepare) -> int:
            prepare()
            return cli.run(command(start, tmp_path / "cut"))

        with tally.point(phase):
            assert in_child(work) == KILLED, f"{phase}: the process did not die there"
    assert in_child(lambda: cli.run(command(start, tmp_path / "cut"))) == 0
    assert left(tmp_path / "cut/e") == whole
    assert not list((tmp_path / "cut/e").glob("*/responses"))
    status = json.loads((tmp_path / "cut/e/status.json").read_text())
    assert (status["state"], status["step"]) == ("completed", 2)


@pytest.mark.slow
def test_what_it_leaves_and_what_it_refuses(
    start: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = lambda *more: in_child(lambda: cli.run(command(start, tmp_path, *more)))  # noqa: E731
    assert run("expert_iteration.iterations=1", "trainer.max_hours=1e-6") == 75
    folder = tmp_path / "e"
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", 0)
    assert run("expert_iteration.iterations=1") == 0
    assert json.loads((folder / "data_ledger.json").read_text())["train"]["examples"] == 8
    rows = [json.loads(line) for line in (folder / "iteration-01/rows.jsonl").open()]
    drawn = [json.loads(line) for line in (folder / "iteration-01/samples.jsonl").open()]
    assert len(drawn) == 24 and all(
        set(row) == {"prompt", "response", "ground_truth"} for row in rows
    )
    assert {(r["prompt"], r["response"]) for r in rows} == {
        (d["prompt"], d["response"]) for d in drawn if d["answer_reward"]
    }
    assert len({(r["prompt"], r["response"]) for r in rows}) == len(rows)
    found = json.loads((folder / "expert_iteration.json").read_text())["iterations"]
    assert [entry["iteration"] for entry in found] == [0, 1]
    counts = found[1]["sampling"]
    assert counts["samples"] == 24 and counts["kept"] == len(rows)
    assert counts["correct"] == counts["kept"] + counts["duplicates"]
    assert counts["correct"] == sum(d["answer_reward"] > 0 for d in drawn)
    assert (
        "eval/response_entropy" in found[0]["metrics"]
        and "eval/answer_reward" in found[1]["metrics"]
    )
    assert (folder / "expert_iteration.png").is_file() and (
        folder / "expert_iteration.md"
    ).is_file()
    assert run("expert_iteration.iterations=1") == 0
    assert "complete: nothing to do" in capfd.readouterr().out
    by = "expert_iteration.metric_for_best_model=eval/loss"
    assert run("expert_iteration.iterations=1", by) == 0
    best = json.loads((folder / "manifest.json").read_text())["best"]
    assert (best["metric"], best["iteration"]) == ("eval/loss", 1)
    for change in ("expert_iteration.temperature=0.5", "optimizer.learning_rate=0.1", "seed=1",
                   "evaluation.max_new_tokens=20"):  # fmt: skip
        assert run(change) == 78
        assert change.split("=")[0] in capfd.readouterr().err
    shutil.copytree(folder, tmp_path / "moved/e")
    assert run(f"output_root={tmp_path / 'moved'}") == 78
    assert "output_root" in capfd.readouterr().err
    assert json.loads((folder / "status.json").read_text())["state"] == "completed"
    assert run("logger.project=other") == 0  # and a second iteration
    assert (folder / "iteration-02/model").is_dir()
    assert run("expert_iteration.iterations=1") == 78


@pytest.mark.slow
def test_nothing_correct_is_an_error_that_says_what_to_try(
    start: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    short = command(start, tmp_path, "evaluation.max_new_tokens=3")
    assert in_child(lambda: cli.run(short)) == 65
    error = capfd.readouterr().err
    assert "error[R310]" in error and "none of 24" in error and "max_new_tokens" in error
    assert in_child(lambda: cli.run(command(start, tmp_path, "expert_iteration.iterations=1"))) == 0
    for words, text in (
        (("model.random_init=true",), "random weights"),
        (("data.eval_path=null", "data.eval_fraction=0.5"), "data.eval_fraction"),
        (("data.columns.ground_truth=",), "ground truth"),
    ):
        status = in_child(lambda words=words: cli.run(command(start, tmp_path / "x", *words)))
        assert status in (65, 78) and text in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_sample_the_same_rows(start: Path, tmp_path: Path, sft: Sft) -> None:
    launcher = (
        "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
        "cs336_alignment.cli",
    )  # fmt: skip
    done = sft(*command(start, tmp_path / "two"), launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert in_child(lambda: cli.run(command(start, tmp_path / "one"))) == 0
    rows = "iteration-01/rows.jsonl"
    assert (tmp_path / "two/e" / rows).read_text() == (tmp_path / "one/e" / rows).read_text()
    assert (tmp_path / "two/e/iteration-02/model/model.safetensors").is_file()
