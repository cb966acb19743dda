"""Runs that keep and export their best step, and runs that end when no better one comes."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TINY, Sft, without_times


@pytest.fixture
def command(rows: Path) -> list[str]:
    """The loss only falls, so with `greater` the best step is the first one evaluated."""
    return [
        "train", *TINY, f"data.train_path={rows}", f"data.eval_path={rows}", "run_name=r",
        "optimizer.learning_rate=1e-3", "trainer.eval_steps=3", "trainer.num_train_epochs=99",
        "trainer.metric_for_best_model=eval/loss", "trainer.greater_is_better=true",
    ]  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in run.glob("checkpoints/step-*"))


@pytest.mark.parametrize("asynchronous", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_the_best_step_is_kept_exported_and_loaded_again(
    asynchronous: str, command: list[str], sft: Sft, tmp_path: Path
) -> None:
    mine = [*command, "trainer.max_steps=12", "trainer.save_steps=4", "trainer.save_total_limit=1",
            f"trainer.async_save={asynchronous}", "trainer.reload_check=true"]  # fmt: skip
    done = sft(*mine)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "outputs/r"
    assert checkpoints(run) == [3, 12]
    index = {"latest": "step-000012", "best": "step-000003"}
    assert read(run / "checkpoints/index.json") == index
    weights = load_file(run / "model/model.safetensors")
    saved = load_file(run / "checkpoints/step-000003/model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in weights.items())
    found = {
        r["step"]: r["eval/loss"] for r in without_times(run / "metrics.jsonl") if "eval/loss" in r
    }
    manifest = read(run / "manifest.json")
    assert manifest["export_step"] == 3 and not manifest["stopped_early"]
    best = {"metric": "eval/loss", "greater_is_better": True, "step": 3, "value": found[3]}
    assert manifest["best"] == best
    assert max(v for step, v in found.items() if step) == found[3] != found[12]
    card = (run / "model/README.md").read_text()
    assert f"| steps | 3 (the best eval/loss: {found[3]:.4f}) |" in card
    assert f"| eval/loss | {found[0]:.4f} | {found[3]:.4f} |" in card
    for text in ("exporting step 3 of 12", "Held-out data, exported step 3", "reload check passed"):
        assert text in done.stdout
    assert "evaluation took" in done.stdout and "% of the run" in done.stdout
    status = read(run / "status.json")
    assert (status["state"], status["reload_check"]) == ("completed", "passed")
    shares = [
        r
        for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "eval/loss" in r
    ]
    assert all(0 < row["perf/evaluation_share"] < 1 for row in shares)
    assert all(row["perf/evaluation_seconds"] > 0 for row in shares)

    assert "nothing to do" in sft(*mine).stdout
    least = sft(*mine, "trainer.greater_is_better=false", "trainer.reload_check=false")
    assert least.returncode == 0 and "greater_is_better is false now" in least.stderr
    assert read(run / "manifest.json")["export_step"] == min(
        (step for step in found if step), key=lambda step: found[step]
    )
    other = sft(
        *mine, "trainer.greater_is_better=null", "trainer.metric_for_best_model=eval/token_entropy"
    )
    assert other.returncode == 0 and "was eval/loss and is eval/token_entropy" in other.stderr
    assert read(run / "manifest.json")["best"]["metric"] == "eval/token_entropy"


@pytest.mark.slow
def test_a_best_checkpoint_that_was_damaged_is_told(
    command: list[str], sft: Sft, tmp_path: Path
) -> None:
    mine = [*command, "trainer.max_steps=12", "trainer.save_steps=3", "trainer.save_total_limit=9"]
    assert sft(*mine).returncode == 0
    run = tmp_path / "outputs/r"
    (run / "checkpoints/step-000003/model.safetensors").write_bytes(b"x")
    (run / "model/model.safetensors").unlink()
    again = sft(*mine)
    assert again.returncode == 0
    assert "step-000003 has the best eval/loss and is damaged" in again.stderr
    assert read(run / "manifest.json")["export_step"] == 6
    (run / "model/model.safetensors").unlink()
    for path in (run / "checkpoints/step-000003").iterdir():
        path.unlink()
    (run / "checkpoints/step-000003").rmdir()
    gone = sft(*mine)
    assert gone.returncode == 0 and "step 3 has the best eval/loss" in gone.stderr
    assert "its checkpoint is gone" in gone.stderr
    assert read(run / "checkpoints/index.json")["best"] == "step-000006"


def test_an_early_end_is_a_whole_run_and_more_patience_continues_it(
    command: list[str], sft: Sft, tmp_path: Path
) -> None:
    mine = [*command, "trainer.max_steps=40", "evaluation.generation_steps=0",
            "evaluation.max_new_tokens=4", "evaluation.num_prompts=2"]  # fmt: skip
    done = sft(*mine, "trainer.early_stopping_patience=2")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "outputs/r"
    assert (
        "stopped early at step 6 of 40: 2 evaluation(s) without a better eval/loss" in done.stdout
    )
    status, manifest = read(run / "status.json"), read(run / "manifest.json")
    assert (status["state"], status["step"], status["exit_code"]) == ("completed", 6, 0)
    assert manifest["stopped_early"] and manifest["export_step"] == 3
    assert [path.name for path in sorted((run / "generations").iterdir())] == [
        "step-000000.jsonl", "step-000006.jsonl",
    ]  # fmt: skip
    assert "nothing to do" in sft(*mine, "trainer.early_stopping_patience=2").stdout
    more = sft(*mine, "trainer.early_stopping_patience=3")
    assert more.returncode == 0, more.stderr
    assert "stopped early at step 9 of 40" in more.stdout
    steps = [r["step"] for r in without_times(run / "metrics.jsonl") if "eval/loss" in r]
    assert steps == [0, 3, 6, 9]
    longer = [*mine, "trainer.max_steps=41", "trainer.early_stopping_patience=3"]
    again = sft(*longer)
    assert "stopped early at step 18 of 41" in again.stdout, again.stdout + again.stderr
    assert "nothing to do" in sft(*longer).stdout


@pytest.mark.slow
def test_a_run_that_is_stopped_ends_early_at_the_same_step(
    command: list[str], sft: Sft, tmp_path: Path, zygote: Any
) -> None:
    mine = [*command, "trainer.max_steps=40", "trainer.early_stopping_patience=4",
            "trainer.save_steps=2"]  # fmt: skip
    assert sft(*mine).returncode == 0
    run = tmp_path / "outputs/cut"
    for step in (2, 5, 8, 11):
        process_id = zygote.start([*mine, "run_name=cut"], tmp_path, tmp_path)
        until = time.monotonic() + 60
        path = run / "metrics.jsonl"
        while not path.is_file() or f'"step": {step}, ' not in path.read_text():
            assert time.monotonic() < until
            time.sleep(0.001)
        os.kill(process_id, signal.SIGKILL)
        zygote.wait(process_id)
    assert sft(*mine, "run_name=cut").returncode == 0
    whole = tmp_path / "outputs/r"
    for name in ("model/model.safetensors", "checkpoints/index.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert without_times(run / "metrics.jsonl") == without_times(whole / "metrics.jsonl")
    assert checkpoints(run) == checkpoints(whole)


@pytest.mark.slow
@pytest.mark.fault("T2 a kill or a request to stop while the export is loaded")
@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow), (signal.SIGTERM, 75)],
)
def test_an_end_during_the_reload_check_costs_the_check_alone(
    number: signal.Signals, code: int, command: list[str], sft: Sft, tmp_path: Path, zygote: Any
) -> None:
    mine = [*command, "trainer.max_steps=6", "trainer.reload_check=true"]
    process_id = zygote.start(mine, tmp_path, tmp_path)
    until = time.monotonic() + 60
    printed = tmp_path / "stdout"
    while not printed.is_file() or "in a fresh process" not in printed.read_text():
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(process_id, number)
    assert zygote.wait(process_id) == code
    run = tmp_path / "outputs/r"
    status = read(run / "status.json")
    assert (status["state"], status["reload_check"]) == (
        "running" if number == signal.SIGKILL else "preempted", None,
    )  # fmt: skip
    metrics = (run / "metrics.jsonl").read_bytes()
    again = sft(*mine)
    assert again.returncode == 0 and "reload check passed" in again.stdout, again.stderr
    assert "loss" not in "".join(li for li in again.stdout.splitlines() if li.startswith("step"))
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert read(run / "status.json")["reload_check"] == "passed"


@pytest.mark.fault("T7 an export that is not what was trained")
def test_a_failed_reload_check_fails_the_run_and_keeps_its_weights(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The export is damaged just before it is looked at."""
    from cs336_alignment import cli
    from cs336_alignment.training import finish

    def damaged(folder: Path, *args: Any, **options: Any) -> Any:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"].zero_()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return look(folder, *args, **options)

    look = finish.check_export
    monkeypatch.setattr(finish, "check_export", damaged)
    monkeypatch.chdir(tmp_path)
    mine = [*command, "trainer.max_steps=6", "trainer.reload_check=true"]
    assert cli.run(mine) == 70
    error = capsys.readouterr().err
    assert "error[R305]" in error and "model.norm.weight" in error
    run = tmp_path / "outputs/r"
    status = read(run / "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 70)
    assert status["reload_check"].startswith(
        "failed: other weights than the trained ones in model."
    )
    assert checkpoints(run) == [3, 6]


def test_a_metric_that_never_comes_ends_the_run_at_its_first_evaluation(
    command: list[str], sft: Sft
) -> None:
    done = sft(*command, "trainer.metric_for_best_model=eval/loss/gsm8k", "trainer.max_steps=4")
    assert done.returncode == 78 and "error[C132]" in done.stderr
    assert "eval/loss, eval/loss_first_token" in done.stderr and "step 1/4" not in done.stdout


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_agree_on_the_best_step(command: list[str], sft: Sft, tmp_path: Path) -> None:
    mine = [*command, "trainer.max_steps=40", "trainer.early_stopping_patience=3",
            "trainer.reload_check=true"]  # fmt: skip
    done = sft(*mine, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "outputs/r"
    manifest, status = read(run / "manifest.json"), read(run / "status.json")
    assert manifest["stopped_early"] and manifest["export_step"] == 3
    assert (status["step"], status["reload_check"]) == (9, "passed")
    assert checkpoints(run) == [3, 9]
