"""Averages of the weights: what they are, and that looking at one moves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import schedulefree
import torch
from torch import Tensor, nn

from cs336_alignment.config import OptimizerConfig
from cs336_alignment.errors import UserError
from cs336_alignment.training.averaging import OTHER, Average, NoAverage, build_average
from cs336_alignment.training.checkpoint import restore, save_checkpoint
from cs336_alignment.training.optimizer import allocate_state, build_optimizer, set_learning_rate
from cs336_alignment.training.snapshot import Snapshot, TrainState, optimizer_tensors
from tests.conftest import build_model

# name → (the optimizer section, the average's decay)
KINDS: dict[str, tuple[OptimizerConfig, float | None]] = {
    "adamw": (OptimizerConfig(layer_lr_decay=0.5), None),
    "adafactor": (OptimizerConfig(name="adafactor", weight_decay=0.1), None),
    "muon": (OptimizerConfig(name="muon", weight_decay=0.1), None),
    "schedule-free": (
        OptimizerConfig(name="schedule_free", weight_decay=0.1, layer_lr_decay=0.5), None
    ),
    "average": (OptimizerConfig(), 0.9),
    "average of Muon's": (OptimizerConfig(name="muon"), 0.9),
}  # fmt: skip


class Training:
    """A small model, its optimizer and average."""

    def __init__(self, kind: str, *, seed: int = 0) -> None:
        config, decay = KINDS[kind]
        self.model = build_model("llama", torch.float32)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(seed)
        self.optimizer = build_optimizer(self.model, config)
        allocate_state(self.optimizer)
        self.average: Average = build_average(self.optimizer, decay)

    def steps(self, steps: range, *, look: bool = False) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            set_learning_rate(self.optimizer, 1e-2 / (1 + step))
            for p in self.model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            self.optimizer.step()
            self.average.update()
            if look:
                with self.average.shown():
                    pass

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def shown(self) -> dict[str, Tensor]:
        with self.average.shown():
            return self.weights()

    def everything(self) -> dict[str, Tensor]:
        state = optimizer_tensors(self.model, self.optimizer)
        return {**self.weights(), **{name: x.clone() for name, x in state.items()}}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_allocating_moves_nothing_and_looking_changes_no_bit(kind: str) -> None:
    plain, looked = Training(kind), Training(kind)
    assert same(plain.weights(), build_weights())
    assert same(plain.shown(), build_weights())
    plain.steps(range(4))
    looked.steps(range(4), look=True)
    assert same(plain.everything(), looked.everything())
    averaged = kind in ("schedule-free", "average", "average of Muon's")
    assert same(plain.shown(), plain.weights()) != averaged
    assert isinstance(plain.average, NoAverage) != averaged


def build_weights() -> dict[str, Tensor]:
    return dict(build_model("llama", torch.float32).named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_training_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    whole = Training(kind)
    whole.steps(range(3))
    with whole.average.shown():
        snapshot = Snapshot.of(TrainState(3), whole.model, whole.optimizer)
        folder = save_checkpoint(
            tmp_path, snapshot, extra={}, save_sidecars=lambda path: None, keep=1
        )
    resumed = Training(kind, seed=1)
    assert not same(resumed.weights(), whole.weights())
    with resumed.average.shown():
        assert restore(folder, resumed.model, resumed.optimizer).step == 3
        assert all(torch.equal(p, snapshot.weights[n]) or kind != "adamw" for n, p in resumed.model.named_parameters())  # fmt: skip
    assert same(resumed.everything(), whole.everything())
    assert same(resumed.shown(), whole.shown())
    for training in (whole, resumed):
        training.steps(range(3, 6))
    assert same(resumed.everything(), whole.everything())
    assert same(resumed.shown(), whole.shown())
    other = Training("adamw" if kind != "adamw" else "muon")
    with pytest.raises(UserError, match="another optimizer"):
        restore(folder, other.model, other.optimizer)


def test_what_a_checkpoint_shows_is_the_average(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    training = Training("average")
    training.steps(range(3))
    trained, shown = training.weights(), training.shown()
    with training.average.shown():
        folder = save_checkpoint(
            tmp_path, Snapshot.of(TrainState(3), training.model, training.optimizer), extra={},
            save_sidecars=lambda path: None, keep=1,
        )  # fmt: skip
    assert same(load_file(folder / "model.safetensors"), shown)
    beside = load_file(folder / "optimizer.safetensors")
    assert all(torch.equal(beside[f"{OTHER}:{name}"], trained[name]) for name in trained)


def test_the_moving_average_is_its_formula_and_an_error_puts_the_weights_back() -> None:
    training = Training("average")
    want = {name: p.double() for name, p in training.weights().items()}
    for step in range(5):
        training.steps(range(step, step + 1))
        weights = training.weights()
        want = {name: 0.9 * want[name] + 0.1 * weights[name].double() for name in want}
    shown = training.shown()
    for name, value in want.items():
        torch.testing.assert_close(shown[name].double(), value, rtol=1e-5, atol=1e-6)
    before = training.everything()
    with pytest.raises(KeyError), training.average.shown():
        raise KeyError
    assert same(training.everything(), before)


def test_the_schedule_free_average_is_the_librarys(tmp_path: Path) -> None:
    """The library's own modes and warmup give what ours do."""
    training, reference = Training("schedule-free"), build_model("llama", torch.float32)
    matrices = [p for p in reference.parameters() if p.ndim > 1]
    others = [p for p in reference.parameters() if p.ndim == 1]
    training.optimizer = build_optimizer(
        training.model, OptimizerConfig(name="schedule_free", weight_decay=0.1)
    )
    allocate_state(training.optimizer)
    training.average = build_average(training.optimizer, None)
    library = schedulefree.AdamWScheduleFree(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.999), eps=1e-8, warmup_steps=4,
    )  # fmt: skip
    library.train()
    for step in range(6):
        set_learning_rate(training.optimizer, 1e-2 * min(1.0, (step + 1) / 4))
        torch.manual_seed(step)
        for mine, theirs in zip(training.model.parameters(), reference.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape)
            theirs.grad = mine.grad.clone()
        training.optimizer.step()
        library.step()
    library.eval()
    for name, p in reference.named_parameters():
        torch.testing.assert_close(training.shown()[name], p.detach(), rtol=1e-5, atol=1e-6)


def test_frozen_weights_have_no_average() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig())
    allocate_state(optimizer)
    build_average(optimizer, 0.9)
    assert {name.split(":")[1] for name in optimizer_tensors(model, optimizer)} == {
        "1.weight",
        "1.bias",
    }
