"""The optimizer's state in 8 bits: near AdamW's steps, a quarter of its memory, resumed bit for bit."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

from cs336_alignment.config import OptimizerConfig
from cs336_alignment.errors import UserError
from cs336_alignment.training.checkpoint import restore, save_checkpoint
from cs336_alignment.training.optimizer import allocate_state, build_optimizer, set_learning_rate
from cs336_alignment.training.snapshot import Snapshot, TrainState, optimizer_tensors
from tests.conftest import TINY, Sft

pytest.importorskip("torchao", reason="the extra torchao is not installed")


def build(bits: int, seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = torch.nn.Linear(256, 64)  # the bias is too small for 8 bits
    return module, build_optimizer(module, OptimizerConfig(weight_decay=0.1, state_bits=bits))


def train(module: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(100 + step)
        optimizer.zero_grad(set_to_none=True)
        set_learning_rate(optimizer, 1e-3 / (1 + step))
        module(torch.randn(32, 256)).square().mean().backward()
        optimizer.step()


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.slow
def test_steps_are_those_of_adamw_but_for_rounding_and_state_is_a_quarter() -> None:
    (plain, wide), (module, narrow) = build(32), build(8)
    start = weights(plain)
    for optimizer in (wide, narrow):
        allocate_state(optimizer)
    assert torch.equal(weights(plain), start) and torch.equal(weights(module), start)
    train(plain, wide, range(20))
    train(module, narrow, range(20))
    moved = weights(plain) - start
    apart = (weights(module) - weights(plain)).norm() / moved.norm()
    assert 0 < apart < 0.1  # 0: it was not in 8 bits
    sizes = [
        sum(t.nbytes for t in optimizer_tensors(*both).values())
        for both in ((plain, wide), (module, narrow))
    ]
    assert sizes[1] < 0.3 * sizes[0]


def test_the_learning_rate_reaches_the_compiled_step() -> None:
    module, optimizer = build(8)
    train(module, optimizer, range(2))
    before = weights(module)
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    assert torch.equal(weights(module), before)
    set_learning_rate(optimizer, 0.5)
    optimizer.step()
    assert (weights(module) - before).abs().max() > 0.1


def test_a_restored_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, optimizer = build(8)
    allocate_state(optimizer)
    train(whole, optimizer, range(3))
    folder = save_checkpoint(
        tmp_path, Snapshot.of(TrainState(3), whole, optimizer), extra={},
        save_sidecars=lambda path: None, keep=1,
    )  # fmt: skip
    frozen = copy.deepcopy(optimizer_tensors(whole, optimizer))
    train(whole, optimizer, range(3, 6))
    resumed, other = build(8, seed=1)
    assert restore(folder, resumed, other).step == 3
    found = optimizer_tensors(resumed, other)
    assert all(torch.equal(found[name], frozen[name]) for name in frozen)
    train(resumed, other, range(3, 6))
    assert torch.equal(weights(whole), weights(resumed))
    with pytest.raises(UserError, match="another optimizer"):
        restore(folder, *build(32))


def test_without_torchao_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"C119[\s\S]*optimizer\.state_bits=32"):
        build(8)


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(sft: Sft, rows: Path, tmp_path: Path) -> None:
    overrides = (
        *TINY, f"data.train_path={rows}", "optimizer.state_bits=8", "trainer.num_train_epochs=9",
        "optimizer.lr_scheduler_type=constant", "optimizer.warmup_ratio=0",
        "trainer.gradient_checkpointing=selective",
    )  # fmt: skip
    for name, lengths in {"whole": (8,), "resumed": (3, 8)}.items():
        for steps in lengths:
            done = sft("train", *overrides, f"run_name={name}", f"trainer.max_steps={steps}")
            assert done.returncode == 0, done.stderr
            assert "AdamW in 8 bits" in done.stdout
    whole, resumed = (
        next(tmp_path.rglob(f"{name}/model/model.safetensors")) for name in ("whole", "resumed")
    )
    assert whole.read_bytes() == resumed.read_bytes()
    other = sft(
        "train", *overrides, "run_name=whole", "optimizer.state_bits=32", "trainer.max_steps=9"
    )
    assert other.returncode == 78 and "optimizer.state_bits" in other.stderr
