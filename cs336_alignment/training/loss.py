"""The loss: `masked_normalize` and the weights that make it independent of how a batch is cut.

B batch, S sequence, V vocabulary, R response tokens of a microbatch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cs336_alignment.microbatch import Microbatch


def masked_normalize(
    tensor: Tensor, mask: Tensor, dim: int | None = None, normalize_constant: float | Tensor = 1.0
) -> Tensor:
    """Sum the masked-in elements and divide by a constant: `sum(tensor * mask, dim) / constant`.

    Args:
        tensor: values, any shape, typically (B, S) or (B, S, V).
        mask: same shape as `tensor`; bool, integer or float. A float mask weighs the elements. What
            is masked out (0) does not leak: a NaN or inf there leaves value and gradient finite.
        dim: the dimension summed over; None sums over all of them.
        normalize_constant: a number, or a tensor that broadcasts to the shape of the result. With a
            tensor, a row with nothing masked in and a constant of zero gives 0.

    Returns:
        The normalized sum: `tensor`'s shape without `dim`, () if `dim` is None.

    Raises:
        ValueError: shapes of tensor and mask differ; the number is zero or not finite; the
            constant's shape does not broadcast to the result's.

    Example:
        >>> import torch
        >>> mask = torch.tensor([1, 0, 1, 1, 0])
        >>> masked_normalize(torch.tensor([1., 2., 3., 4., 5.]), mask, None, 2)
        tensor(4.)
        >>> masked_normalize(torch.tensor([[1., 2., 3.], [4., 5., 6.]]),
        ...                  torch.tensor([[1, 0, 1], [1, 1, 0]]), dim=1, normalize_constant=2.0)
        tensor([2.0000, 4.5000])
    """
    if tensor.shape != mask.shape:
        raise ValueError(
            f"tensor and mask must have the same shape, got {tuple(tensor.shape)} "
            f"and {tuple(mask.shape)}"
        )
    is_constant_tensor = isinstance(normalize_constant, Tensor)
    if not is_constant_tensor and (
        normalize_constant == 0 or not math.isfinite(normalize_constant)
    ):
        raise ValueError(
            f"normalize_constant must be finite and not zero, got {normalize_constant}"
        )
    masked_in = mask if mask.dtype == torch.bool else mask != 0
    # masked_fill before the product: 0 * NaN would be NaN.
    product = tensor.masked_fill(~masked_in, 0)
    if mask.dtype != torch.bool:
        product = product.mul_(mask) if product.is_floating_point() else product * mask
    total = product.sum() if dim is None else product.sum(dim=dim)
    if not is_constant_tensor:
        return total / normalize_constant
    constant = torch.as_tensor(normalize_constant, device=total.device)
    # Only a constant that leaves the result's shape alone: a larger one would repeat the sum.
    offset = total.ndim - constant.ndim
    if offset < 0 or any(
        size not in (1, total.shape[offset + index]) for index, size in enumerate(constant.shape)
    ):
        raise ValueError(
            f"normalize_constant of shape {tuple(constant.shape)} does not broadcast to the "
            f"result's {tuple(total.shape)}"
        )
    empty = ~(masked_in.any() if dim is None else masked_in.any(dim=dim))
    return total / torch.where(empty & (constant == 0), torch.ones_like(constant), constant)


def sft_microbatch_train_step(
    policy_log_probs: Tensor,
    response_mask: Tensor,
    gradient_accumulation_steps: int,
    normalize_constant: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Calls backward on the SFT loss of one microbatch, CS336's way.

    The loss is the negative masked sum of each example divided by the constant, averaged over the
    batch and divided by the accumulation steps. It is a mean over *this* microbatch's examples; the
    trainer's own loss (`loss_weights`) knows the whole optimizer step instead.

    Args:
        policy_log_probs: (B, S) log-probs of the labels, with a graph.
        response_mask: (B, S), 1 on response tokens.
        gradient_accumulation_steps: microbatches per optimizer step, at least 1.
        normalize_constant: what each example's sum is divided by.

    Returns:
        The scalar loss (detached: its graph is spent) and a dict of scalar tensors:
        `num_response_tokens` and `token_loss`, the mean negative log-prob of a response token in
        nats.

    Raises:
        ValueError: as `masked_normalize`, or an accumulation below 1.

    Example:
        >>> import torch
        >>> log_probs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
        >>> loss, _ = sft_microbatch_train_step(log_probs, torch.tensor([[0, 1, 1]]), 2)
        >>> loss, log_probs.grad
        (tensor(2.5000), tensor([[ 0.0000, -0.5000, -0.5000]]))
    """
    if gradient_accumulation_steps < 1:
        raise ValueError(
            f"gradient_accumulation_steps must be at least 1, got {gradient_accumulation_steps}"
        )
    per_example = masked_normalize(policy_log_probs, response_mask, -1, normalize_constant)
    loss = -per_example.mean() / gradient_accumulation_steps
    loss.backward()
    with torch.no_grad():
        num_response_tokens = (response_mask != 0).sum()
        token_loss = -masked_normalize(
            policy_log_probs, response_mask, normalize_constant=num_response_tokens.clamp(min=1)
        )
    return loss.detach(), {"num_response_tokens": num_response_tokens, "token_loss": token_loss}


@dataclass(frozen=True)
class StepCounts:
    """What a loss must know of its optimizer step before the first forward pass.

    Attributes:
        num_examples: examples of the step over all processes.
        example_weight: the sum of their weights; the same number if all weigh 1.
        token_weight: the sum of the weights of their response tokens, each times its example's; the
            number of response tokens if all weigh 1.
        num_microbatches: microbatches of the step on this process.
        num_processes: processes whose gradients are averaged.
    """

    num_examples: int
    example_weight: float
    token_weight: float
    num_microbatches: int
    num_processes: int


def loss_weights(
    loss_normalization: str, batch: Microbatch, counts: StepCounts, normalize_constant: float = 1.0
) -> tuple[Tensor, float]:
    """Give the mask and the constant with which `masked_normalize` is one microbatch's share of the
    loss.

    Summed over a process's microbatches and *averaged* over processes (as DDP does), the shares are
    the loss of the step. With w the weight of a token (1 unless the data say otherwise) and W that
    of its example, a token counts as below; but for `microbatch` that does not depend on the cut:

    - `token`: w·W / Σ w·W over the step, with weights of 1 the mean over its response tokens;
    - `sequence`: W · (w / Σ w over the example) / Σ W over the step;
    - `constant`: w·W / (normalize_constant · examples of the step), CS336's sum over a constant;
    - `microbatch`: w·W / (Σ w·W over its microbatch · microbatches of the step), the plain recipe,
      a mean of means, which does depend on the cut.

    Args:
        loss_normalization: one of the four names.
        batch: the microbatch; its masks, counts and weights are read.
        counts: of the optimizer step.
        normalize_constant: `constant`'s number.

    Returns:
        A mask (R,), bool or float64, and a number, both for `masked_normalize`.

    Raises:
        ValueError: an unknown name.
    """
    mask, weights = batch.response_mask, batch.weights
    per_process = 1.0 / counts.num_processes  # DDP averages over processes; this makes it a sum
    if loss_normalization == "sequence":
        # In float64, so that a float64 model gets unrounded weights; `microbatch_loss` casts them.
        if weights is None:
            shares = mask.double() / batch.example_response_tokens.clamp(min=1)
        else:
            shares = mask * weights.example * weights.token / weights.example_total
        return shares, counts.example_weight * per_process
    token_weights = mask if weights is None else mask * weights.token
    if loss_normalization == "token":
        return token_weights, counts.token_weight * per_process
    if loss_normalization == "constant":
        return token_weights, normalize_constant * counts.num_examples * per_process
    if loss_normalization == "microbatch":
        total = float(batch.num_response_tokens) if weights is None else weights.total
        return token_weights, (total or 1.0) * counts.num_microbatches
    raise ValueError(f"unknown loss_normalization {loss_normalization!r}")


def loss_slopes(mask: Tensor, normalize_constant: float, dtype: torch.dtype) -> Tensor:
    """Compute the gradient of `microbatch_loss` by each log-prob: it depends on none of them.

    Args:
        mask: (R,) from `loss_weights`.
        normalize_constant: from `loss_weights`.
        dtype: of the log-probs.

    Returns:
        (R,) in that dtype, bit for bit what the backward pass will bring.
    """
    log_probs = torch.zeros(mask.shape, dtype=dtype, device=mask.device, requires_grad=True)
    loss = microbatch_loss(log_probs, mask, normalize_constant)
    return torch.autograd.grad(loss, log_probs)[0]


def microbatch_loss(log_probs: Tensor, mask: Tensor, normalize_constant: float) -> Tensor:
    """Compute the scalar that goes backward for one microbatch, always through `masked_normalize`.

    Args:
        log_probs: (R,) log-probs of the response tokens, with a graph.
        mask: (R,) from `loss_weights`.
        normalize_constant: from `loss_weights`.
    """
    weights = mask if mask.dtype == torch.bool else mask.to(log_probs.dtype)
    return -masked_normalize(log_probs, weights, normalize_constant=normalize_constant)
