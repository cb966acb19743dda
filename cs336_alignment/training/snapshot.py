"""All that a checkpoint holds of the training itself, as tensors in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cs336_alignment.model.adapter_files import ADAPTER_WEIGHTS
from cs336_alignment.model.adapters import adapter_tensors, base_tensors, is_adapted
from cs336_alignment.training.checkpoint_folders import WEIGHTS
from cs336_alignment.training.shards import Part, part_of


@dataclass
class TrainState:
    """Where a run stands. All that can be derived from the step is derived, not stored.

    Attributes:
        step: optimizer steps completed.
        tokens_seen: prompt and response tokens of all examples so far.
        response_tokens_seen: trained tokens so far.
        skipped_steps: steps left out for a loss spike.
        recent_losses: token means of the last steps, in nats, newest last.
    """

    step: int = 0
    tokens_seen: int = 0
    response_tokens_seen: int = 0
    skipped_steps: int = 0
    recent_losses: list[float] = field(default_factory=list)


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Give the parameters (a tied one once) and persistent buffers of a module by name; of one with
    adapters what is trained alone.
    """
    return adapter_tensors(module) if is_adapted(module) else base_tensors(module)


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Give the optimizer's state as `kind:parameter name` → tensor, `kind.part:…` where a state is
    of several.
    """
    return {
        f"{kind}{part}:{name}": tensor
        for name, parameter in module.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
        for part, tensor in _parts(value)
    }


def _parts(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Take a tensor of several (8-bit codes and their scales, say) apart."""
    if isinstance(value, DTensor) or not hasattr(value, "__tensor_flatten__"):
        yield "", value
        return
    for part in value.__tensor_flatten__()[0]:
        yield f".{part}", getattr(value, part)


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds of the training itself.

    Attributes:
        state: of the run, its own copy.
        weights: parameter or buffer name → tensor; of a sharded one the rows of this process.
        moments: the optimizer's, see `optimizer_tensors`.
        starts: the first row of what is a part, by the name of either; 0 where none is given.
        weights_file: where the weights go.
    """

    state: TrainState
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    starts: Mapping[str, int] = field(default_factory=dict)
    weights_file: str = WEIGHTS

    @staticmethod
    def of(
        state: TrainState, module: nn.Module, optimizer: torch.optim.Optimizer, index: int = 0
    ) -> Snapshot:
        """Look at the tensors where they are: right only as long as nothing trains on. Those that
        all processes hold are the main process's to keep; `index` says which this is.
        """
        parts: list[dict[str, Part]] = []
        for tensors in (module_tensors(module), optimizer_tensors(module, optimizer)):
            of_each = {name: part_of(tensor) for name, tensor in tensors.items()}
            # What is whole has all its rows: of others' parts this process has fewer, or none.
            parts.append({
                name: part for name, part in of_each.items()
                if index == 0 or (part.rows.numel() and part.start)
            })  # fmt: skip
        weights, moments = ({name: part.rows for name, part in held.items()} for held in parts)
        starts = {name: part.start for held in parts for name, part in held.items()}
        return Snapshot(copy.deepcopy(state), weights, moments, starts, weights_file(module))

    def copied(self, into: Snapshot | None) -> Snapshot:
        """Copy the tensors into this machine's memory: into those of an earlier copy if given."""
        old = Snapshot(self.state, {}, {}) if into is None else into
        weights = _copied(self.weights, old.weights)
        return replace(self, weights=weights, moments=_copied(self.moments, old.moments))

    @property
    def bytes(self) -> int:
        """Of all tensors together."""
        return sum(t.nbytes for t in (*self.weights.values(), *self.moments.values()))


def weights_file(module: nn.Module) -> str:
    """Name the file that the weights of a module go into."""
    return ADAPTER_WEIGHTS if is_adapted(module) else WEIGHTS


def _copied(tensors: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    copies = {}
    for name, tensor in tensors.items():
        place = old.get(name)
        if place is None:
            place = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        copies[name] = place.copy_(tensor.detach())
    return copies
