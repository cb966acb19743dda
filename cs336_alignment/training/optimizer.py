"""AdamW with weight decay on matrices only, its state in 32 or 8 bits."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cs336_alignment.config import OptimizerConfig
from cs336_alignment.errors import ExitStatus, UserError

FUSED_DEVICES = ("cuda", "cpu")


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build AdamW (Loshchilov and Hutter, arXiv 1711.05101), fused where torch has the kernel.

    Weight decay falls on parameters of two or more dimensions; biases and norms have none. A tied
    weight is one parameter. The learning rate is set anew at every step by the trainer. With
    `state_bits=8` the two moments are held in blocks of 256 values of 8 bits with a float32 scale
    (Dettmers and others, arXiv 2110.02861) by torchao; tensors below 4,096 values stay float32.

    Raises:
        UserError: 8 bits without torchao (78).
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {
        "params": [group for group in groups if group["params"]],
        "lr": config.learning_rate,
        "betas": (config.betas[0], config.betas[1]),
        "eps": config.eps,
    }
    if config.state_bits == 8:
        return _eight_bit(options)
    fused = all(p.device.type in FUSED_DEVICES for p in parameters)
    return torch.optim.AdamW(**options, fused=fused)


def _eight_bit(options: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as failure:
        raise UserError(
            "C119",
            "optimizer.state_bits=8 needs torchao",
            ExitStatus.BAD_CONFIG,
            got=str(failure),
            hint="pip install 'cs336_alignment[torchao]', or optimizer.state_bits=32",
        ) from failure
    optimizer: torch.optim.Optimizer = AdamW8bit(**options)
    return optimizer


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state that its first step would give it, so that memory shows before
    any time is spent. No weight changes: the learning rate and the gradients are zero.

    Raises:
        UserError: the 8-bit kernels cannot be compiled here (78).
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fresh = [p for p in parameters if not optimizer.state[p]]
    if not fresh:
        return
    for parameter in fresh:
        parameter.grad = torch.zeros_like(parameter)
    rate = float(optimizer.param_groups[0]["lr"])
    set_learning_rate(optimizer, 0.0)
    try:
        with warnings.catch_warnings():  # torchao's tensors have no hash for torch's cache on disk
            warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
            optimizer.step()
    except Exception as failure:
        if isinstance(optimizer, torch.optim.AdamW):
            raise
        raise UserError(  # torchao compiles its step: of a hundred kinds
            "C119",
            "optimizer.state_bits=8 does not work on this machine",
            ExitStatus.BAD_CONFIG,
            got=f"{type(failure).__name__}: {str(failure).strip().splitlines()[0]}",
            hint="it needs a C++ compiler on a CPU, Triton on a GPU; or optimizer.state_bits=32",
        ) from failure
    set_learning_rate(optimizer, rate)
    for parameter in fresh:
        parameter.grad = None
        optimizer.state[parameter]["step"].zero_()


def clip_gradients(module: nn.Module, most: float) -> Tensor:
    """Scale all gradients down to a norm of at most `most`; returns the norm that they had.

    Of sharded gradients the norm is that of the whole ones, on every process.
    """
    parameters = list(module.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Write the step's learning rate into every parameter group."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # compiled code reads it where it is
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate
