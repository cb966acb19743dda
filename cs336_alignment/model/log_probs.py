"""Dense log-probs and entropies, CS336's public form. B batch, S sequence, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def compute_entropy(logits: Tensor) -> Tensor:
    """Compute the entropy of the next-token distributions, in nats.

    H = logsumexp(z) - Σ softmax(z)·z, evaluated as -Σ p·log p with log p = z - logsumexp(z), which
    neither overflows nor turns negative for large logits.

    Args:
        logits: (B, S, V), or any shape that ends in V.

    Returns:
        (B, S) entropies, float32 (float64 for float64 logits), each from 0 to log V.

    Example:
        >>> import torch
        >>> compute_entropy(torch.zeros(1, 1, 4))  # log 4
        tensor([[1.3863]])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Not torch.log_softmax: on a CPU its float32 sums are off by 3e-5 for 50,000 words. The maximum
    # goes first, so that large logits lose no digits either.
    logits = logits - logits.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    log_p = logits - logits.logsumexp(dim=-1, keepdim=True)
    # -inf logits are legal (a forbidden token): p = 0 there must contribute 0, not 0 · -inf.
    log_p = log_p.clamp(min=torch.finfo(log_p.dtype).min)
    return -torch.linalg.vecdot(log_p.exp(), log_p)


def get_response_log_probs(
    model: nn.Module, input_ids: Tensor, labels: Tensor, return_token_entropy: bool = False
) -> dict[str, Tensor]:
    """Compute each label's log-prob under a causal language model, at every position.

    No attention mask is needed for right-padded rows: causality keeps padding from real tokens.

    Args:
        model: a Hugging Face causal language model (its output has `.logits`).
        input_ids: (B, S) int64.
        labels: (B, S) int64, the next tokens, as `tokenize_prompt_and_output` gives them.
        return_token_entropy: also return the entropy of each position's distribution.

    Returns:
        `log_probs` (B, S), differentiable, float32 (float64 for a float64 model); with the flag
        also `token_entropy` (B, S) in nats.

    Raises:
        ValueError: the shapes of input_ids and labels differ.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=1, num_attention_heads=2))
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> get_response_log_probs(model, ids[:, :-1], ids[:, 1:], True)["log_probs"].shape
        torch.Size([1, 3])
    """
    if input_ids.shape != labels.shape:
        raise ValueError(
            f"input_ids and labels must have the same shape, got {tuple(input_ids.shape)} and "
            f"{tuple(labels.shape)}"
        )
    logits = model(input_ids, use_cache=False).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (B, S, V)
    picked = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    result = {"log_probs": picked - logits.logsumexp(dim=-1)}
    if return_token_entropy:
        result["token_entropy"] = compute_entropy(logits)
    return result
