"""Two real processes, started by the launchers that people use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cs336_alignment.evaluation.loss import evaluate_loss
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.parallel import Processes
from tests.conftest import ROOT, TINY, Sft, build_dataset, build_model, launch, without_times

pytestmark = pytest.mark.distributed
BOUNDS = {"torch.float64": 1e-12, "torch.float32": 1e-5}


def test_every_cut_on_two_processes_gives_the_dense_gradient(
    sft: Sft, tmp_path: Path, processes: Processes, wide_norms: None
) -> None:
    result = tmp_path / "errors.json"
    worker = ROOT / "tests" / "distributed" / "worker_cuts.py"
    done = sft(str(worker), str(result), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(result.read_text())
    assert report["world"] == 2
    cases = report["errors"]
    assert len(cases) == 3 * 2 * 2 * 3 * 12 + 4 * 3 * 3 + 3
    for case, error in cases.items():
        assert error <= next(v for k, v in BOUNDS.items() if k in case), (case, error)
    for case, losses in report["losses"].items():
        name, dtype = case.split()
        policy = Policy(build_model(name, getattr(torch, dtype.removeprefix("torch."))))
        alone = evaluate_loss(
            policy, build_dataset(prefix=17), processes, microbatch_tokens=99, batching="padded",
            stop_ids=range(50), groups=["a", "b"] * 5 + ["b"],
        )  # fmt: skip
        assert len(losses) == 6
        assert losses == pytest.approx(alone, rel=1e-12 if "64" in dtype else 1e-6)


@pytest.mark.slow
def test_leaving_the_process_group_never_waits_for_ever(sft: Sft) -> None:
    worker = ROOT / "tests" / "distributed" / "worker_teardown.py"
    done = sft(str(worker), launcher=launch("torchrun"), env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return without_times(run / "metrics.jsonl")


@pytest.mark.parametrize("kind", [pytest.param("torchrun", marks=pytest.mark.slow), "accelerate"])
def test_launchers_train_the_same_run_as_one_process(
    kind: str, sft: Sft, rows: Path, tmp_path: Path
) -> None:
    overrides = (*TINY, f"data.train_path={rows}", f"data.eval_path={rows}", "trainer.max_steps=6")
    alone = sft("train", *overrides, "run_name=alone")
    assert alone.returncode == 0, alone.stderr
    script = str(ROOT / "scripts" / "train.py")
    both = sft(
        script, *overrides, "run_name=both", "parallel.num_processes=2",
        "evaluation.generation_steps=0", "evaluation.max_new_tokens=4", launcher=launch(kind),
    )  # fmt: skip
    assert both.returncode == 0, both.stderr[-3000:]
    assert both.stdout.count("processes  2 on cpu") == 1
    manifest = json.loads((tmp_path / "outputs/both/manifest.json").read_text())
    assert manifest["num_processes"] == 2
    one = [row for row in metrics_of(tmp_path / "outputs/alone") if "train/loss" in row]
    two = [row for row in metrics_of(tmp_path / "outputs/both") if "train/loss" in row]
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-5)
        assert b["train/grad_norm"] == pytest.approx(a["train/grad_norm"], rel=1e-4)
        assert b["train/num_tokens"] == a["train/num_tokens"]
    texts = tmp_path / "outputs/both/generations/step-000006.jsonl"
    assert len(texts.read_text().splitlines()) == 40


def test_a_wrong_number_of_processes_is_refused(sft: Sft, rows: Path, tmp_path: Path) -> None:
    done = sft("train", *TINY, f"data.train_path={rows}", "parallel.num_processes=2", "run_name=x")
    assert done.returncode == 78
    assert "error[C205]" in done.stderr and "torchrun" in done.stderr
    assert json.loads((tmp_path / "outputs/x/status.json").read_text())["exit_code"] == 78


def test_two_processes_stop_together_and_go_on_bit_for_bit(
    sft: Sft, rows: Path, tmp_path: Path
) -> None:
    overrides = (*TINY, f"data.train_path={rows}", "trainer.max_steps=8")
    whole = sft("train", *overrides, "run_name=whole", processes=2)
    assert whole.returncode == 0, whole.stderr[-3000:]
    # about 0.02 seconds: at least one step, and far from eight
    stopped = sft("train", *overrides, "run_name=cut", "trainer.max_hours=0.000001", processes=2)
    status = json.loads((tmp_path / "outputs/cut/status.json").read_text())
    assert stopped.returncode != 0
    assert (status["state"], status["exit_code"]) == ("preempted", 75), stopped.stderr[-2000:]
    assert 0 < status["step"] < 8
    again = sft("train", *overrides, "run_name=cut", processes=2)
    assert again.returncode == 0, again.stderr[-3000:]
    assert metrics_of(tmp_path / "outputs/cut") == metrics_of(tmp_path / "outputs/whole")
    weights = "model/model.safetensors"
    assert (tmp_path / "outputs/cut" / weights).read_bytes() == (
        tmp_path / "outputs/whole" / weights
    ).read_bytes()
