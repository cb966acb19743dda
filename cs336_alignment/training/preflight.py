"""Before the first step: precision and cut are chosen, and the arithmetic is put into words."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from cs336_alignment.config import DEFAULT_MICROBATCH_TOKENS, TrainerConfig
from cs336_alignment.data.batching import StepPlan, collate, shared_prefix
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.errors import UserError, first_line
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.compile import compile_layers
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.batching_choice import probe_rows
from cs336_alignment.training.step import Cut


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
        policy(batch.to(policy.device))[0].sum().backward()
    except Exception as failure:  # of a hundred kinds
        raise UserError(
            "C118",
            "torch.compile fails on this machine or model",
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
    first = plan.example_ids(0)
    of_each = [cut.of_process(first, lengths, num_processes, i) for i in range(num_processes)]
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
