"""Multiruns and sweeps as a user starts them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.conftest import TINY, Sft
from tests.zygote import Zygote, when


@pytest.mark.slow
def test_a_multirun_is_compared_and_the_same_command_does_nothing_again(
    sft: Sft, rows: Path, tmp_path: Path
) -> None:
    command = (
        "train", "-m", *TINY, f"data.train_path={rows},{tmp_path / 'none.jsonl'}",
        f"data.eval_path={rows}", "data.max_eval_examples=4", "data.lint.eval_overlap=off",
        "trainer.max_steps=2", "run_name=many", "data.max_train_examples=8,null",
        "evaluation.generation_steps=0", "evaluation.max_new_tokens=4",
    )  # fmt: skip
    done = sft(*command)
    assert done.returncode == 66, done.stderr
    assert done.stderr.count("error[") >= 2 and "none.jsonl" in done.stderr
    table = json.loads((tmp_path / "outputs/many/runs.json").read_text())
    assert table["swept"] == ["data.train_path", "data.max_train_examples"]
    assert [run["exit_code"] for run in table["runs"]] == [0, 0, 66, 66]
    assert [run["examples"] for run in table["runs"]] == [8, 40, None, None]
    assert all("eval/answer_reward" in run["metrics"] for run in table["runs"][:2])
    assert (tmp_path / "outputs/many/curves.png").is_file()
    weights = Path(table["runs"][0]["folder"]) / "model/model.safetensors"
    before = (tmp_path / weights).stat().st_mtime_ns
    again = sft(*command)
    assert again.stdout.count("nothing to do") == 2 and again.returncode == 66
    assert (tmp_path / weights).stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_that_is_killed_goes_on_with_its_trial(
    sft: Sft, zygote: Zygote, rows: Path, tmp_path: Path
) -> None:
    command = [
        "sweep", *TINY, f"data.train_path={rows}", f"data.eval_path={rows}", "trainer.max_steps=40",
        "data.lint.eval_overlap=off", "run_name=s", "sweep.num_trials=2", "trainer.save_steps=2",
        "trainer.num_train_epochs=99", "sweep.prune=false",
        "sweep.space={optimizer.learning_rate: {low: 1e-4, high: 1e-2, log: true}}",
    ]  # fmt: skip
    whole = sft(*command, "output_root=whole")
    assert whole.returncode == 0, whole.stderr
    process_id = zygote.start([*command, "output_root=cut"], tmp_path, tmp_path)
    trial = tmp_path / "cut/s/trial-001"
    assert when(lambda: bool(list(trial.glob("checkpoints/step-*"))), process_id)
    os.kill(process_id, signal.SIGKILL)
    assert zygote.wait(process_id) == -signal.SIGKILL
    again = sft(*command, "output_root=cut")
    assert again.returncode == 0, again.stderr
    found = [
        json.loads((tmp_path / root / "s/sweep.json").read_text()) for root in ("cut", "whole")
    ]
    assert found[0]["trials"] == found[1]["trials"]
    for number in range(2):
        weights = f"s/trial-{number:03d}/model/model.safetensors"
        assert (tmp_path / "cut" / weights).read_bytes() == (
            tmp_path / "whole" / weights
        ).read_bytes()
