"""A model that no process holds whole: built without weights, cut, and filled row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from cs336_alignment.model.loading import ModelSource, build_model, load_model, weight_files
from cs336_alignment.model.policy import Policy
from cs336_alignment.model.trainable import freeze
from cs336_alignment.training.checkpoint import module_tensors
from cs336_alignment.training.parallel import Processes, without_weights
from cs336_alignment.training.sharding import shard
from cs336_alignment.training.shards import Pieces, part_of


def load_sharded(
    source: ModelSource,
    processes: Processes,
    compute_dtype: torch.dtype | None,
    *,
    random_init: bool,
    seed: int,
    reshard_after_forward: bool,
    frozen: Sequence[str] = (),
) -> tuple[Policy, str]:
    """Load a model in float32, of which each process holds some rows on its device.

    Each reads its rows from the files of a local folder. Weights that are drawn, come from the hub
    or are stored in another form are loaded by the main process into its machine's memory, which
    hands out a parameter at a time.

    Args:
        source: from `resolve_model`.
        processes: all of them come here.
        compute_dtype: that weights are gathered in; None: float32.
        random_init: take only the config and draw the weights: those of a model that is not
            sharded.
        seed: of the drawn weights.
        reshard_after_forward: see `shard`.
        frozen: see `freeze`.

    Returns:
        The policy; and who read the weights, in words.

    Raises:
        UserError: as `load_model`, on all processes.
    """
    device = processes.device
    with without_weights():
        model = build_model(source)
    model.tie_weights()
    freeze(model, frozen)
    policy = Policy(model, compute_dtype)
    shard(policy, device, processes.count, reshard_after_forward=reshard_after_forward)
    buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    policy.to_empty(device=device)
    own = module_tensors(model)
    with torch.no_grad():
        for name, buffer in policy.named_buffers():
            buffer.copy_(buffers[name])
        pieces = None if random_init else _readable(source, own)
        if processes.agree(pieces is not None) and pieces is not None:
            for name, tensor in own.items():
                pieces.read(name, part_of(tensor))
            return policy, "each process reads its own rows of the weights"
        values: dict[str, Tensor] = {}

        def load() -> None:
            values.update(module_tensors(load_model(source, random_init=random_init, seed=seed)))

        processes.on_main(load)
        _hand_out(own, values, device)
    return policy, "the main process loads the weights and hands out rows"


def _readable(source: ModelSource, own: Mapping[str, Tensor]) -> Pieces | None:
    """Open the source's files if they hold the model's tensors as they are."""
    try:
        pieces = Pieces(weight_files(source))
    except Exception:  # of any kind: `load_model` tells of it
        return None
    shapes = pieces.shapes
    return pieces if all(shapes.get(n) == tuple(t.shape) for n, t in own.items()) else None


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
