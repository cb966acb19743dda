"""Decoding with a key/value cache of slots: rows of different lengths take their steps together.

n rows, T tokens, P prefix tokens, L longest row, D head size. A row that is over leaves its slot
to the last one, so the rows always fill the first slots and every step reads one dense block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from cs336_alignment.model.attention import (
    FLAT_ATTENTION,
    autocasting,
    causal_attention,
    why_not_flat,
)
from cs336_alignment.model.lm_head import head_logits, head_of

PREFILL_TOKENS = 4096
"""Prompt tokens of one forward pass, so that many long prompts do not need memory at once."""


@dataclass(frozen=True)
class _Prefill:
    """Sequences laid one after another, each behind the shared prefix, into slots from `first`."""

    lengths: Sequence[int]
    first: int


@dataclass(frozen=True)
class _Step:
    """One token for each row; `positions` (n,) are theirs, `mask` (n, 1, 1, L) or None."""

    positions: Tensor
    longest: int
    mask: Tensor | None


class SlotCache:
    """Keys and values of every layer, slot by slot.

    Args:
        slots: rows at once.
        capacity: tokens of a row at most.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.shape = slots, capacity
        self.plan: _Prefill | _Step | None = None
        self._keys: dict[int, Tensor] = {}  # layer → (slots, key heads, capacity, D)
        self._values: dict[int, Tensor] = {}
        self._prefix: dict[int, tuple[Tensor, Tensor]] = {}  # layer → (1, key heads, P, D) each

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None
    ) -> Tensor:
        """Store a layer's keys and values, and attend to what each token may see.

        Args:
            layer: number of the attention layer.
            query: (1, heads, T, D).
            key: (1, key heads, T, D).
            value: like key.
            scaling: of the scores; None: 1 / sqrt(D).

        Returns:
            (1, T, heads, D).
        """
        device = query.device.type
        if torch.is_autocast_enabled(device):  # rotary embeddings widen queries and keys
            dtype = torch.get_autocast_dtype(device)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if self.plan is None:
            self._prefix[layer] = key, value
            return causal_attention(query, key, value, scaling, {}).transpose(1, 2)
        if layer not in self._keys:
            slots, capacity = self.shape
            shape = slots, key.shape[1], capacity, key.shape[3]
            # Zeros: what is masked is still multiplied, and must not be NaN.
            self._keys[layer], self._values[layer] = key.new_zeros(shape), value.new_zeros(shape)
        if isinstance(self.plan, _Step):
            return self._step(self.plan, layer, query, key, value, scaling)
        return self._prefill(self.plan, layer, query, key, value, scaling)

    def _prefill(
        self,
        plan: _Prefill,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
    ) -> Tensor:
        prefix = self._prefix.get(layer)
        outputs, slot, start = [], plan.first, 0
        for length, run in groupby(plan.lengths):
            count = len(list(run))
            end = start + count * length
            q, k, v = (
                x[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1)
                for x in (query, key, value)
            )  # (count, heads, length, D)
            if prefix is not None:
                k, v = (
                    torch.cat([shared.expand(count, -1, -1, -1), own], dim=2)
                    for shared, own in zip(prefix, (k, v), strict=True)
                )
            seen = k.shape[2]
            self._keys[layer][slot : slot + count, :, :seen] = k
            self._values[layer][slot : slot + count, :, :seen] = v
            out = causal_attention(q, k, v, scaling, {})
            outputs.append(out.transpose(1, 2).flatten(0, 1))
            slot, start = slot + count, end
        return torch.cat(outputs).unsqueeze(0)

    def _step(
        self,
        plan: _Step,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
    ) -> Tensor:
        count = len(plan.positions)
        keys, values = self._keys[layer], self._values[layer]
        rows = torch.arange(count, device=query.device)
        keys[rows, :, plan.positions] = key[0].transpose(0, 1)
        values[rows, :, plan.positions] = value[0].transpose(0, 1)
        # Queries that share a key head stand beside each other: they take the place of a query
        # length, and no key is copied for them.
        q = query[0].transpose(0, 1).unflatten(1, (key.shape[1], -1))  # (n, key heads, group, D)
        out = F.scaled_dot_product_attention(
            q, keys[:count, :, : plan.longest], values[:count, :, : plan.longest],
            attn_mask=plan.mask, scale=scaling,
        )  # fmt: skip
        return out.flatten(1, 2).unsqueeze(0)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row's keys and values from one slot to another."""
        for cache in (*self._keys.values(), *self._values.values()):
            cache[target, :, :length] = cache[source, :, :length]


class SlotDecoder:
    """Decodes rows that come and go, for a model whose attention layers take a `SlotCache`.

    Args:
        model: in eval mode, its attention switched to `FLAT_ATTENTION`.
        prefix: tokens that all prompts begin with, computed once here; may be empty.
        slots: rows at once.
        capacity: tokens of a row at most, the prefix among them.
        autocast_dtype: compute dtype; None: the weights' own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefix: Sequence[int],
        *,
        slots: int,
        capacity: int,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        head = head_of(model)
        assert head is not None
        self._model, self._head, self._slots = model, head, slots
        self._autocast_dtype = autocast_dtype
        self._prefix = len(prefix)
        self._lengths: list[int] = []  # of each row, the prefix among it
        self._cache = SlotCache(slots, capacity)
        if prefix:
            self._forward(torch.tensor(prefix), torch.arange(len(prefix)), None)

    @property
    def free(self) -> int:
        """Rows that `admit` takes now."""
        return self._slots - len(self._lengths)

    def admit(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Take more rows, behind those that are there.

        Args:
            prompts: at most `free`; each longer than the prefix and beginning with it.

        Returns:
            (prompts, V) logits of each prompt's next token, float32 or wider.
        """
        logits, start = [], 0
        while start < len(prompts):
            end, total = start, 0
            while end < len(prompts) and (end == start or total <= PREFILL_TOKENS):
                total += len(prompts[end]) - self._prefix
                end += 1
            logits.append(self._admit([list(p[self._prefix :]) for p in prompts[start:end]]))
            start = end
        return torch.cat(logits)

    def _admit(self, suffixes: list[list[int]]) -> Tensor:
        lengths = [len(suffix) for suffix in suffixes]
        plan = _Prefill(lengths, len(self._lengths))
        positions = [torch.arange(self._prefix, self._prefix + length) for length in lengths]
        hidden = self._forward(
            torch.tensor([token for suffix in suffixes for token in suffix]),
            torch.cat(positions), plan,
        )  # fmt: skip
        self._lengths += [self._prefix + length for length in lengths]
        last = torch.tensor(lengths, device=hidden.device).cumsum(0) - 1
        return head_logits(self._head, hidden.index_select(0, last))

    def step(self, tokens: Tensor) -> Tensor:
        """Give each row one token.

        Args:
            tokens: (n,) int64, in the order of the rows.

        Returns:
            (n, V) logits of the next ones.
        """
        positions = torch.tensor(self._lengths)
        longest = max(self._lengths) + 1
        mask = None
        if min(self._lengths) + 1 < longest:
            hidden_from = (torch.arange(longest) > positions[:, None])[:, None, None]
            # Numbers: every layer would make them of truth values again.
            dtype = self._autocast_dtype or self._model.dtype
            mask = torch.zeros(hidden_from.shape, dtype=dtype)
            mask = mask.masked_fill_(hidden_from, float("-inf")).to(self._model.device)
        plan = _Step(positions.to(self._model.device), longest, mask)
        hidden = self._forward(tokens, plan.positions, plan)
        self._lengths = [length + 1 for length in self._lengths]
        return head_logits(self._head, hidden)

    def release(self, row: int) -> None:
        """Let a row go; the last one takes its number."""
        last = len(self._lengths) - 1
        if row != last:
            self._cache.move(last, row, self._lengths[last])
            self._lengths[row] = self._lengths[last]
        self._lengths.pop()

    def _forward(self, tokens: Tensor, positions: Tensor, plan: _Prefill | _Step | None) -> Tensor:
        device = self._model.device
        self._cache.plan = plan
        tokens = tokens.to(device)
        inputs: dict[str, Any] = {
            "input_ids": tokens[None],
            "position_ids": positions.to(device)[None],
            # A 4-D mask is passed through as it is, so none is built; never read.
            "attention_mask": tokens.new_zeros((1, 1, 1, 1), dtype=torch.bool),
            "use_cache": False,
            "slot_cache": self._cache,
        }
        with autocasting(device, self._autocast_dtype):
            return self._model.base_model(**inputs).last_hidden_state[0]  # (T, H)


def slots_work(model: PreTrainedModel, autocast_dtype: torch.dtype | None = None) -> bool:
    """Try slots on the model itself: do two short rows get the numbers of a plain forward pass?

    Args:
        model: in eval mode, its attention switched to `FLAT_ATTENTION` if it can be.
        autocast_dtype: compute dtype; None: the weights' own.
    """
    if head_of(model) is None or model.config._attn_implementation != FLAT_ATTENTION:
        return False
    rows = [[1, 2, 3, 4, 5], [1, 2, 4]]
    following = [6, 7]
    try:
        decoder = SlotDecoder(model, [1, 2], slots=2, capacity=6, autocast_dtype=autocast_dtype)
        got = [decoder.admit(rows), decoder.step(torch.tensor(following))]
        decoder.release(0)
        got.append(decoder.step(torch.tensor([8])))
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False  # an architecture with an interface of its own
    longer = [[*row, token] for row, token in zip(rows, following, strict=True)]
    width = 1e-3 if autocast_dtype is None and model.dtype.itemsize >= 4 else 0.1
    for logits, sequences in zip(got, (rows, longer, [[*longer[1], 8]]), strict=True):
        for ours, sequence in zip(logits, sequences, strict=True):
            plain = model(input_ids=torch.tensor([sequence], device=model.device), use_cache=False)
            theirs = plain.logits[0, -1].to(ours.dtype)
            if not torch.allclose(ours, theirs, rtol=width, atol=width):
                return False
    return True


@contextlib.contextmanager
def flat_attention_of(model: PreTrainedModel, longest: int) -> Iterator[bool]:
    """Switch a model's attention to the one that takes slots, if it can, for the time of a block;
    else away from it: shorter rows than these may be trained with it.

    Args:
        model: any.
        longest: tokens of the longest row that will come.

    Yields:
        Whether it takes slots now.
    """
    before = model.config._attn_implementation
    flat = why_not_flat(model, longest) is None
    if flat and before != FLAT_ATTENTION:
        model.set_attn_implementation(FLAT_ATTENTION)
    elif not flat and before == FLAT_ATTENTION:
        model.set_attn_implementation("sdpa")
    try:
        yield flat
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
