"""Before the first step: the run's arithmetic in words, and the largest microbatch tried."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from cs336_alignment.config import DEFAULT_MICROBATCH_TOKENS, TrainerConfig
from cs336_alignment.data.batching import StepPlan, collate, shared_prefix
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.errors import ExitStatus, UserError, first_line
from cs336_alignment.machine_memory import peak_resident_memory
from cs336_alignment.microbatch import Batching, Microbatch
from cs336_alignment.model.compile import compile_layers
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.batching_choice import probe_rows
from cs336_alignment.training.step import Cut

STEPS_LOOKED_AT = 20_000
MICROBATCHES_LOOKED_INTO = 200
SHORT_SECONDS = 1.0  # a first time as short as this is mostly what is done but once


def choose_precision(wanted: str, device: torch.device) -> torch.dtype | None:
    """Give the autocast dtype; None computes in the weights' float32.

    `auto` is bfloat16 on a GPU that has it, and float32 elsewhere: on most CPUs bfloat16 is the
    slower one.
    """
    if wanted == "bf16" or (wanted == "auto" and _computes_bf16(device)):
        return torch.bfloat16
    return None


def _computes_bf16(device: torch.device) -> bool:
    # GPUs older than Ampere emulate it: it runs, slower than float32.
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def doubt_about(compute: torch.dtype | None, device: torch.device) -> str:
    """Say in brackets what speaks against a compute dtype that was asked for; empty if nothing."""
    if compute != torch.bfloat16 or _computes_bf16(device):
        return ""
    where = "this GPU emulates" if device.type == "cuda" else "most CPUs emulate"
    return f" ({where} it: fp32 may be faster)"


def warm_up_compiled(policy: Policy, batching: Batching) -> None:
    """Compile the layers now, on rows that are always the same: a resumed run then computes with
    the same kernels.

    Raises:
        UserError: there is no compiler, or it fails on this model (78).
    """
    compile_layers(policy.model)
    batch = collate(probe_rows(policy, lengths=(24, 40)), batching=batching)
    try:
        policy(batch.to(next(policy.parameters()).device))[0].sum().backward()
    except Exception as failure:  # of a hundred kinds
        raise UserError(
            "C118",
            "torch.compile fails on this machine or model",
            ExitStatus.BAD_CONFIG,
            got=f"{type(failure).__name__}: {first_line(failure)}",
            hint="on a CPU it needs a C++ compiler (g++); trainer.compile=false does without",
        ) from failure
    finally:
        policy.zero_grad(set_to_none=True)


def choose_cut(config: TrainerConfig, batching: Batching) -> Cut:
    """Fill in the microbatch budget if neither it nor the accumulation is given."""
    tokens, accumulation = config.microbatch_tokens, config.gradient_accumulation_steps
    if tokens is None and accumulation is None:
        tokens = DEFAULT_MICROBATCH_TOKENS
    return Cut(tokens, accumulation, batching)


def describe_batches(
    plan: StepPlan, cut: Cut, dataset: TokenizedDataset, num_processes: int, total_steps: int
) -> list[str]:
    """Write the batch arithmetic as equations, from the first step's real microbatches."""
    lengths = dataset.lengths
    of_each = [
        cut.of_process(plan.example_ids(0), lengths, num_processes, index)
        for index in range(num_processes)
    ]
    counts = [len(microbatches) for microbatches in of_each]
    spread = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    limit = (
        f"of at most {cut.microbatch_tokens:,} tokens"
        if cut.microbatch_tokens is not None
        else f"(trainer.gradient_accumulation_steps={cut.gradient_accumulation_steps})"
    )
    last = plan.epoch_size - (plan.steps_per_epoch - 1) * plan.global_batch_size
    lines = [
        f"{plan.global_batch_size} examples a step = {num_processes} "
        f"process{'es' if num_processes > 1 else ''} × {spread} microbatches {limit} (step 1)",
        f"{plan.epoch_size:,} examples / {plan.global_batch_size} a step = "
        f"{plan.steps_per_epoch:,} steps an epoch (the last of {last}); {total_steps:,} in all = "
        f"{total_steps / plan.steps_per_epoch:.4g} epochs",
    ]
    if cut.microbatch_tokens is not None and lengths.max() > cut.microbatch_tokens:
        lines.append(
            f"the longest example has {lengths.max():,} tokens, more than a microbatch's "
            f"{cut.microbatch_tokens:,}: it gets a microbatch of its own"
        )
    if cut.batching == "flat_shared_prefix":
        lines.append(_describe_prefix(list(itertools.chain(*of_each)), dataset))
    return lines


def _describe_prefix(microbatches: Sequence[Sequence[int]], dataset: TokenizedDataset) -> str:
    prefixes = [shared_prefix([dataset[i] for i in ids]) for ids in microbatches]
    spared = sum(
        prefix * (len(ids) - 1) for prefix, ids in zip(prefixes, microbatches, strict=True)
    )
    if not spared:
        return "the microbatches of step 1 begin with no prefix worth sharing"
    total = sum(int(dataset.lengths[i]) - 1 for ids in microbatches for i in ids)
    found = sorted({prefix for prefix in prefixes if prefix})
    text = f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"
    return (
        f"a prefix of {text} tokens is computed once a microbatch: {spared / total:.0%} of step "
        "1's tokens spared"
    )


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
        if not ids:
            return 0
        of_each = [int(lengths[i]) for i in ids]
        return len(ids) * max(of_each) if cut.batching == "padded" else sum(of_each)

    candidates: list[list[int]] = []
    if len(steps) > STEPS_LOOKED_AT:
        candidates.append([int(lengths.argmax())])
    for step in steps[:STEPS_LOOKED_AT]:
        ids = plan.example_ids(step)
        candidates += cut.of_process(ids, lengths, num_processes, process_index)
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
    device = next(policy.parameters()).device
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
    tokens = batch.input_ids.numel()
    text = (
        f"{tokens:,} tokens in the largest microbatch, tried with weights, gradients and "
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
            ExitStatus.INTERNAL,
            got=text.splitlines()[0] if text else None,
            hint="lower trainer.microbatch_tokens or data.max_length; what else this run could do, "
            "`cs336-sft doctor --memory …` with the same words says",
        ) from failure


def peak_memory(device: torch.device) -> int:
    """Give this process's peak memory in bytes: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_memory()
