"""Attention over a flat row: many sequences in one row of tokens, each attending only to itself.

T flat tokens, D head size. Registered with transformers under the name `cs336_flat`; without a
layout it is plain SDPA, so the same model also generates and takes padded batches.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from cs336_alignment.microbatch import FlatLayout

FLAT_ATTENTION = "cs336_flat"


def flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    flat_layout: FlatLayout | None = None,
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
        dropout: probability of dropping an attention weight.
        scaling: of the scores; None: 1 / sqrt(D).

    Returns:
        (1, T, heads, D) and None, since no attention weights are formed.

    Raises:
        ValueError: the layer asks for something that would be left out silently (soft-capped
            scores).
    """
    if flat_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"flat attention does not implement {name}")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # Rotary embeddings widen queries and keys to float32; SDPA would narrow them by itself.
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and dropout == 0.0:
        return _varlen_attention(query, key, value, flat_layout, scaling), None
    return _grouped_attention(query, key, value, flat_layout, dropout, scaling), None


def _grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: FlatLayout,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    sizes = [count * length for count, length in layout.groups]
    grouped_queries = query.shape[1] != key.shape[1]
    outputs = []
    # split, not slicing: its backward is one concatenation instead of a full-size zero tensor per
    # part.
    parts = zip(
        layout.groups,
        query.split(sizes, 2),
        key.split(sizes, 2),
        value.split(sizes, 2),
        strict=True,
    )
    for (count, length), q, k, v in parts:
        q, k, v = (_to_batch(x, count, length) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped_queries
        )  # (count, heads, length, D)
        outputs.append(out.transpose(1, 2).reshape(1, count * length, out.shape[1], out.shape[3]))
    return torch.cat(outputs, dim=1)


def _to_batch(x: Tensor, count: int, length: int) -> Tensor:
    """(1, heads, count·length, D) → (count, heads, length, D), a view."""
    return x[0].unflatten(1, (count, length)).transpose(0, 1)


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: FlatLayout, scaling: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # CUDA only, and not in every build

    if key.shape[1] != query.shape[1]:  # enable_gqa is not in every supported torch
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    causal: dict[str, Any] = (
        {"window_size": (-1, 0)}
        if "window_size" in inspect.signature(varlen_attn).parameters
        else {"is_causal": True}
    )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    borders = layout.cu_seq_lens
    out = varlen_attn(
        q, k, v, borders, borders, layout.max_length, layout.max_length, scale=scaling, **causal
    )
    assert isinstance(out, Tensor)  # a tuple only if auxiliary outputs are asked for
    return out.unsqueeze(0)


AttentionInterface.register(FLAT_ATTENTION, flat_attention)
AttentionMaskInterface.register(FLAT_ATTENTION, sdpa_mask)


def why_not_flat(model: PreTrainedModel, max_length: int) -> str | None:
    """Name what in an architecture's config rules out flat rows; None if nothing does.

    This reads the config; whether the flat row really gives the padded row's numbers is then
    measured on the model itself (`cs336_alignment.training.preflight.choose_batching`).

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
