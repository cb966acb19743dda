"""The dense reference: one padded batch through the plain model, in float64 where asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.granite.modeling_granite import GraniteRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nanochat.modeling_nanochat import NanoChatRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from cs336_alignment.data.dataset import TokenizedDataset


def stay_in_float64() -> pytest.MonkeyPatch:
    """Make transformers' RMSNorms compute in the dtype of their input: they round to float32, and a
    sum of rounded gradients is not the rounded sum. `undo()` ends it.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    patch = pytest.MonkeyPatch()
    for norm in (GraniteRMSNorm, LlamaRMSNorm, Qwen2RMSNorm):
        patch.setattr(norm, "forward", forward)
    patch.setattr(NanoChatRMSNorm, "forward", NanoChatRMSNorm._norm)  # without the way to float32
    return patch


def dense_log_probs(
    model: PreTrainedModel, dataset: TokenizedDataset, ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Log-probs (B, S) and response mask (B, S) by transformers' own forward and torch's softmax."""
    width = max(dataset.lengths[i] for i in ids)
    tokens = torch.zeros((len(ids), width), dtype=torch.int64)
    mask = torch.zeros((len(ids), width), dtype=torch.bool)
    real = torch.zeros((len(ids), width), dtype=torch.int64)
    for row, i in enumerate(ids):
        example = dataset[i]
        tokens[row, : len(example.input_ids)] = example.input_ids
        mask[row, : len(example.input_ids)] = example.response_mask
        real[row, : len(example.input_ids)] = 1
    logits = model(tokens[:, :-1], attention_mask=real[:, :-1], use_cache=False).logits
    log_probs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return log_probs, mask[:, 1:]


def dense_loss(
    model: PreTrainedModel, dataset: TokenizedDataset, ids: Sequence[int], normalization: str
) -> Tensor:
    """The loss of a whole step, written out without any of the framework's functions."""
    log_probs, mask = dense_log_probs(model, dataset, ids)
    if dataset.weighted:
        return _weighted_loss(log_probs, dataset, ids, normalization)
    if normalization == "token":
        return -log_probs[mask].mean()
    if normalization == "sequence":
        return -torch.stack([lp[m].mean() for lp, m in zip(log_probs, mask, strict=True)]).mean()
    if normalization == "constant":
        sums = [lp[m].sum() / 3.0 for lp, m in zip(log_probs, mask, strict=True)]
        return -torch.stack(sums).mean()
    raise ValueError(normalization)


def _weighted_loss(
    log_probs: Tensor, dataset: TokenizedDataset, ids: Sequence[int], normalization: str
) -> Tensor:
    total, norm = log_probs.new_zeros(()), 0.0
    for row, i in enumerate(ids):
        example = dataset[i]
        assert example.weights is not None
        token = [float(w) for w in example.weights[1:]]
        own = example.example_weight
        terms = [-w * lp for w, lp in zip(token, log_probs[row], strict=False)]
        nll = torch.stack(terms).sum()
        if normalization == "token":
            total, norm = total + own * nll, norm + own * sum(token)
        elif normalization == "sequence":
            total, norm = total + own * nll / sum(token), norm + own
        else:
            total, norm = total + own * nll / 3.0, norm + 1.0
    return total / norm


def gradient(model: PreTrainedModel) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative_error(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())
