"""The tables of docs/optimizers.md, and a short training by a row beside the plain libraries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import schedulefree
import torch
import yaml
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cs336_alignment.config import Config, OptimizerConfig
from cs336_alignment.config_check import check
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.training.averaging import build_average
from cs336_alignment.training.optimizer import (
    allocate_state,
    build_optimizer,
    set_learning_rate,
)
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.step import Cut, accumulate_gradients
from tests.conftest import ROOT, build_model
from tests.reference import dense_loss, dense_noise

DOCUMENT = ROOT / "docs" / "optimizers.md"
STEPS = [[0, 1, 2, 3, 4, 5, 6, 7], [8, 3, 10], [1, 9, 5, 2]]
RATES = [1e-2, 5e-3, 8e-3]
PREFIX = 17
NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Row:
    """An option: what to type, and column → yes or no."""

    name: str
    overrides: tuple[str, ...]
    cells: dict[str, str]


def tables() -> list[list[list[str]]]:
    """The tables of the document as rows of cells, the header first."""
    found: list[list[list[str]]] = []
    inside = False
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            if not inside:
                found.append([])
            if not re.fullmatch(r"[|-]+", line):
                found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        inside = line.startswith("|")
    return found


def table(first: str) -> list[list[str]]:
    """The table whose header begins with a word."""
    (chosen,) = [rows for rows in tables() if rows[0][0] == first]
    return chosen


def support() -> list[Row]:
    """The rows of the support matrix."""
    header, *rows = table("option")
    return [
        Row(row[0], tuple(row[1].strip("`").split()), dict(zip(header[2:], row[2:], strict=True)))
        for row in rows
    ]


def refusals() -> list[tuple[str, ...]]:
    """What to type to get each error."""
    return [tuple(row[0].strip("`").split()) for row in table("type")[1:]]


def config_of(*overrides: str) -> Config:
    """Compose and check what a person types; without Hydra, which takes its time."""
    config = Config(run_name="r")
    config.model.name_or_path = config.data.train_path = "given"
    # As Hydra does: groups first.
    for override in sorted(overrides, key=lambda text: "." in text.split("=")[0]):
        key, value = override.split("=", 1)
        if key == "optimizer":
            preset = yaml.safe_load((ROOT / f"configs/optimizer/{value}.yaml").read_text())
            typed = {
                f"optimizer.{name}": item for name, item in preset.items() if name != "defaults"
            }
        else:
            typed = {key: yaml.safe_load(value)}
        for full, item in typed.items():
            section, name = full.split(".")
            number = isinstance(item, str) and re.fullmatch(r"[\d.]+e-?\d+", item)
            setattr(getattr(config, section), name, float(item) if number else item)
    check(config)
    return config


def plain_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Each parameter in a group of its own, written out anew; those of hidden matrices first.

    The layers of tests' models are numbered in their parameters' names.
    """
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    layers = 1 + max(int(m[1]) for n, _ in trained if (m := NUMBER.search(n)))
    embedding = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    matrices, others = [], []
    for name, p in trained:
        numbered = NUMBER.search(name)
        above = layers - 1 - int(numbered[1]) if numbered else layers * (id(p) in embedding)
        group = {
            "params": [p], "weight_decay": config.weight_decay if p.ndim > 1 else 0.0,
            "lr": 1.0, "rate": config.layer_lr_decay**above,
        }  # fmt: skip
        (matrices if numbered and p.ndim == 2 else others).append(group)
    return [*matrices, *others]


def plain_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """The libraries' own optimizers."""
    both = plain_groups(model, config)
    hidden = sum(
        bool(NUMBER.search(n)) and p.ndim == 2 and p.requires_grad
        for n, p in model.named_parameters()
    )
    matrices, others = both[:hidden], both[hidden:]
    options = {"betas": tuple(config.betas), "eps": config.eps}
    if config.name == "adafactor":
        return [torch.optim.Adafactor(both)]
    if config.name == "muon":
        momentum = config.muon_momentum
        muon = torch.optim.Muon(matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        return [muon, *([torch.optim.AdamW(others, **options)] if others else [])]
    if config.name == "schedule_free":
        free = schedulefree.AdamWScheduleFree(both, **options)
        free.train()
        return [free]
    return [torch.optim.AdamW(both, **options)]


def train_plainly(model: Any, dataset: TokenizedDataset, config: Config) -> Tensor:
    """Train by torch, transformers and the optimizer's library alone; the weights that are shown."""
    trainer = config.trainer
    optimizers = plain_optimizers(model, config.optimizer)
    average = [p.detach().clone() for p in model.parameters()]
    for step, (ids, rate) in enumerate(zip(STEPS, RATES, strict=True)):
        model.zero_grad(set_to_none=True)
        with dense_noise(model, dataset, ids, trainer.neftune_alpha, seed=3, step=step):
            dense_loss(model, dataset, ids, trainer.loss_normalization, trainer).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate"]
            optimizer.step()
        for mean, p in zip(average, model.parameters(), strict=True):
            decay = trainer.ema_decay or 0.0
            mean.copy_(decay * mean + (1 - decay) * p.detach())
    if config.optimizer.name == "schedule_free":
        optimizers[0].eval()  # type: ignore[attr-defined]
        average = [p.detach() for p in model.parameters()]
    return torch.cat([mean.flatten() for mean in average])


def train(
    policy: nn.Module, wrapped: nn.Module, dataset: TokenizedDataset, config: Config, cut: Cut,
    processes: Processes,
) -> Tensor:  # fmt: skip
    """Train as the framework does; the weights that are shown."""
    model = policy.model
    optimizer = build_optimizer(model, config.optimizer)
    allocate_state(optimizer)
    average = build_average(optimizer, config.trainer.ema_decay)
    for step, (ids, rate) in enumerate(zip(STEPS, RATES, strict=True)):
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        accumulate_gradients(
            wrapped, dataset, ids, cut=cut, trainer=config.trainer, processes=processes, seed=3,
            step=step,
        )  # fmt: skip
        optimizer.step()
        average.update()
        with average.shown():  # it changes nothing
            pass
    with average.shown():
        return weights_of(model)


def weights_of(model: nn.Module) -> Tensor:
    """All weights in one row, whole."""
    return torch.cat([
        (p.full_tensor() if isinstance(p, DTensor) else p).detach().flatten().clone()
        for p in model.parameters()
    ])  # fmt: skip


def apart(got: Tensor, want: Tensor, start: Tensor) -> float:
    """How far two trainings end from each other, by how far they came."""
    return float((got - want).norm() / (want - start).norm())


def start_of(name: str, dtype: torch.dtype) -> Tensor:
    """The weights before training."""
    return weights_of(build_model(name, dtype))


def with_normalization(config: Config, normalization: str) -> Config:
    """The same with another normalization; `constant`'s number is that of the dense reference."""
    constant = 3.0 if normalization == "constant" else 1.0
    trainer = replace(config.trainer, loss_normalization=normalization, normalize_constant=constant)
    return replace(config, trainer=trainer)


def columns(cells: dict[str, str], names: Sequence[str]) -> list[str]:
    """Those of some columns that say yes."""
    assert set(cells.values()) <= {"yes", "no"}
    return [name for name in names if cells[name] == "yes"]
