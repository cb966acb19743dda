"""Whole runs with other optimizers, averages and objectives: stopped, they go on bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TINY, Sft, without_times

COMMON = (
    *TINY, "trainer.num_train_epochs=9", "optimizer.lr_scheduler_type=constant",
    "optimizer.warmup_steps=2", "data.max_eval_examples=6",
)  # fmt: skip
RUNS = {
    "adafactor": ("optimizer=adafactor", "trainer.loss=dft", "trainer.neftune_alpha=5"),
    "muon": ("optimizer=muon", "trainer.ema_decay=0.8", "trainer.label_smoothing=0.1"),
    "schedule_free": (
        "optimizer=schedule_free", "optimizer.learning_rate=1e-3", "optimizer.layer_lr_decay=0.7",
        "trainer.z_loss=1e-3", "trainer.async_save=true",
    ),
}  # fmt: skip
TOLD = {
    "adafactor": ("dft: each token's loss", "noise 5 on embeddings", "Adafactor", "its noise"),
    "muon": ("Muon for hidden matrices", "moving average of the weights, decay 0.8: 0.00 GiB"),
    "schedule_free": ("schedule-free AdamW, rates × 0.7", "z-loss 0.001", "while it is shown"),
}  # fmt: skip


def weights(run: Path) -> bytes:
    return (run / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("adafactor", marks=pytest.mark.slow),
        pytest.param("muon", marks=pytest.mark.slow),
        "schedule_free",
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit_however_often_it_is_evaluated(
    kind: str, sft: Sft, rows: Path, tmp_path: Path
) -> None:
    given = (*COMMON, *RUNS[kind], f"data.train_path={rows}", f"data.eval_path={rows}")
    whole = sft("train", *given, "run_name=whole", "trainer.max_steps=5")
    assert whole.returncode == 0, whole.stderr
    for text in TOLD[kind]:
        assert text in whole.stdout.replace("\n", " "), text
    for steps in (3, 5):
        part = sft(
            "train", *given, "run_name=cut", f"trainer.max_steps={steps}", "trainer.eval_steps=2",
            "trainer.save_steps=2",
        )  # fmt: skip
        assert part.returncode == 0, part.stderr
    one, two = tmp_path / "outputs/whole", tmp_path / "outputs/cut"
    assert weights(one) == weights(two)
    last = "checkpoints/step-000005/optimizer.safetensors"
    assert (one / last).read_bytes() == (two / last).read_bytes()
    rows_of = [
        {row["step"]: row for row in without_times(run / "metrics.jsonl") if "train/loss" in row}
        for run in (one, two)
    ]
    assert all("train/objective" in row for row in rows_of[0].values())
    assert rows_of[0].keys() == rows_of[1].keys() == set(range(1, 6))
    for step, row in rows_of[0].items():
        assert {k: v for k, v in rows_of[1][step].items() if not k.startswith("eval/")} == {
            k: v for k, v in row.items() if not k.startswith("eval/")
        }
    exported, kept = load_file(one / "model/model.safetensors"), load_file(one / last)
    other = {n.split(":")[1]: x for n, x in kept.items() if n.startswith("other_weights:")}
    if kind == "adafactor":
        assert not other
    else:  # what is exported is the average, and what is evaluated
        assert any(not torch.equal(exported[name], x) for name, x in other.items())
    if kind != "muon":
        return
    done = sft(
        "evaluate", f"model.name_or_path={one}/model", f"data.eval_path={rows}", "logger=none",
        "data.max_eval_examples=6", "evaluation.num_prompts=1", "evaluation.max_new_tokens=1",
        "run_name=look",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    looked = json.loads((tmp_path / "outputs/look/evaluation.json").read_text())
    (ended,) = [r["eval/loss"] for r in without_times(one / "metrics.jsonl") if r["step"] == 5 and "eval/loss" in r]  # fmt: skip
    assert looked["eval/loss"] == pytest.approx(ended, rel=1e-6)


@pytest.mark.slow
def test_the_best_steps_average_is_exported_and_checked(
    sft: Sft, rows: Path, tmp_path: Path
) -> None:
    done = sft(
        "train", *COMMON, f"data.train_path={rows}", f"data.eval_path={rows}", "run_name=best",
        "optimizer=schedule_free", "optimizer.learning_rate=1e-3", "trainer.max_steps=4",
        "trainer.eval_steps=2", "trainer.reload_check=true", "trainer.greater_is_better=true",
        "trainer.metric_for_best_model=eval/loss",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / "outputs/best"
    status = json.loads((run / "status.json").read_text())
    assert status["reload_check"].startswith("passed")
    manifest = json.loads((run / "manifest.json").read_text())
    step = manifest["export_step"]
    assert step == 2  # the loss falls, and the greatest was asked for
    saved = load_file(run / f"checkpoints/step-{step:06d}/model.safetensors")
    exported = load_file(run / "model/model.safetensors")
    assert all(torch.equal(saved[name], exported[name]) for name in exported)
