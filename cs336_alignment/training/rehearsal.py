"""A run's largest microbatch, found and tried before the first step: its memory and its time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from cs336_alignment.data.batching import StepPlan, collate, shared_prefix
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.errors import UserError
from cs336_alignment.machine_memory import peak_resident_memory
from cs336_alignment.microbatch import Microbatch
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.step import Cut

STEPS_LOOKED_AT = 20_000
MICROBATCHES_LOOKED_INTO = 200
SHORT_SECONDS = 1.0  # a first time as short as this is mostly what is done but once


def largest_microbatch(
    plan: StepPlan,
    cut: Cut,
    dataset: TokenizedDataset,
    steps: range,
    *,
    num_processes: int,
    process_index: int,
) -> list[int]:
    """Find the microbatch with most tokens, padding included, of those that this process will take.

    Args:
        plan: step → example ids.
        cut: of a step into microbatches.
        dataset: all examples.
        steps: that this run will take; of very many only the first are looked at, besides the
            longest example of all.
        num_processes: how many share a step.
        process_index: which of them this is.
    """
    lengths = dataset.lengths

    def size(ids: Sequence[int]) -> int:
        of_each = [int(lengths[i]) for i in ids]
        return len(ids) * max(of_each, default=0) if cut.batching == "padded" else sum(of_each)

    candidates: list[list[int]] = []
    if len(steps) > STEPS_LOOKED_AT:
        candidates.append([int(lengths.argmax())])
    for step in steps[:STEPS_LOOKED_AT]:
        candidates += cut.of_process(plan.example_ids(step), lengths, num_processes, process_index)
    if cut.batching == "flat_shared_prefix":
        return _largest_after_sharing(sorted(candidates, key=size, reverse=True), size, dataset)
    return max(candidates, key=size, default=[])


def _largest_after_sharing(
    candidates: Sequence[list[int]], size: Callable[[Sequence[int]], int], dataset: TokenizedDataset
) -> list[int]:
    """Of microbatches in descending order of their size before a prefix is shared."""
    largest: list[int] = []
    most = -1
    for ids in candidates[:MICROBATCHES_LOOKED_INTO]:
        if size(ids) <= most:
            break  # sharing only makes the rest smaller
        rest = size(ids) - (len(ids) - 1) * shared_prefix([dataset[i] for i in ids])
        if rest > most:
            largest, most = ids, rest
    return largest


def accumulates(
    plan: StepPlan, cut: Cut, dataset: TokenizedDataset, steps: range, num_processes: int
) -> bool:
    """Tell whether a step has several microbatches, by the first steps: a gradient is then there
    while the next one is computed.
    """
    return any(
        len(cut.of_process(plan.example_ids(step), dataset.lengths, num_processes, 0)) > 1
        for step in steps[:MICROBATCHES_LOOKED_INTO]
    )


def count_tokens(plan: StepPlan, dataset: TokenizedDataset, steps: range) -> float:
    """Count the tokens of the examples of these steps, of very many by the first ones."""
    looked = steps[:STEPS_LOOKED_AT]
    found = sum(int(dataset.lengths[list(plan.example_ids(step))].sum()) for step in looked)
    return found * len(steps) / max(1, len(looked))


def try_microbatch(policy: Policy, batch: Microbatch) -> None:
    """Calls backward on a microbatch, as a step does that is logged."""
    dtype = torch.promote_types(torch.float32, next(policy.parameters()).dtype)
    slopes = torch.ones(batch.labels.shape, dtype=dtype, device=batch.labels.device)
    policy(batch, True, slopes)[0].sum().backward()


def rehearse_memory(
    policy: Policy,
    plan: StepPlan,
    cut: Cut,
    dataset: TokenizedDataset,
    steps: range,
    processes: Processes,
    note: Callable[[str], None],
) -> None:
    """Take the largest microbatch of a run now: for want of memory it fails here, not in the last
    hour.

    Args:
        policy: see `rehearse_microbatch`.
        plan: step → example ids.
        cut: of a step into microbatches.
        dataset: all examples.
        steps: that the run will take; none: nothing is tried.
        processes: who shares a step; all of them come here.
        note: prints what it took, and how long the run will take.

    Raises:
        UserError: there is not enough memory (70).
    """
    if not steps:
        return
    count = processes.count
    ids = largest_microbatch(
        plan, cut, dataset, steps, num_processes=count, process_index=processes.index
    )
    text, seconds = rehearse_microbatch(
        policy, dataset, ids, cut, agree=processes.agree,
        accumulated=accumulates(plan, cut, dataset, steps, count),
    )  # fmt: skip
    note(f"{'memory':<10} {text}")
    if ids:
        rate = count * int(dataset.lengths[ids].sum()) / seconds
        text = foretell(count_tokens(plan, dataset, steps), len(steps), rate)
        note(f"{'time':<10} about {text}, by this microbatch")


def rehearse_microbatch(
    policy: Policy,
    dataset: TokenizedDataset,
    ids: Sequence[int],
    cut: Cut,
    *,
    accumulated: bool = False,
    agree: Callable[[bool], bool] = lambda own: own,
) -> tuple[str, float]:
    """Run a microbatch forward and backward and throw its gradient away.

    Args:
        policy: not wrapped; it is in training mode afterwards, as it is in a step: models are
            loaded in eval mode, in which layers recompute nothing.
        dataset: all examples.
        ids: of the microbatch.
        cut: its layout is read.
        accumulated: whether the gradient of another microbatch is to be there.
        agree: gives all processes the main process's answer: sharded ones compute together.

    Returns:
        What it took, in words, and its seconds.

    Raises:
        UserError: there is not enough memory (70).
    """
    device = policy.device
    batch = collate([dataset[i] for i in ids], batching=cut.batching).to(device)
    seconds = 0.0
    policy.train()
    try:
        with telling_out_of_memory(device):
            for parameter in policy.parameters():
                if accumulated and parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            for _ in range(2):
                start = time.perf_counter()
                torch.manual_seed(0)  # dropout; every step seeds anew
                try_microbatch(policy, batch)
                wait_for(device)
                seconds = time.perf_counter() - start
                if agree(seconds > SHORT_SECONDS):
                    break
                if not accumulated:
                    policy.zero_grad(set_to_none=True)
    finally:
        policy.zero_grad(set_to_none=True)
    tokens, counted = batch.input_ids.numel(), int(dataset.lengths[list(ids)].sum())
    is_shared = tokens + len(ids) < counted  # flat rows are without their last token
    unshared = f" ({counted:,} before the prefix is shared)" if is_shared else ""
    text = (
        f"{tokens:,} tokens{unshared} in the largest microbatch, tried with weights, gradients and "
        f"optimizer: peak {peak_memory(device) / 2**30:.2f} GiB"
    )
    return text, seconds


def wait_for(device: torch.device) -> None:
    """Wait for what a device still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def foretell(tokens: float, steps: int, tokens_per_second: float) -> str:
    """Say how long a run will take."""
    hours, minutes = divmod(round(tokens / tokens_per_second / 60), 60)
    text = f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min"
    if hours + minutes == 0:
        text = "a minute or less"
    return f"{text} for {steps:,} steps, {tokens:,.0f} tokens at {tokens_per_second:,.0f} a second"


def is_out_of_memory(failure: BaseException | None) -> bool:
    """Tell want of memory from other failures."""
    signs = ("can't allocate memory", "out of memory")
    return isinstance(failure, MemoryError) or any(sign in str(failure) for sign in signs)


@contextlib.contextmanager
def telling_out_of_memory(device: torch.device) -> Iterator[None]:
    """Turn what torch raises for want of memory into an error that says what to do (70)."""
    try:
        yield
    except (RuntimeError, MemoryError) as failure:  # torch.OutOfMemoryError is a RuntimeError
        text = str(failure)
        if not is_out_of_memory(failure):
            raise
        raise UserError(
            "R303",
            f"the memory of the {device.type} does not suffice for a microbatch",
            got=text.splitlines()[0] if text else None,
            hint="lower trainer.microbatch_tokens or data.max_length; what else this run could do, "
            "`cs336-sft doctor --memory …` with the same words says",
        ) from failure


def peak_memory(device: torch.device) -> int:
    """Give this process's peak memory in bytes: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_memory()
