"""A model that no process holds whole: built without weights, cut, and filled row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from cs336_alignment.config import Config
from cs336_alignment.model.base_model import Base, weights_sha256
from cs336_alignment.model.loading import (
    ModelSource,
    base_of,
    build_model,
    load_model,
    weight_files,
)
from cs336_alignment.model.lora import (
    adapter_tensors,
    base_tensors,
    inject_adapter,
    know_base,
    read_adapter_config,
    read_adapter_weights,
)
from cs336_alignment.model.policy import Policy
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
    """Load a model in float32, of which each process holds some rows on its device, and choose
    what of it is trained; adapters are drawn as in a model held whole.

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
    device = processes.device
    with without_weights():
        model = build_model(source)
    model.tie_weights()
    adapter = None
    if config.lora.active:
        adapter = _Adapter.put_into(model, source, config)
    else:
        freeze(model, config.model.freeze)
    policy = Policy(model, compute_dtype)
    again = config.parallel.reshard_after_forward
    shard(policy, device, processes.count, reshard_after_forward=again)
    buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    policy.to_empty(device=device)
    with torch.no_grad():
        for name, buffer in policy.named_buffers():
            buffer.copy_(buffers[name])
        who = _fill(base_tensors(model), source, processes, config)
        loaded(base_tensors(model))
        if adapter is not None:
            adapter.fill(model)
    return policy, who


@dataclass(frozen=True)
class _Adapter:
    """What adapters begin with, kept while the model around them has no memory.

    Attributes:
        drawn: a new one's weights by their names in the model.
        folder: of one that is continued.
        base: what the model is, but for its weights' hash.
    """

    drawn: Mapping[str, Tensor]
    folder: Path | None
    base: Base

    @staticmethod
    def put_into(model: PreTrainedModel, source: ModelSource, config: Config) -> _Adapter:
        """Put adapters into a model on the meta device."""
        base = base_of(source, None)
        # peft draws an adapter where its layer's weight is: here, in one number's memory.
        exchange_tensors(
            model, lambda t: torch.zeros((), dtype=t.dtype).expand(t.shape), buffers=False
        )
        folder = inject_adapter(model, config.lora, base, seed=config.seed)
        drawn = {n: p.detach() for n, p in model.named_parameters() if ".lora_" in n}
        exchange_tensors(model, lambda t: torch.empty_like(t, device="meta"), buffers=False)
        return _Adapter(drawn, folder, base)

    def fill(self, model: PreTrainedModel) -> None:
        """Hash the base model and give the adapters their values: all processes take part."""
        parameters = {id(parameter) for parameter in model.parameters()}
        weights = (item for item in base_tensors(model).items() if id(item[1]) in parameters)
        base = replace(self.base, sha256=weights_sha256(whole_tensors(weights)))
        know_base(model, base)
        if self.folder is None:
            _copy_rows(dict(model.named_parameters()), self.drawn)
            return
        base.refuse_another(self.folder, read_adapter_config(self.folder).base_model_name_or_path)
        _copy_rows(adapter_tensors(model), read_adapter_weights(self.folder, model))


def _copy_rows(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy of tensors that every process has the rows that are this one's."""
    for name, value in values.items():
        part = part_of(own[name])
        part.rows.copy_(value[part.start : part.start + len(part.rows)])


def _fill(
    own: Mapping[str, Tensor], source: ModelSource, processes: Processes, config: Config
) -> str:
    """Give the model's own tensors their values; says who read them."""
    random_init = config.model.random_init
    pieces = None if random_init else _readable(source, own)
    if processes.agree(pieces is not None) and pieces is not None:
        for name, tensor in own.items():
            pieces.read(name, part_of(tensor))
        return "each process reads its own rows of the weights"
    values: dict[str, Tensor] = {}

    def load() -> None:
        model = load_model(source, random_init=random_init, seed=config.seed)
        values.update(base_tensors(model))

    processes.on_main(load)
    _hand_out(own, values, processes.device)
    return "the main process loads the weights and hands out rows"


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
