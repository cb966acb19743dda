"""What training will take of memory: how the parts add up, are divided among processes and placed,
and what is refused because it cannot fit.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.config import Config, OptimizerConfig, ParallelConfig
from cs336_alignment.config_clashes import clashes
from cs336_alignment.errors import UserError
from cs336_alignment.machine_memory import Memory, found_memory
from cs336_alignment.model.source import ModelSource
from cs336_alignment.training.optimizer import allocate_state, build_optimizer
from cs336_alignment.training.without_values import ReadAsOne, without_values

SHARDED = "fsdp2"  # parallel.strategy
GRADIENTS = "gradients"
# torchao (optim/quant_utils.py): smaller tensors, and those that no block divides, stay float32.
EIGHT_BIT_BLOCK, EIGHT_BIT_LEAST, EIGHT_BIT_MAP = 256, 4096, 256 * 4


@dataclass(frozen=True)
class Needs:
    """Bytes that one process needs.

    Attributes:
        weights: parameters and buffers.
        gradients: of what is trained.
        state: the optimizer's.
        shared: what dividing the work among processes adds.
        microbatch: by part, what else is alive at the worst moment of a forward and backward pass;
            of the gradients those that are there by then.
        stepping: what the optimizer needs in passing.
    """

    weights: int
    gradients: int
    state: int
    shared: int = 0
    microbatch: Counter[str] = field(default_factory=Counter)
    stepping: int = 0

    @property
    def certain(self) -> int:
        """What there must be room for, whatever the microbatch."""
        return self.weights + self.gradients + self.state + self.shared

    @property
    def at_microbatch(self) -> int:
        """All that is alive at the worst moment of a forward and backward pass."""
        return self.weights + self.state + self.shared + self.microbatch.total()

    @property
    def at_step(self) -> int:
        """All that is alive at the worst moment of the optimizer's step."""
        return self.certain + self.stepping

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.at_microbatch, self.at_step)


def divided(
    needs: Needs, model: PreTrainedModel, parallel: ParallelConfig, processes: int, *,
    accumulates: bool, compute_bytes: int,
) -> Needs:  # fmt: skip
    """Give what each process needs, from what one that knows of no other would.

    DDP (Li and others, arXiv 2006.15704) keeps buckets as large as all gradients; `.grad` is a view
    of them once a step's last microbatch has been reduced, and apart from them in those before.
    FSDP2 (`fully_shard`) divides weights, gradients and state; gathered at a time are what lies
    outside the blocks, with its gradient, and of blocks the one that is computed, the next one (all
    of them without `reshard_after_forward`), and one's gradient, where they are trained. Without
    `shard_gradients` they wait whole for the last microbatch. Activations are each process's own.

    Args:
        needs: of one process, of the microbatch that each of them takes.
        model: its blocks are looked at, not its values.
        parallel: how the processes share the work.
        processes: how many.
        accumulates: whether a step has several microbatches.
        compute_bytes: of a number in the compute dtype, in which parameters are gathered.
    """
    if processes == 1 and parallel.strategy != SHARDED:
        return needs
    parts = needs.microbatch.copy()
    if parallel.strategy != SHARDED:
        if not accumulates:
            parts.pop(GRADIENTS, None)
            return replace(needs, gradients=0, shared=needs.gradients, microbatch=parts)
        return replace(needs, shared=needs.gradients)
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [_sizes(module) for module in model.modules() if type(module).__name__ in names]
    numbers, trained = zip(*blocks, strict=True) if blocks else ((0,), (0,))
    root, of_root = _sizes(model)
    at_once = 2 * max(numbers) if parallel.reshard_after_forward else sum(numbers)
    gathered = root - sum(numbers) + of_root - sum(trained) + at_once + max(trained)
    waiting = needs.gradients if accumulates and not parallel.shard_gradients else 0
    parts[GRADIENTS] //= processes
    return replace(
        needs,
        weights=needs.weights // processes,
        gradients=needs.gradients // processes,
        state=needs.state // processes,
        shared=compute_bytes * gathered + waiting,
        microbatch=parts,
    )


def placed(needs: Needs, config: Config, device: torch.device) -> dict[torch.device, Needs]:
    """Say what of it each memory must hold; see `parallel.cpu_offload`.

    torch rounds blocks of pinned memory up to powers of two, which is not counted.

    Args:
        needs: of each process.
        config: of the run.
        device: where it computes.
    """
    if device.type == "cpu" or not config.parallel.cpu_offload:
        return {device: needs}
    parts = needs.microbatch.copy()
    gradients = Counter({GRADIENTS: parts.pop(GRADIENTS, 0)})
    return {
        device: Needs(0, 0, 0, needs.shared, parts),
        torch.device("cpu"): replace(needs, shared=0, microbatch=gradients),
    }


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Count all values of the parameters, and the trained ones."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def certain_needs(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    dtype: torch.dtype | None,
    processes: int,
) -> Needs | str:
    """Count weights, gradients and optimizer state of each process, or say why that cannot be done
    before the model is loaded. The arguments are those of `without_values`.

    Raises:
        UserError: what the run would end with, too, once the model is loaded.
    """
    try:
        model = without_values(source, tokenizer, config, dtype)
        state = state_bytes(model, config.optimizer, config.trainer.ema_decay)
        needs = Needs(*held_bytes(model), state)
    except UserError as failure:
        if failure.code != "M103":  # whose cause may be code that reads values
            raise
        return failure.message
    except (RuntimeError, ValueError, TypeError) as failure:  # code of libraries reads values
        return str(failure).strip().partition("\n")[0] or type(failure).__name__
    if config.parallel.strategy != SHARDED:  # DDP's buckets hang on how many microbatches there are
        return needs
    width = (dtype or torch.float32).itemsize
    return divided(needs, model, config.parallel, processes, accumulates=False, compute_bytes=width)


def state_bytes(model: nn.Module, config: OptimizerConfig, ema_decay: float | None = None) -> int:
    """Count what the optimizer keeps of a model that has no values, and a moving average."""
    trained = [p for p in model.parameters() if p.requires_grad]
    average = average_bytes(model, ema_decay)
    if config.state_bits == 8:  # torchao compiles its step, which takes tensors with values
        return average + sum(_eight_bit_state(p.numel()) for p in trained)
    optimizer = build_optimizer(model, config)
    with ReadAsOne():
        allocate_state(optimizer)
    states = (value for state in optimizer.state.values() for value in state.values())
    return average + sum(value.nbytes for value in states if isinstance(value, Tensor))


def average_bytes(model: nn.Module, ema_decay: float | None) -> int:
    """Count what a moving average of the weights takes; see `MovingAverage`."""
    return 0 if ema_decay is None else held_bytes(model)[1]


def _eight_bit_state(numel: int) -> int:
    if numel < EIGHT_BIT_LEAST or numel % EIGHT_BIT_BLOCK:
        return 2 * numel * 4 + 4
    return 2 * (numel + numel // EIGHT_BIT_BLOCK * 4 + EIGHT_BIT_MAP) + 4


def held_bytes(model: nn.Module) -> tuple[int, int]:
    """Count the bytes of weights and of gradients."""
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers())), gradients


def device_memory(device: torch.device, local_processes: int) -> Memory | None:
    """Find the memory that each process has of a device; None where nobody tells.

    Args:
        device: a CPU's memory is divided, a GPU is each process's own.
        local_processes: on this machine.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free)
    found = found_memory()
    return None if found is None else found.share(local_processes)


def refuse_too_large(
    needs: Needs, found: Memory | None, device: torch.device, config: Config
) -> str | None:
    """Refuse what cannot fit, whatever the microbatch.

    Args:
        needs: of each process.
        found: what each has.
        device: where.
        config: of the run.

    Returns:
        A warning if it would fit, and there is too little now; else None.

    Raises:
        UserError: it cannot (78).
    """
    if found is None or needs.certain <= found.free:
        return None
    sizes = (needs.weights, needs.gradients, needs.state, needs.shared)
    names = "of weights", "of gradients", "of optimizer state", "gathered or reduced"
    parts = [f"{gib(size)} {name}" for size, name in zip(sizes, names, strict=True) if size]
    text = f"{gib(needs.certain)} = {' + '.join(parts)}"
    if needs.certain <= found.total:
        return f"training takes {text}, and {gib(found.free)} of {gib(found.total)} are free now"
    ways = ways_to_less(config, needs, found.total)
    if device.type == "cuda" and needs.weights and (
        _combine(config, "parallel", strategy=SHARDED, cpu_offload=True)
    ):  # fmt: skip
        ways.append(f"parallel={SHARDED} parallel.cpu_offload=true, into the machine's memory")
    if needs.weights and _combine(config, "parallel", strategy=SHARDED):
        count = math.ceil(needs.certain / found.total)
        more = "more" if config.lora.active else f"{count} times the"
        # The processes of one machine share its memory; each has a GPU of its own.
        what = "machines" if device.type == "cpu" else "GPUs"
        ways.append(f"parallel={SHARDED} on {more} {what}")
    share = found.total / needs.certain
    ways += [f"a model of {share:.0%} of its size", f"a {device.type} with more memory"]
    raise UserError(
        "R308",
        f"the model is too large to be trained in the memory of this {device.type}",
        expected=f"at most {gib(found.total)} for each process",
        got=text,
        hint=", or ".join(ways),
    )


def ways_to_less(config: Config, needs: Needs, room: float = math.inf) -> list[str]:
    """Name the keys that combine with a config, leave less of optimizer state and gradients, and
    fit into so many bytes.
    """
    ways = []
    less = needs.certain - needs.state + needs.state // 4
    if config.optimizer.state_bits != 8 and _combine(config, "optimizer", state_bits=8) and (
        less <= room
    ):  # fmt: skip
        ways.append(f"optimizer.state_bits=8 (about {gib(less)})")
    if not config.lora.active and _combine(config, "lora", r=16) and (
        0 < needs.weights <= room
    ):  # fmt: skip
        ways.append(f"lora.r=16 (little more than the weights' {gib(needs.weights)})")
    return ways


def _combine(config: Config, section: str, **values: Any) -> bool:
    """Tell whether other values of a section would combine with the rest."""
    changed: Any = {section: replace(getattr(config, section), **values)}
    return next(clashes(replace(config, **changed)), None) is None


def gib(size: float) -> str:
    """Write bytes down for people."""
    return f"{size / 2**30:,.2f} GiB"
