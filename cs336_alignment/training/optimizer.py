"""AdamW with weight decay on matrices only."""

from __future__ import annotations

import torch
from torch import nn

from cs336_alignment.config import OptimizerConfig

FUSED_DEVICES = ("cuda", "cpu")


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov and Hutter, arXiv 1711.05101), fused where torch has the kernel.

    Weight decay falls on parameters of two or more dimensions; biases and norms have none. A tied
    weight is one parameter. The learning rate is set anew at every step by the trainer.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=all(p.device.type in FUSED_DEVICES for p in parameters),
    )


def allocate_state(optimizer: torch.optim.AdamW) -> None:
    """Give every parameter the state that its first step would give it, so that memory shows before
    any time is spent.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                device = parameter.device if group["fused"] else torch.device("cpu")
                zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=device),
                    "exp_avg": zeros,
                    "exp_avg_sq": zeros.clone(),
                }


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Write the step's learning rate into every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
