"""FSDP2 on two real processes: the same numbers as one, and checkpoints that any number continues."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cs336_alignment.evaluation.loss import evaluate_loss
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.parallel import Processes
from tests.conftest import (
    ROOT,
    TINY,
    Sft,
    build_dataset,
    build_model,
    without_times,
)
from tests.distributed.worker_fsdp2 import many_steps
from tests.unit.test_lora import adapted
from tests.zygote import Zygote, metrics_hold, when

pytestmark = pytest.mark.distributed
BOUNDS = {"torch.float64": (1e-12, 1e-8, 1e-6), "torch.float32": (1e-5, 1e-5, 1e-3)}
SHARDED = ("parallel=fsdp2",)
Train = Callable[[tuple[str, ...], int], str]


def bounds_of(case: str) -> tuple[float, float, float]:
    return next(bounds for name, bounds in BOUNDS.items() if name in case)


def dtype_of(case: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, case.split()[0].removeprefix("torch."))
    return dtype


def compare_steps(steps: list[list[float]], alone: list[tuple[float, float]], case: str) -> None:
    _, of_losses, of_norms = bounds_of(case)
    assert len(steps) == len(alone) == 50
    assert steps[44][0] < steps[0][0]  # of the same examples
    for (loss, norm), (one_loss, one_norm) in zip(steps, alone, strict=True):
        assert loss == pytest.approx(one_loss, rel=of_losses), case
        assert norm == pytest.approx(one_norm, rel=of_norms), case


@pytest.mark.parametrize(
    "thorough", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["quick", "thorough"]
)
def test_sharded_steps_are_those_of_one_process(
    thorough: bool, sft: Sft, tmp_path: Path, processes: Processes, wide_norms: None
) -> None:
    result = tmp_path / "report.json"
    worker = ROOT / "tests" / "distributed" / "worker_fsdp2.py"
    done = sft(str(worker), str(result), *["thorough"][: int(thorough)], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(result.read_text())
    assert report["world"] == 2
    assert report["gathers"] == 3  # one a microbatch
    steps, kinds = (3, 3) if thorough else (2, 1)
    assert len(report["errors"]) == (2 * (3 + 1 + 1) + 4) * steps * 3 + 6 * kinds * 3
    for case, error in report["errors"].items():
        assert error <= bounds_of(case)[0], (case, error)
    assert (len(report["steps"]), len(report["adapter steps"])) == (2, 2 if thorough else 1)
    for case, steps in report["adapter steps"].items():
        policy = Policy(adapted("llama", dtype_of(case)))
        compare_steps(steps, many_steps(policy.train(), processes), case)
    for case, steps in report["steps"].items():
        policy = Policy(build_model("llama", dtype_of(case)))
        compare_steps(steps, many_steps(policy.train(), processes), case)
        assert steps[-1][0] < 0.7 * steps[0][0]
        for batching, losses in report["losses"][case].items():
            one = evaluate_loss(
                policy, build_dataset(prefix=17), processes, microbatch_tokens=70,
                batching=batching, stop_ids=range(50), groups=["a", "b"] * 5 + ["b"],
            )  # fmt: skip
            assert losses == pytest.approx(one, rel=bounds_of(case)[1]), (case, batching)
    counts = report["local"]
    assert 0.4 * counts["parameters"] < counts["local_parameters"] < 0.6 * counts["parameters"]
    assert report["checkpoints"].pop("files") == [
        f"{kind}-0000{i}-of-00002.safetensors" for kind in ("model", "optimizer") for i in (1, 2)
    ]
    assert report["checkpoints"] == {"same": True, "read by torch": True}
    assert report["narrow adapters"] < 0.05
    assert report["narrow"] < 0.05 and report["dtypes"] == ["torch.float32"]


@pytest.fixture
def train(sft: Sft) -> Train:
    """Train in so many processes; gives what they printed."""

    def run(overrides: tuple[str, ...], count: int) -> str:
        done = sft("train", *overrides, processes=count)
        assert done.returncode == 0, done.stderr[-3000:]
        return str(done.stdout + done.stderr)

    return run


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def weights(run: Path) -> bytes:
    return (run / "model/model.safetensors").read_bytes()


@pytest.fixture(params=[pytest.param("whole", marks=pytest.mark.slow), "lora"])
def overrides(request: pytest.FixtureRequest, base: Path, rows: Path) -> tuple[str, ...]:
    """A run that trains all weights, drawn ones, or adapters in a model folder."""
    adapters = (
        f"model.name_or_path={base}", "model.random_init=false", "lora.r=4",
        "optimizer.learning_rate=1e-2",
    )  # fmt: skip
    return (
        *TINY, *(adapters if request.param == "lora" else ()), f"data.train_path={rows}", f"data.eval_path={rows}", "trainer.max_steps=8",
        "trainer.microbatch_tokens=60", "trainer.eval_steps=4", "trainer.reload_check=true",
        "optimizer.lr_scheduler_type=constant", "optimizer.warmup_ratio=0",  # of any length
    )  # fmt: skip


def test_a_sharded_run_is_the_run_of_one_process(
    overrides: tuple[str, ...], sft: Sft, train: Train, tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    generating = ("evaluation.generation_steps=0", "evaluation.max_new_tokens=4")
    assert sft("train", *overrides, *generating, "run_name=alone").returncode == 0
    adapters = "lora.r=4" in overrides
    offload = f"parallel.cpu_offload={str(adapters).lower()}"
    said = train((*overrides, *generating, *SHARDED, offload, "run_name=whole"), 2)
    assert ("parameters a process, in the machine's memory;" in said) == adapters
    assert ("each process reads its own rows" if adapters else "main process loads") in said
    assert "each process holds the whole model" in said
    manifest, status = read(outputs / "whole/manifest.json"), read(outputs / "whole/status.json")
    assert manifest["parallel"] == "fsdp2" and manifest["num_processes"] == 2
    assert manifest["local_parameters"] == pytest.approx(manifest["parameters"] / 2, rel=0.02)
    assert status["reload_check"] == (
        "passed" if adapters else "passed: every bit of its weights; log-probs were not compared"
    )
    one, two = (without_times(outputs / name / "metrics.jsonl") for name in ("alone", "whole"))
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)
    texts = [outputs / name / "generations/step-000000.jsonl" for name in ("alone", "whole")]
    assert [json.loads(line)["response"] for line in texts[0].read_text().splitlines()] == [
        json.loads(line)["response"] for line in texts[1].read_text().splitlines()
    ]
    AutoModelForCausalLM.from_pretrained(outputs / "whole/model")


def test_a_sharded_run_goes_on_with_an_adapter(
    base: Path, rows: Path, sft: Sft, train: Train, tmp_path: Path
) -> None:
    common = (
        *TINY, f"model.name_or_path={base}", "model.random_init=false", "lora.export=adapter",
        f"data.train_path={rows}", "trainer.max_steps=1",
    )  # fmt: skip
    whole = "lora.modules_to_save=[lm_head]"
    first = ("lora.r=2", whole, "optimizer.learning_rate=1e-2", "run_name=first")
    assert sft("train", *common, *first).returncode == 0
    before = tmp_path / "outputs/first/adapter"
    more = ("optimizer.learning_rate=0", "trainer.reload_check=true", "run_name=more")
    train((*common, *SHARDED, *more, f"lora.adapter_path={before}"), 2)
    one, two = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (before, tmp_path / "outputs/more/adapter")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    status = read(tmp_path / "outputs/more/status.json")
    assert status["reload_check"].startswith("passed: every bit")
    assert not (tmp_path / "outputs/more/model").exists()
    dora = json.loads((before / "adapter_config.json").read_text()) | {"use_dora": True}
    (before / "adapter_config.json").write_text(json.dumps(dora))
    magnitudes = {
        name.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(len(tensor))
        for name, tensor in one.items() if name.endswith("lora_B.weight")
    }  # fmt: skip
    save_file({**one, **magnitudes}, before / "adapter_model.safetensors")
    words = (*common, *SHARDED, f"lora.adapter_path={before}", "run_name=dora")
    refused = sft("train", *words, processes=2)
    assert refused.returncode == 78 and "lora.dora and parallel.strategy" in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_weights_are_read_row_by_row_and_any_number_of_processes_goes_on(
    overrides: tuple[str, ...], rows: Path, sft: Sft, train: Train, tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    assert sft("train", *overrides, "run_name=base").returncode == 0
    overrides = (
        *overrides, f"model.name_or_path={outputs / 'base/model'}", "model.random_init=false",
        "trainer.save_steps=2", "trainer.save_total_limit=9", "trainer.async_save=true",
    )  # fmt: skip
    whole = (*overrides, "run_name=whole", "trainer.max_steps=6")
    assert sft("train", *whole).returncode == 0
    said = train((*overrides, *SHARDED, "trainer.max_steps=2", "run_name=r"), 2)
    assert "each process reads its own rows" in said
    last = outputs / "r/checkpoints/step-000002"
    assert (last / "sharded/model-00002-of-00002.safetensors").is_file()
    assert not (last / "model.safetensors").exists()
    refused = sft("evaluate", f"model.name_or_path={last}", f"data.eval_path={rows}", "logger=none")
    assert refused.returncode == 66 and "a checkpoint in parts" in refused.stderr
    assert "`cs336-sft export" in refused.stderr
    for form in ("hf", "adapter")[: 1 + ("lora.r=4" in overrides)]:
        done = sft("export", "r", "export.checkpoint=2", f"export.format={form}")
        assert done.returncode == 0 and "reload check passed" in done.stdout, done.stderr
    exported = load_file(outputs / "r/exports/step-000002-fp32/model.safetensors")
    kept = load_file(outputs / "r/model/model.safetensors")  # of the same step
    assert all(torch.equal(exported[name], kept[name]) for name in kept)
    train((*overrides, *SHARDED, "trainer.max_steps=3", "run_name=r"), 1)
    train((*overrides, *SHARDED, "trainer.max_steps=4", "run_name=r"), 4)
    train((*overrides, "parallel=ddp", "trainer.max_steps=5", "run_name=r"), 2)
    said = train((*overrides, *SHARDED, "trainer.max_steps=6", "run_name=r"), 2)
    assert "parallel was ddp and is fsdp2" in said
    two, one = (
        [row for row in without_times(outputs / name / "metrics.jsonl") if "train/loss" in row]
        for name in ("r", "whole")
    )
    assert len(one) == len(two) == 6
    for a, b in zip(two, one, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_layers_are_sharded_too(
    overrides: tuple[str, ...], sft: Sft, train: Train, tmp_path: Path
) -> None:
    overrides = (*overrides, "trainer.max_steps=3", "trainer.gradient_checkpointing=true")
    assert sft("train", *overrides, "run_name=alone").returncode == 0
    train((*overrides, *SHARDED, "trainer.compile=true", "run_name=both"), 2)
    one, two = (
        [row for row in without_times(tmp_path / "outputs" / name / "metrics.jsonl") if row["step"]]
        for name in ("alone", "both")
    )
    assert len(one) == len(two) == 4  # an evaluation at the end
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_sharded_run_that_is_ended_goes_on_bit_for_bit(
    sign: signal.Signals,
    asynchronous: str,
    overrides: tuple[str, ...],
    train: Train,
    zygote: Zygote,
    tmp_path: Path,
) -> None:
    outputs = tmp_path / "outputs"
    overrides = (
        *overrides, *SHARDED, "trainer.max_steps=16", "trainer.num_train_epochs=99",
        "trainer.save_steps=3", f"trainer.async_save={asynchronous}",
        "trainer.metric_for_best_model=eval/loss",
    )  # fmt: skip
    train((*overrides, "run_name=whole"), 2)
    run = outputs / "cut"
    for step in (5, 11):
        started = zygote.start_all(["train", *overrides, "run_name=cut"], tmp_path, tmp_path, 2)
        assert all(when(metrics_hold(run, step), process_id) for process_id in started)
        os.kill(started[-1], sign)  # one of two: the other must not wait for ever
        assert all(zygote.wait(process_id) for process_id in started)
    train((*overrides, "run_name=cut"), 2)
    assert without_times(run / "metrics.jsonl") == without_times(outputs / "whole/metrics.jsonl")
    assert weights(run) == weights(outputs / "whole")
    names = [
        sorted(p.name for p in (outputs / n / "checkpoints").iterdir()) for n in ("cut", "whole")
    ]
    assert names[0] == names[1]
