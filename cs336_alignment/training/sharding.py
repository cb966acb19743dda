"""FSDP2: each process holds some rows of every parameter, gathered layer by layer where they are
computed with. `fully_shard` of torch does it; here is what is cut, and what is held whole for a
while.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from cs336_alignment.config import ParallelConfig
from cs336_alignment.model.compile import repeated_layers
from cs336_alignment.model.policy import Policy


def shard(policy: Policy, device: torch.device, num_processes: int, config: ParallelConfig) -> None:
    """Cut the policy's parameters into rows, in place: each repeated layer is gathered and let go
    by itself, all else (embedding, last norm, head; a tied weight once) with the whole.

    What is gathered for the whole stays for the backward pass, so the LM head is gathered once a
    microbatch. With a compute dtype the weights are gathered in it, and their gradients reduced in
    float32.

    Args:
        policy: its parameters may be on the meta device; they then still are.
        device: where this process computes.
        num_processes: that share the parameters.
        config: `reshard_after_forward` lets a layer go between its forward and its backward pass.
            `cpu_offload` keeps what a process holds in the machine's memory: weights are copied to
            `device` to be gathered, and gradients back once they are reduced. Parameters must then
            be on the CPU before the first forward pass, buffers on `device`.

    Raises:
        UserError: the architecture does not name its layers (78).
    """
    layers = repeated_layers(policy.model, "parallel=ddp")
    precision = MixedPrecisionPolicy()
    if policy.compute_dtype is not None:
        # The inputs stay as they are: slopes of the loss are float32, and layouts are records.
        precision = MixedPrecisionPolicy(
            param_dtype=policy.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        policy.autocast_dtype = None
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (num_processes,)), "mp_policy": precision,
    }  # fmt: skip
    if config.cpu_offload:
        policy.compute_device = device
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for layer in layers:
        fully_shard(layer, reshard_after_forward=config.reshard_after_forward, **options)
    fully_shard(policy, **options)
    for module in _sharded(policy):
        if device.type == "cpu":  # gloo cannot average in every version
            module.set_force_sum_reduction_for_comms(True)
        if hasattr(module, "set_reduce_scatter_unused_params"):  # experts that one process needs
            module.set_reduce_scatter_unused_params(True, recurse=False)
    policy.register_forward_hook(_let_go)


def _let_go(module: Any, _inputs: Any, _output: Any) -> None:
    """Without a graph no backward pass comes that would, and a weight that changes meanwhile would
    go unnoticed.
    """
    if not torch.is_grad_enabled():
        module.reshard()


def is_sharded(module: nn.Module) -> bool:
    """Tell whether `shard` has cut a module."""
    return isinstance(module, FSDPModule)


def _sharded(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


@contextlib.contextmanager
def held_whole(module: nn.Module, reshard_after_forward: bool) -> Iterator[None]:
    """Hold all weights whole within a context; see `Processes.held_whole`. `module` has computed
    before.
    """
    parts = _sharded(module)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
        for part in parts[1:]:  # the first is the whole, which never lets go between the passes
            part.set_reshard_after_forward(reshard_after_forward, recurse=False)


@contextlib.contextmanager
def past_the_hooks(policy: Policy) -> Iterator[None]:
    """Let `policy.model` be called by itself within a context: its layers gather for themselves."""
    parts = _sharded(policy)[:1]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
