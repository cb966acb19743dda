"""Checkpoints of a module small enough to be saved a thousand times."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cs336_alignment.config import OptimizerConfig
from cs336_alignment.training.checkpoint import save_checkpoint
from cs336_alignment.training.optimizer import build_optimizer
from cs336_alignment.training.snapshot import Snapshot, TrainState

FILES = (
    "model.safetensors",
    "optimizer.safetensors",
    "trainer_state.json",
    "manifest.json",
    "config.json",
    "templates/tool.jinja",
)


class Tiny(nn.Module):
    """An embedding tied to the output, biases, a saved buffer and one that is not saved."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scratch", torch.full((3,), float(seed)), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.middle(self.norm(self.embedding(ids))))  # type: ignore[no-any-return]


def build(seed: int = 0) -> tuple[Tiny, torch.optim.Optimizer]:
    tiny = Tiny(seed)
    return tiny, build_optimizer(tiny, OptimizerConfig(learning_rate=0.01, weight_decay=0.1))


def take_step(tiny: Tiny, optimizer: torch.optim.Optimizer, step: int) -> None:
    ids = (torch.arange(11) * (step + 2)) % 11
    optimizer.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(tiny(ids), ids.roll(1)).backward()
    optimizer.step()


def sidecars(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 6}\n')
    (folder / "templates").mkdir()
    (folder / "templates" / "tool.jinja").write_text("{{ tools }}")


def save(checkpoints: Path, step: int, keep: int = 9, **options: Any) -> Path:
    """Save a module that has really taken so many steps."""
    tiny, optimizer = build()
    for number in range(step):
        take_step(tiny, optimizer, number)
    return save_checkpoint(
        checkpoints, Snapshot.of(TrainState(step, 10 * step, 5 * step), tiny, optimizer),
        **({"extra": {"note": "n"}, "save_sidecars": sidecars, "keep": keep} | options),
    )  # fmt: skip


def fingerprint(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
