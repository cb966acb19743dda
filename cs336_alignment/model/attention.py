"""Attention over a flat row: many sequences in one row of tokens, each attending only to itself
and, if there is one, to the prefix that all share (as in Prefix Grouper, arXiv 2506.05433).

T flat tokens, K keys, D head size. Registered with transformers under the name `cs336_flat`;
without a layout it is plain SDPA, so the same model also generates and takes padded batches.
"""

from __future__ import annotations

import contextlib
import inspect
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from cs336_alignment.microbatch import FlatLayout, SharedPrefix

if TYPE_CHECKING:  # it needs the switch below
    from cs336_alignment.model.slots import SlotCache

FLAT_ATTENTION = "cs336_flat"


def flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    flat_layout: FlatLayout | None = None,
    slot_cache: SlotCache | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each sequence of a flat row; transformers' attention interface.

    Args:
        module: the attention layer.
        query: (1, heads, T, D).
        key: (1, key heads, T, D), fewer heads with grouped queries.
        value: (1, key heads, T, D).
        attention_mask: read only without a layout.
        flat_layout: the sequences; None: SDPA as transformers does it.
        slot_cache: while decoding, what stores keys and values and attends to them.
        dropout: probability of dropping an attention weight.
        scaling: of the scores; None: 1 / sqrt(D).

    Returns:
        (1, T, heads, D) and None, since no attention weights are formed.

    Raises:
        ValueError: the layer asks for something that would be left out silently (soft-capped
            scores).
    """
    if flat_layout is None and slot_cache is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"flat attention does not implement {name}")
    if slot_cache is not None:
        layer: Any = module.layer_idx
        return slot_cache.attend(layer, query, key, value, scaling), None
    assert flat_layout is not None
    return _attend(query, key, value, flat_layout, dropout, scaling), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # shapes change with every microbatch
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: FlatLayout,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # Rotary embeddings widen queries and keys to float32; SDPA would narrow them by itself.
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if layout.prefix is not None:
        key, value = (_with_prefix(x, layout.prefix) for x in (key, value))
    if query.is_cuda and _has_kernel(query.device.index) and takes_varlen(query, value, dropout):
        return _varlen_attention(query, key, value, layout, scaling)
    return _grouped_attention(query, key, value, layout, dropout, scaling)


@lru_cache
def _has_kernel(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def autocasting(
    device: torch.device, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager[object]:
    """Compute products in a dtype; None: as the caller's own autocast says, or not in another."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def takes_varlen(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Tell whether torch's kernel for rows of several sequences takes these; SDPA takes the rest.

    Args:
        query: (1, heads, T, D).
        value: (1, key heads, K, D of the values).
        dropout: of the attention weights.
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    size = query.shape[3]
    return half and dropout == 0.0 and size == value.shape[3] and size % 8 == 0 and size <= 256


def _grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: FlatLayout,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    own = [count * length for count, length in layout.groups]
    seen = own.copy()
    if layout.prefix is not None:  # it stands before the keys of every sequence but its own
        seen[1:] = [count * (layout.prefix.length + length) for count, length in layout.groups[1:]]
    # Tokens first, as they lie in memory, and split instead of sliced: then the backward pass is
    # one concatenation without rearrangement, and no full-size zeros.
    parts = (
        x.squeeze(0).transpose(0, 1).split(sizes)
        for x, sizes in ((query, own), (key, seen), (value, seen))
    )
    outputs = []
    for (count, _), *part in zip(layout.groups, *parts, strict=True):
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in part)
        out = causal_attention(q, k, v, scaling, layout.masks, dropout)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    masks: dict[Any, Tensor],
    dropout: float = 0.0,
) -> Tensor:
    """Attend causally, the last query aligned with the last key: what keys there are besides those
    of the queries, all queries see. (B, heads, S, D); the keys may have fewer heads and be longer.
    `masks` keeps those that are made, for the next layer.
    """
    length, seen = query.shape[2], key.shape[2]
    kind = length, seen, query.dtype
    if seen > length and kind not in masks:  # is_causal aligns the first query with the first key
        masks[kind] = query.new_full(kind[:2], -torch.inf).triu_(seen - length + 1)
    mask = masks.get(kind)
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def _with_prefix(x: Tensor, prefix: SharedPrefix) -> Tensor:
    """Keys or values of the row (1, heads, T, D) → of every sequence (1, heads, K, D)."""
    index = prefix.key_index, prefix.copies, prefix.own_index, prefix.length
    shared: Tensor = _Shared.apply(x.squeeze(0).transpose(0, 1), *index)
    return shared.transpose(0, 1).unsqueeze(0)


class _Shared(torch.autograd.Function):
    """`x.index_select(0, key_index)`, with a backward that sums in a fixed order and in float32
    (index_select's own adds atomically on CUDA, in the dtype of x).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, key_index: Tensor, copies: Tensor, own_index: Tensor, length: int
    ) -> Tensor:
        ctx.save_for_backward(copies, own_index)
        ctx.length = length
        return x.index_select(0, key_index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads  # (K, heads, D)
        copies, own_index = ctx.saved_tensors
        result = grad.index_select(0, own_index)
        of_copies = grad.index_select(0, copies).unflatten(0, (-1, ctx.length))
        exact = torch.promote_types(grad.dtype, torch.float32)
        result[: ctx.length] = of_copies.sum(0, dtype=exact)
        return result, None, None, None, None


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: FlatLayout, scaling: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # CUDA only

    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}  # causal
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11
            groups = query.shape[1] // key.shape[1]
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    borders = layout.cu_seq_lens
    # The last query is aligned with the last key, as a prefix needs it.
    key_borders = borders if layout.prefix is None else layout.prefix.cu_key_lens
    longest = layout.max_length
    out = varlen_attn(q, k, v, borders, key_borders, longest, longest, **options)
    assert isinstance(out, Tensor)  # a tuple only if auxiliary outputs are asked for
    return out.unsqueeze(0)


AttentionInterface.register(FLAT_ATTENTION, flat_attention)
AttentionMaskInterface.register(FLAT_ATTENTION, sdpa_mask)


def why_not_flat(model: PreTrainedModel, max_length: int) -> str | None:
    """Name what in an architecture's config rules out flat rows; None if nothing does.

    This reads the config; whether the flat row really gives the padded row's numbers is then
    measured on the model itself (`cs336_alignment.training.batching_choice.choose_batching`).

    Args:
        model: the model as loaded.
        max_length: tokens of the longest example; a sliding window at least as wide never bites.
    """
    config: PreTrainedConfig = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None):
        return "attention scores are soft-capped"
    if not getattr(model, "_supports_attention_backend", True) or not getattr(
        model, "_supports_sdpa", False
    ):
        return "the architecture does not use transformers' attention interface"
    if getattr(model, "_is_stateful", False):
        return "the architecture carries a recurrent state"
    window = getattr(config, "sliding_window", None)
    layer_types = set(getattr(config, "layer_types", None) or ())
    if window and window < max_length and (not layer_types or "sliding_attention" in layer_types):
        return f"its sliding window ({window}) is shorter than the longest example ({max_length})"
    if layer_types - {"full_attention", "sliding_attention"}:
        return f"layers of type {', '.join(sorted(layer_types))}"
    return None
