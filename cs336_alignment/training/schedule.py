"""The learning rate as a pure function of the step; nothing to store, nothing to resume."""

from __future__ import annotations

import math

from cs336_alignment.config import OptimizerConfig

DECAY_SHARE = 0.1  # of warmup_stable_decay's steps, its last part


def warmup_length(config: OptimizerConfig, total_steps: int) -> int:
    """Give the warmup in steps; a ratio is rounded up."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * total_steps)


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Compute the learning rate of a step.

    After a linear warmup (step 0 already moves: its rate is 1/warmup of the peak) the rate follows
    `lr_scheduler_type`: `constant`; `linear`, to zero; `cosine`, half a cosine wave to zero
    (Loshchilov and Hutter, arXiv 1608.03983); `warmup_stable_decay`, constant, then linear to zero
    in the last tenth (Hu et al., arXiv 2404.06395).

    Args:
        config: the optimizer section.
        step: 0-based step about to be taken.
        total_steps: of the run.

    Example:
        >>> config = OptimizerConfig(learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=2)
        >>> [round(learning_rate(config, step, 6), 2) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = warmup_length(config, total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)  # 0 at the peak, 1 at the end
    if config.lr_scheduler_type == "constant":
        factor = 1.0
    elif config.lr_scheduler_type == "linear":
        factor = 1.0 - progress
    elif config.lr_scheduler_type == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif config.lr_scheduler_type == "warmup_stable_decay":
        factor = min(1.0, (total_steps - step) / max(1, math.ceil(DECAY_SHARE * total_steps)))
    else:
        raise ValueError(f"unknown lr_scheduler_type {config.lr_scheduler_type!r}")
    return config.learning_rate * max(0.0, factor)
