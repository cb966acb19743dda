"""A model that no process holds whole: built without weights, cut, and filled row by row."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from cs336_alignment.config import Config, LoraConfig
from cs336_alignment.config_clashes import HELD_WHOLE, clash
from cs336_alignment.errors import UserError
from cs336_alignment.model.adapter_files import read_adapter_weights
from cs336_alignment.model.adapters import adapter_config, adapter_tensors, base_tensors
from cs336_alignment.model.base_model import Base, weights_sha256
from cs336_alignment.model.loading import base_of, build_model, load_model
from cs336_alignment.model.lora import add_adapter, know_base
from cs336_alignment.model.policy import Policy
from cs336_alignment.model.source import ModelSource, weight_files
from cs336_alignment.model.trainable import freeze
from cs336_alignment.training.parallel import Processes, without_weights
from cs336_alignment.training.sharding import shard
from cs336_alignment.training.shards import Pieces, part_of, whole_tensors
from cs336_alignment.training.without_values import exchange_tensors


def load_sharded(
    source: ModelSource,
    processes: Processes,
    config: Config,
    compute_dtype: torch.dtype | None,
    loaded: Callable[[Mapping[str, Tensor]], object],
) -> tuple[Policy, str]:
    """Load a model in float32, of which each process holds some rows, on its device or in the
    machine's memory (`parallel.cpu_offload`), and choose what of it is trained; adapters are drawn
    as in a model held whole.

    Each reads its rows from the files of a local folder. Weights that are drawn, come from the hub
    or are stored in another form are loaded by the main process into its machine's memory, which
    hands out a parameter at a time.

    Args:
        source: from `resolve_model`.
        processes: all of them come here.
        config: of the run.
        compute_dtype: that weights are gathered in; None: float32.
        loaded: is called with the weights as they were loaded, see `base_tensors`.

    Returns:
        The policy; and who read the weights, in words.

    Raises:
        UserError: as `load_model`, `freeze` and `add_adapter`, on all processes.
    """
    device, lora, parallel = processes.device, config.lora, config.parallel
    drawn: dict[str, Tensor] = {}

    def build() -> PreTrainedModel:
        base = base_of(source, None) if lora.active else None
        with without_weights():
            model = build_model(source)
        model.tie_weights()
        if base is None:
            freeze(model, config.model.freeze)
        else:
            drawn.update(_inject_on_meta(model, config, base))
        return model

    model: Any = processes.on_each(build)
    policy = Policy(model, compute_dtype)
    shard(policy, device, processes.count, parallel)
    buffers = dict(policy.named_buffers(remove_duplicate=False))
    policy.to_empty(device="cpu" if parallel.cpu_offload else device)
    with torch.no_grad():
        for name, buffer in buffers.items():
            owner, _, own = name.rpartition(".")
            setattr(policy.get_submodule(owner), own, buffer.to(device))
        who = _fill(base_tensors(model), source, processes, config)
        loaded(base_tensors(model))
        if lora.active:
            _fill_adapter(model, drawn, lora, processes)
    return policy, who


def _inject_on_meta(model: PreTrainedModel, config: Config, base: Base) -> dict[str, Tensor]:
    """Put adapters into a model on the meta device; gives what they begin with, by name."""
    # peft draws an adapter where its layer's weight is: here, in one number's memory.
    exchange_tensors(model, lambda t: torch.zeros((), dtype=t.dtype).expand(t.shape), buffers=False)
    add_adapter(model, config.lora, base, seed=config.seed, fill=False)
    if adapter_config(model).use_dora:  # that of lora.adapter_path
        raise clash("lora.dora", "parallel.strategy", HELD_WHOLE)
    drawn = {n: p.detach() for n, p in model.named_parameters() if ".lora_" in n}
    exchange_tensors(model, lambda t: torch.empty_like(t, device="meta"), buffers=False)
    return drawn


def _fill_adapter(
    model: PreTrainedModel, drawn: Mapping[str, Tensor], lora: LoraConfig, processes: Processes
) -> None:
    """Hash the base model, and give the adapters their values."""
    weights = whole_tensors(
        (name, t) for name, t in base_tensors(model).items() if isinstance(t, nn.Parameter)
    )
    # All gather, and one hashes.
    sha256: Any = weights_sha256(weights) if processes.is_main else deque(weights, maxlen=0)
    sha256 = processes.agree(sha256)

    def fill() -> None:
        know_base(model, sha256, lora.adapter_path)
        own: Mapping[str, Tensor] = dict(model.named_parameters())
        values = drawn
        if lora.adapter_path is not None:
            own, values = adapter_tensors(model), read_adapter_weights(lora.adapter_path, model)
        for name, value in values.items():
            part = part_of(own[name])
            part.rows.copy_(value[part.start : part.start + len(part.rows)])

    processes.on_each(fill)


def _fill(
    own: Mapping[str, Tensor], source: ModelSource, processes: Processes, config: Config
) -> str:
    """Give the model's own tensors their values; says who read them."""
    random_init = config.model.random_init
    pieces = None if random_init else _readable(source, own)
    if all(processes.gather(pieces is not None)):

        def read() -> None:
            assert pieces is not None
            for name, tensor in own.items():
                pieces.read(name, part_of(tensor))

        processes.on_each(read)
        return "each process reads its own rows of the weights"
    values: dict[str, Tensor] = {}

    def load() -> None:
        model = load_model(source, random_init=random_init, seed=config.seed)
        values.update(base_tensors(model))
        if {n: t.shape for n, t in values.items()} != {n: t.shape for n, t in own.items()}:
            raise UserError(
                "M110",
                f"the weights of {source.location} are stored in a form that cannot be sharded",
                hint="parallel=ddp, or a model whose weights are not quantized",
            )

    processes.on_main(load)
    _hand_out(own, values, processes.device)
    return "the main process loads the weights and hands out rows"


def _readable(source: ModelSource, own: Mapping[str, Tensor]) -> Pieces | None:
    """Open the source's files if they hold the model's tensors as they are."""
    try:
        pieces = Pieces(weight_files(source))
        as_they_are = all(pieces.holds(name, tuple(t.shape)) for name, t in own.items())
    except Exception:  # of any kind: `load_model` tells of it
        return None
    return pieces if as_they_are else None


def _hand_out(
    own: Mapping[str, Tensor], values: Mapping[str, Tensor], device: torch.device
) -> None:
    """Give every process its rows of the main process's tensors, one after the other."""
    for name, tensor in own.items():
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if name in values:
            whole.copy_(values[name])
        if isinstance(tensor, DTensor):
            part = distribute_tensor(whole, tensor.device_mesh, [Shard(0)]).to_local()
        else:
            torch.distributed.broadcast(whole, src=0)
            part = whole
        part_of(tensor).rows.copy_(part)
