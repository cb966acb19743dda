"""Flat or padded rows: measured on the model itself before the first step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cs336_alignment.data.batching import MIN_SHARED_TOKENS, collate
from cs336_alignment.data.tokenize import TokenizedExample
from cs336_alignment.errors import UserError
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.adapters import adapter_dropout
from cs336_alignment.model.attention import FLAT_ATTENTION, why_not_flat
from cs336_alignment.model.fits import embedding_rows
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.sharding import is_sharded, past_the_hooks

PROBE_LENGTHS = (5, 9, 9)
LEAK_RATIO = 20  # a flat row must be this much nearer to the padded rows than one without borders
NOISE_RATIO = 4  # or, in bfloat16, as near to float32 as padded rows are, but for this factor
LOUD = 30.0  # logits as large as those of trained models
HALF_NEAR = 0.2  # what 16 bits leave of them; another head is nats away


@dataclass(frozen=True)
class BatchingChoice:
    """The layout of microbatches, and why, in words."""

    batching: Batching
    reason: str


def choose_batching(
    policy: Policy, wanted: str, longest: int, neftune_alpha: float | None = None
) -> BatchingChoice:
    """Decide between flat and padded microbatches by measuring them on the model itself.

    Three short random rows go through the model as transformers would compute them, padded, and
    flat; rows that begin alike also with their prefix computed once. The flat row must agree with
    the padded rows 20 times better than a row whose borders are ignored, in the weights' precision
    and in the compute dtype, which may have kernels of its own. A head that does not reproduce the
    model's own logits is replaced by the model's own.

    Args:
        policy: on its device, not wrapped.
        wanted: `auto`, `flat`, `flat_shared_prefix` or `padded`.
        longest: tokens of the longest example.
        neftune_alpha: of the noise that each example's embeddings get; None: there is none.

    Returns:
        The choice; `auto` falls back to flat, then to padded, and says why.

    Raises:
        UserError: what was asked for is not exact for this architecture (78).
    """
    rows, compute = probe_rows(policy), policy.autocast_dtype
    with _probing(policy):
        if policy.head is not None and not _head_is_exact(policy, rows):
            policy.head = None
        if wanted == "padded":
            return BatchingChoice("padded", "padded, as asked")
        found = why_not_flat(policy.model, longest) or _measure(policy, rows, "flat", compute)
        if isinstance(found, str):
            return _fall_back(wanted, "padded", found)
        exact = f"equal to padded within {found:.0e} on this model"
        if wanted == "flat":
            return BatchingChoice("flat", f"flat, as asked, no padding; {exact}")
        if neftune_alpha is not None:
            name = f"trainer.neftune_alpha={neftune_alpha:g}"
            found = f"a shared prefix would share its noise ({name})"
        elif names := dropout_options(policy):
            found = f"a shared prefix would share its dropout ({', '.join(names)})"
        else:
            alike = probe_rows(policy, prefix=MIN_SHARED_TOKENS + 1)
            found = _measure(policy, alike, "flat_shared_prefix", compute)
    if isinstance(found, str):
        return _fall_back(wanted, "flat", found)
    exact = f"equal to padded within {found:.0e} on this model"
    return BatchingChoice(
        "flat_shared_prefix", f"flat, no padding, a prefix that all share once; {exact}"
    )


def _fall_back(wanted: str, batching: Batching, reason: str) -> BatchingChoice:
    if wanted == "auto" or wanted == batching:
        return BatchingChoice(batching, f"{batching}: {reason}")
    raise UserError(
        "C106",
        f"trainer.batching={wanted} is not exact for this model: {reason}",
        hint=f"trainer.batching={batching}, or auto, which falls back by itself",
    )


def _measure(
    policy: Policy,
    rows: Sequence[TokenizedExample],
    batching: Batching,
    compute: torch.dtype | None,
) -> str | float:
    """Say what is wrong with a flat layout, or else how far it is from padded rows."""
    if policy.model.config._attn_implementation != FLAT_ATTENTION:
        return "the architecture does not use transformers' attention interface"
    padded, floor = _log_probs(policy, rows, "padded"), 1e-6
    if policy.compute_dtype is not None and is_sharded(policy):  # gathered in it: no float32 to see
        alone = torch.cat([_log_probs(policy, [row], "padded") for row in rows])
        floor = max(floor, NOISE_RATIO * _apart(alone, padded))
    ids = torch.cat([row.input_ids for row in rows])
    joined = TokenizedExample(ids, torch.cat([row.response_mask for row in rows]), 0)
    leak = _apart(_log_probs(policy, [joined], "padded"), padded)
    try:
        error = _apart(_log_probs(policy, rows, batching), padded)
        if not error <= max(leak / LEAK_RATIO, floor):
            return f"a {batching} row differs from padded ones by {error:.0e}"
        if compute is not None:
            policy.autocast_dtype = compute
            noise = _apart(_log_probs(policy, rows, "padded"), padded)
            narrow = _apart(_log_probs(policy, rows, batching), padded)
            if not narrow <= max(leak / LEAK_RATIO, NOISE_RATIO * noise):
                name = str(compute).removeprefix("torch.")
                return f"in {name} a {batching} row differs from padded ones by {narrow:.0e}"
    except (RuntimeError, ValueError, TypeError, IndexError) as failure:
        return f"the model does not take flat rows ({failure})"
    finally:
        policy.autocast_dtype = None
    return error


def _apart(got: Tensor, want: Tensor) -> float:
    return (got - want).abs().max().item()


def _head_is_exact(policy: Policy, rows: Sequence[TokenizedExample]) -> bool:
    """Tell whether the head in chunks gives the log-probs of the model's own; with logits made as
    large as those of trained models, too: a cap that nobody knows of bends no small ones.
    """
    head, sizes, factor = policy.head, [0.0], 1.0
    assert head is not None

    def measure_and_enlarge(_module: Any, _inputs: Any, logits: Tensor) -> Tensor:
        sizes.append(logits.abs().max().item())
        return logits * factor

    handle = head.linear.register_forward_hook(measure_and_enlarge)
    try:
        exact = _agree(policy, rows)
        if exact and 0 < max(sizes) < LOUD:
            factor = LOUD / max(sizes)
            policy.head = replace(head, scale=head.scale * factor)
            exact = _agree(policy, rows)
    finally:
        handle.remove()
        policy.head = head
    return exact


def _agree(policy: Policy, rows: Sequence[TokenizedExample]) -> bool:
    ours, theirs = _log_probs(policy, rows, "padded"), _reference(policy, rows)
    near = HALF_NEAR if policy.compute_dtype is not None and is_sharded(policy) else 1e-3
    return torch.allclose(ours, theirs.to(ours.dtype), rtol=near, atol=near)


def probe_rows(
    policy: Policy, prefix: int = 1, lengths: Sequence[int] = PROBE_LENGTHS
) -> list[TokenizedExample]:
    """Draw rows, always the same, that begin with the same `prefix` tokens, not trained."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = embedding_rows(policy.model)
    shared = torch.randint(vocabulary, (prefix,), generator=generator)
    rows = []
    for index, length in enumerate(lengths):
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
    return policy(collate(rows, batching=batching).to(policy.device))[0]


def _reference(policy: Policy, rows: Sequence[TokenizedExample]) -> Tensor:
    """Row by row through the whole model, head included, with nothing of this project in
    between.
    """
    parts = []
    for row in rows:
        ids = row.input_ids.to(policy.device)
        with past_the_hooks(policy):
            logits = policy.model(ids[None, :-1], use_cache=False).logits[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_probs = logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        parts.append(log_probs[row.response_mask[1:].to(policy.device)])
    return torch.cat(parts)


def dropout_options(policy: Policy) -> list[str]:
    """Name the dropouts of the model's config; with dropout a result depends on the cut."""
    config = policy.model.config.get_text_config().to_dict()
    of_adapters = adapter_dropout(policy.model)
    return [f"lora.dropout={of_adapters:g}"] * (of_adapters > 0) + [
        f"{name}={value}"
        for name, value in config.items()
        if ("dropout" in name or name.endswith("_pdrop"))
        and not name.startswith(("summary", "classifier"))  # of heads that are not trained here
        and isinstance(value, int | float)
        and value > 0
    ]
