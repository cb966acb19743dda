"""Before the first step: which layout the model takes, and the run's arithmetic in words."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cs336_alignment.config import DEFAULT_MICROBATCH_TOKENS, TrainerConfig
from cs336_alignment.data.batching import (
    MIN_SHARED_TOKENS,
    StepPlan,
    collate,
    plan_microbatches,
    shared_prefix,
)
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.data.tokenize import TokenizedExample
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.attention import FLAT_ATTENTION, why_not_flat
from cs336_alignment.model.loading import embedding_rows
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.step import Cut

PROBE_LENGTHS = (5, 9, 9)
STEPS_LOOKED_AT = 20_000
MICROBATCHES_LOOKED_INTO = 200
LEAK_RATIO = 20  # a flat row must be this much nearer to the padded rows than one without borders


@dataclass(frozen=True)
class BatchingChoice:
    """The layout of microbatches, and why, in words."""

    batching: Batching
    reason: str


def choose_precision(wanted: str, device: torch.device) -> torch.dtype | None:
    """Give the autocast dtype; None computes in the weights' float32.

    `auto` is bfloat16 on a GPU that has it, and float32 elsewhere: on most CPUs bfloat16 is the
    slower one.
    """
    if wanted == "bf16":
        return torch.bfloat16
    if wanted == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return None


def choose_batching(policy: Policy, wanted: str, longest: int) -> BatchingChoice:
    """Decide between flat and padded microbatches by measuring them on the model itself.

    Three short random rows go through the model as transformers would compute them, padded, and
    flat; rows that begin alike also with their prefix computed once. The flat row must agree with
    the padded rows 20 times better than a row whose borders are ignored. A head that does not
    reproduce the model's own logits is replaced by the model's own.

    Args:
        policy: on its device, not wrapped.
        wanted: `auto`, `flat`, `flat_shared_prefix` or `padded`.
        longest: tokens of the longest example.

    Returns:
        The choice; `auto` falls back to flat, then to padded, and says why.

    Raises:
        UserError: what was asked for is not exact for this architecture (78).
    """
    rows = _probe_rows(policy)
    with _probing(policy):
        if policy.head is not None and not torch.allclose(
            _log_probs(policy, rows, "padded"), _reference(policy, rows), rtol=1e-3, atol=1e-3
        ):
            policy.head = None
        if wanted == "padded":
            return BatchingChoice("padded", "padded, as asked")
        reason = why_not_flat(policy.model, longest)
        error = 0.0
        if reason is None:
            reason, error = _measure(policy, rows, "flat")
        if reason is not None:
            return _fall_back(wanted, "padded", reason)
        exact = f"equal to padded within {error:.0e} on this model"
        if wanted == "flat":
            return BatchingChoice("flat", f"flat, as asked, no padding; {exact}")
        if names := dropout_options(policy):
            reason = f"a shared prefix would share its dropout ({', '.join(names)})"
        else:
            alike = _probe_rows(policy, prefix=MIN_SHARED_TOKENS + 1)
            reason, error = _measure(policy, alike, "flat_shared_prefix")
    if reason is not None:
        return _fall_back(wanted, "flat", reason)
    exact = f"equal to padded within {error:.0e} on this model"
    return BatchingChoice(
        "flat_shared_prefix", f"flat, no padding, a prefix that all share once; {exact}"
    )


def _fall_back(wanted: str, batching: Batching, reason: str) -> BatchingChoice:
    if wanted == "auto" or wanted == batching:
        return BatchingChoice(batching, f"{batching}: {reason}")
    raise UserError(
        "C106",
        f"trainer.batching={wanted} is not exact for this model: {reason}",
        ExitStatus.BAD_CONFIG,
        hint=f"trainer.batching={batching}, or auto, which falls back by itself",
    )


def _measure(
    policy: Policy, rows: Sequence[TokenizedExample], batching: Batching
) -> tuple[str | None, float]:
    """Say what is wrong with a flat layout, if anything, and how far it is from padded rows."""
    if policy.model.config._attn_implementation != FLAT_ATTENTION:
        return "the architecture does not use transformers' attention interface", 0.0
    padded = _log_probs(policy, rows, "padded")
    try:
        error = (_log_probs(policy, rows, batching) - padded).abs().max().item()
    except (RuntimeError, ValueError, TypeError, IndexError) as failure:
        return f"the model does not take flat rows ({failure})", 0.0
    joined = TokenizedExample(
        torch.cat([row.input_ids for row in rows]),
        torch.cat([row.response_mask for row in rows]),
        0,
    )
    leak = (_log_probs(policy, [joined], "padded") - padded).abs().max().item()
    if error <= max(leak / LEAK_RATIO, 1e-6):
        return None, error
    return f"a {batching} row differs from padded ones by {error:.0e}", error


def _probe_rows(policy: Policy, prefix: int = 1) -> list[TokenizedExample]:
    """Draw rows that begin with the same `prefix` tokens."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = embedding_rows(policy.model)
    shared = torch.randint(vocabulary, (prefix,), generator=generator)
    rows = []
    for index, length in enumerate(PROBE_LENGTHS):
        ids = torch.cat([shared, torch.randint(vocabulary, (length,), generator=generator)])
        rows.append(TokenizedExample(ids, torch.arange(len(ids)) >= prefix, index))
    return rows


@contextlib.contextmanager
def _probing(policy: Policy) -> Iterator[None]:
    """No dropout, no graph, and the weights' own precision for a moment."""
    training, dtype = policy.training, policy.autocast_dtype
    policy.eval()
    policy.autocast_dtype = None
    try:
        with torch.no_grad():
            yield
    finally:
        policy.train(training)
        policy.autocast_dtype = dtype


def _log_probs(policy: Policy, rows: Sequence[TokenizedExample], batching: Batching) -> Tensor:
    device = next(policy.parameters()).device
    log_probs: Tensor = policy(collate(rows, batching=batching).to(device))[0]
    return log_probs


def _reference(policy: Policy, rows: Sequence[TokenizedExample]) -> Tensor:
    """Row by row through the whole model, head included, with nothing of this project in
    between.
    """
    device = next(policy.parameters()).device
    parts = []
    for row in rows:
        ids = row.input_ids.to(device)
        logits = policy.model(ids[None, :-1], use_cache=False).logits[0]
        log_probs = logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        parts.append(log_probs[row.response_mask[1:].to(device)])
    return torch.cat(parts)


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
        plan_microbatches(
            plan.example_ids(0), lengths,
            num_processes=num_processes, process_index=index,
            microbatch_tokens=cut.microbatch_tokens,
            gradient_accumulation_steps=cut.gradient_accumulation_steps, batching=cut.batching,
        )
        for index in range(num_processes)
    ]  # fmt: skip
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
    if cut.microbatch_tokens is not None and max(lengths) > cut.microbatch_tokens:
        lines.append(
            f"the longest example has {max(lengths):,} tokens, more than a microbatch's "
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
        candidates.append([int(max(range(len(lengths)), key=lengths.__getitem__))])
    for step in steps[:STEPS_LOOKED_AT]:
        candidates += plan_microbatches(
            plan.example_ids(step), lengths,
            num_processes=num_processes, process_index=process_index,
            microbatch_tokens=cut.microbatch_tokens,
            gradient_accumulation_steps=cut.gradient_accumulation_steps, batching=cut.batching,
        )  # fmt: skip
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


def rehearse_microbatch(
    policy: Policy, dataset: TokenizedDataset, ids: Sequence[int], cut: Cut
) -> str:
    """Run a microbatch forward and backward and throw its gradient away; returns what it took.

    Raises:
        UserError: there is not enough memory (70).
    """
    device = next(policy.parameters()).device
    batch = collate([dataset[i] for i in ids], batching=cut.batching).to(device)
    torch.manual_seed(0)  # dropout; every step seeds anew
    try:
        with telling_out_of_memory(device):
            log_probs, _ = policy(batch, True)
            log_probs.sum().backward()
    finally:
        policy.zero_grad(set_to_none=True)
    tokens = batch.input_ids.numel()
    return (
        f"{tokens:,} tokens in the largest microbatch, tried with weights, gradients and "
        f"optimizer: peak {peak_memory_gib(device):.2f} GiB"
    )


@contextlib.contextmanager
def telling_out_of_memory(device: torch.device) -> Iterator[None]:
    """Turn what torch raises for want of memory into an error that says what to do (70)."""
    try:
        yield
    except (RuntimeError, MemoryError) as failure:  # torch.OutOfMemoryError is a RuntimeError
        text = str(failure)
        if not isinstance(failure, torch.OutOfMemoryError | MemoryError) and not any(
            sign in text for sign in ("can't allocate memory", "out of memory")
        ):
            raise
        raise UserError(
            "R303",
            f"the memory of the {device.type} does not suffice for a microbatch",
            ExitStatus.INTERNAL,
            got=text.splitlines()[0] if text else None,
            hint="lower trainer.microbatch_tokens or data.max_length, or set "
            "trainer.gradient_checkpointing=true",
        ) from failure


def peak_memory_gib(device: torch.device) -> float:
    """Give this process's peak memory in GiB: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on every platform

    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def dropout_options(policy: Policy) -> list[str]:
    """Name the dropouts of the model's config; with dropout a result depends on the cut."""
    config = policy.model.config.get_text_config().to_dict()
    return [
        f"{name}={value}"
        for name, value in config.items()
        if ("dropout" in name or name.endswith("_pdrop"))
        and not name.startswith(("summary", "classifier"))  # of heads that are not trained here
        and isinstance(value, int | float)
        and value > 0
    ]
