"""Before the first step: which layout the model takes, and the run's arithmetic in words."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cs336_alignment.config import DEFAULT_MICROBATCH_TOKENS, TrainerConfig
from cs336_alignment.data.batching import Lengths, StepPlan, collate, plan_microbatches
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.data.tokenize import TokenizedExample
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.model.attention import FLAT_ATTENTION, why_not_flat
from cs336_alignment.model.loading import embedding_rows
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.step import Cut

PROBE_LENGTHS = (5, 9, 9)
STEPS_LOOKED_AT = 20_000
LEAK_RATIO = 20  # a flat row must be this much nearer to the padded rows than one without borders


@dataclass(frozen=True)
class Batching:
    """The layout of microbatches, and why, in words."""

    flat: bool
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


def choose_batching(policy: Policy, wanted: str, longest: int) -> Batching:
    """Decide between flat and padded microbatches by measuring both on the model itself.

    Three short random rows go through the model as transformers would compute them, padded, and
    flat. The flat row must agree with the padded rows 20 times better than a row whose borders are
    ignored. A head that does not reproduce the model's own logits is replaced by the model's own.

    Args:
        policy: on its device, not wrapped.
        wanted: `auto`, `flat` or `padded`.
        longest: tokens of the longest example.

    Returns:
        The choice; `auto` falls back to padded and says why.

    Raises:
        UserError: `flat` was asked for and is not exact for this architecture (78).
    """
    rows = _probe_rows(policy)
    with _probing(policy):
        padded = _log_probs(policy, rows, flat=False)
        if policy.head is not None and not torch.allclose(
            padded, _reference(policy, rows), rtol=1e-3, atol=1e-3
        ):
            policy.head = None
            padded = _log_probs(policy, rows, flat=False)
        if wanted == "padded":
            return Batching(False, "padded, as asked")
        reason = why_not_flat(policy.model, longest)
        if reason is None:
            reason, error = _measure_flat(policy, rows, padded)
            if reason is None:
                return Batching(
                    True, f"flat, no padding; equal to padded within {error:.0e} on this model"
                )
    if wanted == "flat":
        raise UserError(
            "C106",
            f"trainer.batching=flat is not exact for this model: {reason}",
            ExitStatus.BAD_CONFIG,
            hint="trainer.batching=padded, or auto, which falls back by itself",
        )
    return Batching(False, f"padded: {reason}")


def _measure_flat(
    policy: Policy, rows: Sequence[TokenizedExample], padded: Tensor
) -> tuple[str | None, float]:
    if policy.model.config._attn_implementation != FLAT_ATTENTION:
        return "the architecture does not use transformers' attention interface", 0.0
    try:
        error = (_log_probs(policy, rows, flat=True) - padded).abs().max().item()
    except (RuntimeError, ValueError, TypeError, IndexError) as failure:
        return f"the model does not take flat rows ({failure})", 0.0
    joined = TokenizedExample(
        torch.cat([row.input_ids for row in rows]),
        torch.cat([row.response_mask for row in rows]),
        0,
    )
    leak = (_log_probs(policy, [joined], flat=False) - padded).abs().max().item()
    if error <= max(leak / LEAK_RATIO, 1e-6):
        return None, error
    return f"a flat row differs from padded ones by {error:.0e}", error


def _probe_rows(policy: Policy) -> list[TokenizedExample]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = embedding_rows(policy.model)
    rows = []
    for index, length in enumerate(PROBE_LENGTHS):
        mask = torch.ones(length, dtype=torch.bool)
        mask[0] = False
        rows.append(
            TokenizedExample(torch.randint(vocabulary, (length,), generator=generator), mask, index)
        )
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


def _log_probs(policy: Policy, rows: Sequence[TokenizedExample], *, flat: bool) -> Tensor:
    device = next(policy.parameters()).device
    log_probs: Tensor = policy(collate(rows, flat=flat).to(device))[0]
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
        parts.append(logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1))
    return torch.cat(parts)


def choose_cut(config: TrainerConfig, *, flat: bool) -> Cut:
    """Fill in the microbatch budget if neither it nor the accumulation is given."""
    tokens, accumulation = config.microbatch_tokens, config.gradient_accumulation_steps
    if tokens is None and accumulation is None:
        tokens = DEFAULT_MICROBATCH_TOKENS
    return Cut(tokens, accumulation, flat)


def describe_batches(
    plan: StepPlan, cut: Cut, lengths: Lengths, num_processes: int, total_steps: int
) -> list[str]:
    """Write the batch arithmetic as equations, from the first step's real microbatches."""
    first = plan.example_ids(0)
    counts = [
        len(
            plan_microbatches(
                first,
                lengths,
                num_processes=num_processes,
                process_index=index,
                microbatch_tokens=cut.microbatch_tokens,
                gradient_accumulation_steps=cut.gradient_accumulation_steps,
                flat=cut.flat,
            )
        )
        for index in range(num_processes)
    ]
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
    return lines


def largest_microbatch(
    plan: StepPlan,
    cut: Cut,
    lengths: Lengths,
    steps: range,
    *,
    num_processes: int,
    process_index: int,
) -> list[int]:
    """Find the microbatch with most tokens, padding included, of those that this process will take.

    Args:
        plan: step → example ids.
        cut: of a step into microbatches.
        lengths: tokens of every example, by id.
        steps: that this run will take; of very many only the first are looked at, besides the
            longest example of all.
        num_processes: how many share a step.
        process_index: which of them this is.
    """

    def size(ids: Sequence[int]) -> int:
        if not ids:
            return 0
        of_each = [int(lengths[i]) for i in ids]
        return sum(of_each) if cut.flat else len(ids) * max(of_each)

    candidates: list[list[int]] = []
    if len(steps) > STEPS_LOOKED_AT:
        candidates.append([int(max(range(len(lengths)), key=lengths.__getitem__))])
    for step in steps[:STEPS_LOOKED_AT]:
        candidates += plan_microbatches(
            plan.example_ids(step), lengths,
            num_processes=num_processes, process_index=process_index,
            microbatch_tokens=cut.microbatch_tokens,
            gradient_accumulation_steps=cut.gradient_accumulation_steps, flat=cut.flat,
        )  # fmt: skip
    return max(candidates, key=size, default=[])


def rehearse_microbatch(
    policy: Policy, dataset: TokenizedDataset, ids: Sequence[int], cut: Cut
) -> str:
    """Run a microbatch forward and backward and throw its gradient away; returns what it took.

    Raises:
        UserError: there is not enough memory (70).
    """
    device = next(policy.parameters()).device
    batch = collate([dataset[i] for i in ids], flat=cut.flat).to(device)
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
        and isinstance(value, int | float)
        and value > 0
    ]
