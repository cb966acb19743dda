"""The LM head in chunks: log-probs of given labels without ever keeping (R, V) logits.

R response tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK_BYTES = {"cpu": 100 * 2**20, "cuda": 512 * 2**20}


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits.

    Attributes:
        linear: the output embedding: weight (V, H) and perhaps a bias (V,).
        scale: the logits are multiplied by this.
        softcap: if given, logits become `softcap * tanh(logits / softcap)` (Gemma).
    """

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None


def head_of(model: PreTrainedModel) -> Head | None:
    """Read a model's head from its modules and config; None if it has no plain linear head."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        return None
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies,
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides
    return Head(linear, scale, getattr(config, "final_logit_softcapping", None))


def head_log_probs(
    head: Head, hidden: Tensor, labels: Tensor, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of `labels` under the head, computed chunk by chunk, recomputed in the backward
    pass.

    Args:
        head: the model's head.
        hidden: (R, H) hidden states at the positions that predict the labels.
        labels: (R,) int64 token ids.
        with_entropy: also give the entropy of each position's distribution, without a graph.

    Returns:
        log_probs (R,) in float32 (float64 for a float64 model), and the entropies (R,) in nats or
        None.
    """
    log_probs, entropy = _ChunkedLogProbs.apply(
        hidden, head.linear.weight, head.linear.bias, labels, head.scale, head.softcap, with_entropy
    )
    return log_probs, (entropy if with_entropy else None)


def _chunk_rows(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    return max(16, budget // (vocabulary * dtype.itemsize))


class _ChunkedLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[labels]; saves only hidden states and one logsumexp a row."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        softcap: float | None,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        # Products run in the autocast dtype, if one is on; sums and the softmax in float32 or
        # wider.
        device = hidden.device.type
        compute = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        )
        accumulate = torch.promote_types(torch.float32, weight.dtype)
        rows = _chunk_rows(weight.shape[0], accumulate, hidden.device)
        ctx.options = (compute, accumulate, scale, softcap, rows)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        hidden, weight = hidden.to(compute), weight.to(compute)
        log_probs = torch.empty(labels.shape, dtype=accumulate, device=hidden.device)
        normalizers = torch.empty_like(log_probs)
        entropy = torch.empty_like(log_probs) if with_entropy else log_probs.new_empty(0)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(labels), rows):
                chunk = slice(start, start + rows)
                logits = _logits(hidden[chunk], weight, bias, accumulate, scale, softcap)
                normalizers[chunk] = logits.logsumexp(-1)
                picked = logits.gather(1, labels[chunk, None]).squeeze(1)
                log_probs[chunk] = picked - normalizers[chunk]
                if with_entropy:
                    entropy[chunk] = _entropy(logits, normalizers[chunk])
        ctx.save_for_backward(hidden, weight, bias, labels, normalizers)
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        hidden, weight, bias, labels, normalizers = ctx.saved_tensors
        compute, accumulate, scale, softcap, rows = ctx.options
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Chunks are summed in float32: rounding each to bfloat16 first would bias the gradient.
        grad_weight = (
            torch.zeros_like(weight, dtype=accumulate) if ctx.needs_input_grad[1] else None
        )
        grad_bias = (
            torch.zeros_like(bias, dtype=accumulate)
            if bias is not None and ctx.needs_input_grad[2]
            else None
        )
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(labels), rows):
                chunk = slice(start, start + rows)
                logits = _logits(hidden[chunk], weight, bias, accumulate, scale, softcap)
                slope = None if softcap is None else 1 - (logits / softcap) ** 2
                # d log p(label) / d logits = onehot(label) - p
                d_logits = logits.sub_(normalizers[chunk, None]).exp_().mul_(-grad[chunk, None])
                d_logits.scatter_add_(1, labels[chunk, None], grad[chunk, None].to(d_logits.dtype))
                if slope is not None:
                    d_logits.mul_(slope)
                if scale != 1.0:
                    d_logits.mul_(scale)
                if grad_bias is not None:
                    grad_bias += d_logits.sum(0)
                d_logits = d_logits.to(compute)
                if grad_hidden is not None:
                    torch.mm(d_logits, weight, out=grad_hidden[chunk])
                if grad_weight is not None:
                    _add_product(grad_weight, d_logits.T, hidden[chunk])
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden.to(hidden_dtype),
            None if grad_weight is None else grad_weight.to(weight_dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    scale: float,
    softcap: float | None,
) -> Tensor:
    logits = (hidden @ weight.T).to(dtype)  # (rows, V)
    if bias is not None:
        logits += bias.to(dtype)
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def _entropy(logits: Tensor, normalizers: Tensor) -> Tensor:
    """H = -Σ p log p >= 0, from logits (rows, V) and their logsumexp (rows,); overwrites the
    logits.
    """
    # log p <= 0 in floating point too, since logsumexp >= max; the clamp keeps 0 · -inf from being
    # NaN.
    log_p = logits.sub_(normalizers[:, None]).clamp_(min=torch.finfo(logits.dtype).min)
    return -torch.linalg.vecdot(log_p.exp(), log_p)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
