"""The doctor's look at an optimizer: stopped and continued elsewhere, its next step is the same."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from cs336_alignment.config import Config, OptimizerConfig
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.averaging import Average, build_average
from cs336_alignment.training.checkpoint import restore, save_checkpoint
from cs336_alignment.training.invariances import Finding, Subject, differing
from cs336_alignment.training.optimizer import allocate_state, build_optimizer, set_learning_rate
from cs336_alignment.training.snapshot import Snapshot, TrainState

RATE = 1e-3  # any: the steps are thrown away


def has_choices(config: Config) -> bool:
    """Tell whether the config asks for more than AdamW as it comes."""
    optimizer, plain = config.optimizer, OptimizerConfig()
    return config.trainer.ema_decay is not None or any(
        getattr(optimizer, key) != getattr(plain, key)
        for key in ("name", "state_bits", "layer_lr_decay")
    )


def check_optimizer(
    subject: Subject, load: Callable[..., PreTrainedModel], config: Config
) -> Finding:
    """Take two steps, save after the first, restore into another model and take the second there.

    The weights of the subject's model are others afterwards.
    """
    name = f"optimizer {config.optimizer.name}, saved and continued"
    optimizer, average = _build(subject.policy, config)
    _step(subject, optimizer, average)
    with tempfile.TemporaryDirectory() as folder:
        with average.shown():
            saved = save_checkpoint(
                Path(folder), Snapshot.of(TrainState(1), subject.policy.model, optimizer),
                extra={}, keep=1, save_sidecars=lambda _: None,
            )  # fmt: skip
        fresh = Policy(load(other=True)).to(subject.processes.device)
        fresh.head = None if subject.policy.head is None else fresh.head
        other, other_average = _build(fresh.eval(), config)
        with other_average.shown():
            restore(saved, fresh.model, other)
    _step(subject, optimizer, average)
    _step(replace(subject, policy=fresh), other, other_average)
    differs = differing(fresh.model, subject.policy.model)
    with average.shown(), other_average.shown():
        differs = differs or differing(fresh.model, subject.policy.model)
    return Finding(name, None, 0.0, not differs, differs)


def _build(policy: Policy, config: Config) -> tuple[torch.optim.Optimizer, Average]:
    optimizer = build_optimizer(policy.model, config.optimizer)
    allocate_state(optimizer)
    return optimizer, build_average(optimizer, config.trainer.ema_decay)


def _step(subject: Subject, optimizer: torch.optim.Optimizer, average: Average) -> None:
    batching: Batching = "padded" if subject.not_flat is not None else "flat"
    gradient = subject.step(1, batching).tensors
    for name, parameter in subject.policy.model.named_parameters():
        parameter.grad = gradient.get(name)
    set_learning_rate(optimizer, RATE)
    optimizer.step()
    average.update()
    optimizer.zero_grad(set_to_none=True)
