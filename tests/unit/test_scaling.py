"""The cost model of scripts/scaling.py, by hand, against what others measured, and beside its page."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "scripts/scaling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("SmolLM2-135M", 134_515_008), ("Qwen2.5-0.5B", 494_032_768), ("Qwen2.5-7B", 7_615_616_512),
     ("Llama-3.1-8B", 8_030_261_248), ("Llama-3-70B", 70_553_706_496), ("Qwen3-4B", 4_022_468_096)],
)  # fmt: skip
def test_shapes_have_the_parameters_of_the_models(
    scaling: ModuleType, name: str, parameters: int
) -> None:
    assert scaling.MODELS[name].parameters == pytest.approx(parameters, rel=1e-3)


def test_flops_by_hand(scaling: ModuleType) -> None:
    model = scaling.Model(1, hidden=2, inner=3, heads=1, kv_heads=1, head_dim=2, vocabulary=5)
    assert model.layer == 2 * 2 + 2 * 2 + 2 * 2 + 2 * 2 + 3 * 2 * 3 == 34 and model.head == 10
    run = scaling.Run(length=8, response=0.5)
    # forward: products 2 · 34, scores and their use 2 · 2 · 2 · 8 / 2, head 2 · 10 / 2
    assert scaling.flops_per_token(model, run) == 3 * (68 + 32 + 10)
    assert scaling.flops_per_token(model, run, 1.0) == 3 * 110 + 68 + 32
    assert scaling.flops_per_token(model, replace(run, lora=True)) == 2 * 78 + 3 * 32


def test_collectives_by_hand(scaling: ModuleType) -> None:
    h100 = scaling.GPUS["H100"]
    assert scaling.collective(1e9, 1, h100) == 0
    assert scaling.collective(1e9, 8, h100) == pytest.approx(7 / 8 / (0.8 * 450) + 7 * 3e-6)
    slow = replace(h100, network=6.25)  # 50 GB/s a node
    assert scaling.collective(1e9, 16, slow) == pytest.approx(15 / 16 / (0.8 * 50) + 15 * 3e-6)


def test_what_is_sharded_leaves_a_gpu(scaling: ModuleType) -> None:
    model = scaling.MODELS["Llama-3.1-8B"]
    few, many = (scaling.memory_of(model, scaling.Run(), gpus) for gpus in (8, 128))
    by_hand = 16 * model.parameters * (1 / 8 - 1 / 128) / 2**30
    assert few - many == pytest.approx(by_hand)
    assert by_hand == pytest.approx(82.4 - 67.0, rel=0.1)  # torchtitan's two readings
    ddp = scaling.memory_of(model, scaling.Run("ddp"), 128)
    assert ddp == scaling.memory_of(model, scaling.Run("ddp"), 8) > 100
    kept = [scaling.memory_of(model, scaling.Run(recompute=r), 8) for r in scaling.CHECKPOINTING]
    assert kept == sorted(kept, reverse=True)


def test_what_is_gathered_and_frozen_by_hand(scaling: ModuleType) -> None:
    """As `training/memory.divided` counts: what lies outside the layers whole, with its gradient."""
    model = scaling.MODELS["Llama-3.1-8B"]  # head and embedding are two
    root, layers = 2 * model.head, 32 * model.layer
    kept = 16384 * scaling.activations(model, scaling.Run())

    def memory(strategy: str, *, lora: bool) -> float:
        found = scaling.memory_of(model, scaling.Run(strategy, lora=lora), 8)
        return (found - scaling.BESIDE) * 2**30 - kept

    parameters = layers + root
    assert memory("fsdp2", lora=False) == pytest.approx(2 * parameters + 4 * root + 8 * model.layer)
    assert memory("fsdp2", lora=True) == pytest.approx(parameters / 2 + 2 * root + 4 * model.layer)
    assert memory("ddp", lora=True) == pytest.approx(2 * layers + 4 * root)
    tied = scaling.MODELS["Qwen2.5-0.5B"]
    assert tied.root == tied.head


def test_a_step_is_as_long_as_what_takes_longest(scaling: ModuleType) -> None:
    model, h100 = scaling.MODELS["Llama-3.1-8B"], scaling.GPUS["H100"]
    fast = scaling.cost_of(model, scaling.Run(), replace(h100, network=1e6, link=1e6), 8)
    alone = fast.parts["matrix products"] + fast.parts["memory traffic"]
    assert fast.seconds == pytest.approx(alone, rel=0.01) and fast.bound != "network"
    slow = scaling.cost_of(model, scaling.Run(), replace(h100, network=0.1), 64)
    assert slow.bound == "network" and slow.seconds > slow.parts["network"]
    tiny = scaling.cost_of(model, scaling.Run("ddp", tokens=1), h100, 1)
    assert tiny.parts["host"] == pytest.approx(32 * 0.9e-3) and tiny.seconds > tiny.parts["host"]
    rates = [scaling.cost_of(model, scaling.Run(), h100, n).tokens_per_second for n in (8, 64, 512)]
    assert rates == sorted(rates, reverse=True)


def test_predictions_are_near_what_was_measured(scaling: ModuleType) -> None:
    ratios = {}
    for point in scaling.points():
        cost = scaling.cost_of(scaling.MODELS[point.model], point.run, point.gpu, point.gpus)
        if not point.fitted:
            ratios[point.model, point.setting] = cost.tokens_per_second / point.measured
    assert len(ratios) >= 14 - 2
    for (model, setting), ratio in ratios.items():
        large = scaling.MODELS[model].parameters > 6e9
        low, high = (0.84, 1.16) if large else (0.8, 1.45)  # small ones: see the page
        assert low < ratio < high, (model, setting, ratio)


@pytest.mark.parametrize("name", ["plan", "lora", "batch", "network", "breaks", "check"])
def test_the_page_holds_what_the_script_prints(scaling: ModuleType, name: str) -> None:
    page = (ROOT / "docs/scaling.md").read_text()
    for table in scaling.TABLES[name]("H100").split("\n\n"):
        assert table in page, f"run `python scripts/scaling.py {name}` and put it into the page"


def test_other_gpus_and_a_wrong_word() -> None:
    command = [sys.executable, str(ROOT / "scripts/scaling.py")]
    done = subprocess.run([*command, "plan", "--gpu", "H200"], capture_output=True, text=True)
    assert done.returncode == 0 and "| full, H200 |" in done.stdout
    done = subprocess.run([*command, "plans"], capture_output=True, text=True)
    assert done.returncode == 2 and "there is no plans" in done.stderr
