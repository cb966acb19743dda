"""The dense reference: one padded batch through the plain model, in float64 where asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cs336_alignment.data.prepare import TokenizedDataset


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
    if normalization == "token":
        return -log_probs[mask].mean()
    if normalization == "sequence":
        return -torch.stack([lp[m].mean() for lp, m in zip(log_probs, mask, strict=True)]).mean()
    if normalization == "constant":
        sums = [lp[m].sum() / 3.0 for lp, m in zip(log_probs, mask, strict=True)]
        return -torch.stack(sums).mean()
    raise ValueError(normalization)


def gradient(model: PreTrainedModel) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def relative_error(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())
