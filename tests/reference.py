"""The dense reference: one padded batch through the plain model, in float64 where asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.granite.modeling_granite import GraniteRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nanochat.modeling_nanochat import NanoChatRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from cs336_alignment.config import TrainerConfig
from cs336_alignment.data.batching import mix_seed
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


def _dense_logits(
    model: PreTrainedModel, dataset: TokenizedDataset, ids: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, S, V), labels (B, S) and response mask (B, S) by transformers' own forward."""
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
    return logits, tokens[:, 1:], mask[:, 1:]


def dense_log_probs(
    model: PreTrainedModel, dataset: TokenizedDataset, ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Log-probs (B, S) and response mask (B, S) by transformers' own forward and torch's softmax."""
    logits, labels, mask = _dense_logits(model, dataset, ids)
    return logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1), mask


def token_losses(logits: Tensor, labels: Tensor, trainer: TrainerConfig) -> Tensor:
    """What each token loses by torch's formulas on whole logits: (..., V), (...) → (...)."""
    classes_second = logits.movedim(-1, 1)
    loss = F.cross_entropy(
        classes_second, labels, reduction="none", label_smoothing=trainer.label_smoothing
    )
    if trainer.loss == "dft":
        loss = loss * logits.softmax(-1).gather(-1, labels[..., None]).squeeze(-1).detach()
    return loss + trainer.z_loss * logits.logsumexp(-1) ** 2


def dense_loss(
    model: PreTrainedModel,
    dataset: TokenizedDataset,
    ids: Sequence[int],
    normalization: str,
    trainer: TrainerConfig | None = None,
) -> Tensor:
    """The loss of a whole step, written out without any of the framework's functions."""
    if trainer is None:
        log_probs, mask = dense_log_probs(model, dataset, ids)
    else:
        logits, labels, mask = _dense_logits(model, dataset, ids)
        log_probs = -token_losses(logits, labels, trainer)
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


def splitmix_noise(base: int, length: int, width: int, alpha: float) -> NDArray[np.float32]:
    """NEFTune's noise of one example (length - 1, width), with numpy's unsigned integers."""
    with np.errstate(over="ignore"):
        count = np.arange(1, (length - 1) * width + 1, dtype=np.uint64)
        x = np.uint64(base) + count * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = (x ^ (x >> np.uint64(31))) >> np.uint64(40)
    drawn = x.astype(np.float32) / np.float32(2**23) - np.float32(1)
    scale = np.float32(alpha / np.sqrt(length)) / np.float32(np.sqrt(width))
    return drawn.reshape(length - 1, width) * scale


@contextlib.contextmanager
def dense_noise(
    model: PreTrainedModel, dataset: TokenizedDataset, ids: Sequence[int], alpha: float | None,
    seed: int, step: int,
) -> Iterator[None]:  # fmt: skip
    """Add each example's noise to its row of a dense batch."""

    def add(_module: Any, _inputs: Any, embedded: Tensor) -> Tensor:
        noise = torch.zeros_like(embedded)
        for row, i in enumerate(ids):
            length, base = int(dataset.lengths[i]), mix_seed(seed, step, i)
            own = splitmix_noise(base, length, embedded.shape[-1], alpha or 0.0)
            noise[row, : length - 1] = torch.from_numpy(own)
        return embedded + noise

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


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
