"""The LM head in chunks: log-probs of given labels without ever keeping (R, V) logits.

R response tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cs336_alignment.model.objective import Objective

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


def head_values(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    objective: Objective | None = None,
    with_entropy: bool = False,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probs of `labels` under the head, or what an objective makes of them, chunk by chunk.

    Without `slopes` the backward pass computes the logits once more: four matrix products in all.
    With them it takes three, since what goes backward from a chunk is known while its logits exist.

    Args:
        head: the model's head.
        hidden: (R, H) hidden states at the positions that predict the labels.
        labels: (R,) int64 token ids.
        objective: of the training; None: the log-probs are.
        with_entropy: also give the entropy of each position's distribution, without a graph.
        slopes: (R,) the gradient of the loss by each value, if it is known beforehand; should
            another one come in the backward pass, that one counts.

    Returns:
        The log-probs or the objective's values (R,), differentiable, in float32 (float64 for a
        float64 model); the entropies (R,) in nats or None; the log-probs (R,) without a graph,
        empty if they are the objective.
    """
    values, entropy, log_probs = _ChunkedLogProbs.apply(
        hidden, head.linear.weight, head.linear.bias, labels, head.scale, head.softcap,
        with_entropy, slopes, objective,
    )  # fmt: skip
    return values, (entropy if with_entropy else None), log_probs


def head_logits(head: Head, hidden: Tensor) -> Tensor:
    """Give the logits of a few positions, whole.

    Args:
        head: the model's head.
        hidden: (n, H), few enough that (n, V) is small.

    Returns:
        (n, V) logits in float32 or wider.
    """
    weight, bias = head.linear.weight, head.linear.bias
    exact = torch.promote_types(torch.float32, weight.dtype)
    return _logits(hidden.to(weight.dtype), weight, bias, exact, head.scale, head.softcap)


def _chunk_rows(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    return max(16, budget // (vocabulary * dtype.itemsize))


class _Gradients:
    """What goes backward from the head, summed chunk by chunk.

    Args:
        hidden: (R, H) as it is multiplied.
        weight: (V, H) as it is multiplied.
        bias: (V,) or None.
        dtype: of the sums: rounding each chunk to bfloat16 first would bias the gradient.
        needed: of hidden, weight and bias.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        needed: tuple[bool, bool, bool],
    ) -> None:
        self._factors = hidden, weight
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=dtype) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needed[2] else None

    def add(self, chunk: slice, d_logits: Tensor) -> None:
        """Add a chunk's share.

        Args:
            chunk: its rows.
            d_logits: (rows, V) the gradient by the products of hidden states and weight.
        """
        hidden, weight = self._factors
        if self.bias is not None:
            self.bias += d_logits.sum(0)
        d_logits = d_logits.to(hidden.dtype)
        if self.hidden is not None:
            torch.mm(d_logits, weight, out=self.hidden[chunk])
        if self.weight is not None and self.weight.dtype == d_logits.dtype:
            self.weight.addmm_(d_logits.T, hidden[chunk])
        elif self.weight is not None:
            self.weight += d_logits.T @ hidden[chunk]


class _ChunkedLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[labels], of whose (R, V) logits one chunk exists at a time; or
    what an objective makes of them.
    """

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
        slopes: Tensor | None,
        objective: Objective | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Products run in the autocast dtype, if one is on; sums and the softmax in float32 or
        # wider.
        device = hidden.device.type
        compute = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        )
        accumulate = torch.promote_types(torch.float32, weight.dtype)
        rows = _chunk_rows(weight.shape[0], accumulate, hidden.device)
        ctx.options = (accumulate, scale, softcap, rows, objective)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        hidden, weight = hidden.to(compute), weight.to(compute)
        log_probs = torch.empty(labels.shape, dtype=accumulate, device=hidden.device)
        normalizers = torch.empty_like(log_probs)
        values = log_probs if objective is None else torch.empty_like(log_probs)
        entropy = torch.empty_like(log_probs) if with_entropy else log_probs.new_empty(0)
        gradients = None
        if slopes is not None and any(ctx.needs_input_grad[:3]):
            slopes = slopes.to(accumulate)
            gradients = _Gradients(hidden, weight, bias, accumulate, ctx.needs_input_grad[:3])
        with torch.autocast(device, enabled=False):
            for start in range(0, len(labels), rows):
                chunk = slice(start, start + rows)
                logits = _logits(hidden[chunk], weight, bias, accumulate, scale, softcap)
                picked = logits.gather(1, labels[chunk, None]).squeeze(1)
                softcap_slope = None if gradients is None else _softcap_slope(logits, softcap)
                # By hand instead of logsumexp: its exponentials are the softmax, and where nothing
                # else reads the logits they take their place.
                peak = logits.amax(-1)
                read_again = with_entropy or (objective and objective.label_smoothing)
                powers = torch.sub(logits, peak[:, None], out=None if read_again else logits).exp_()
                total = powers.sum(-1)
                normalizers[chunk] = peak + total.log()
                log_probs[chunk] = picked - normalizers[chunk]
                if objective is not None:
                    values[chunk] = objective.values(log_probs[chunk], logits, normalizers[chunk])
                if with_entropy:
                    # log p <= 0 in floating point too, since the normalizer >= the peak; the clamp
                    # keeps 0 · -inf from being NaN.
                    log_p = logits.sub_(normalizers[chunk, None])
                    log_p.clamp_(min=torch.finfo(accumulate).min)
                    entropy[chunk] = -torch.linalg.vecdot(powers, log_p) / total
                if gradients is not None:
                    assert slopes is not None
                    slope = _slopes(objective, slopes[chunk], log_probs[chunk], normalizers[chunk])
                    gradients.add(
                        chunk, _d_logits(powers, labels[chunk], slope, scale, softcap_slope, total)
                    )
        seen = log_probs.new_empty(0) if objective is None else log_probs
        ctx.gradients = gradients
        ctx.save_for_backward(hidden, weight, bias, labels, normalizers, slopes, seen)
        ctx.mark_non_differentiable(entropy, seen)
        return values, entropy, seen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        hidden, weight, bias, labels, normalizers, slopes, log_probs = ctx.saved_tensors
        accumulate, scale, softcap, rows, objective = ctx.options
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or not _holds(grad, slopes):
            gradients = _Gradients(hidden, weight, bias, accumulate, ctx.needs_input_grad[:3])
            with torch.autocast(hidden.device.type, enabled=False):
                for start in range(0, len(labels), rows):
                    chunk = slice(start, start + rows)
                    logits = _logits(hidden[chunk], weight, bias, accumulate, scale, softcap)
                    softcap_slope = _softcap_slope(logits, softcap)
                    p = logits.sub_(normalizers[chunk, None]).exp_()
                    slope = _slopes(objective, grad[chunk], log_probs[chunk], normalizers[chunk])
                    gradients.add(chunk, _d_logits(p, labels[chunk], slope, scale, softcap_slope))
        hidden_dtype, weight_dtype = ctx.dtypes
        of_hidden, of_weight, of_bias = gradients.hidden, gradients.weight, gradients.bias
        return (
            None if of_hidden is None else of_hidden.to(hidden_dtype),
            None if of_weight is None else of_weight.to(weight_dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            *(None,) * 6,
        )


def _holds(grad: Tensor, slopes: Tensor) -> bool:
    """Tell whether what came in the backward pass is what was said beforehand."""
    if grad.is_cuda:  # no waiting for the device: it stops the program by itself
        torch._assert_async((grad == slopes).all())
        return True
    return torch.equal(grad, slopes)


def _softcap_slope(logits: Tensor, softcap: float | None) -> Tensor | None:
    """Give d capped / d uncapped logits, from the capped ones."""
    return None if softcap is None else 1 - (logits / softcap) ** 2


Slopes = tuple[Tensor, Tensor, Tensor | None]


def _slopes(
    objective: Objective | None, grad: Tensor, log_probs: Tensor, normalizers: Tensor
) -> Slopes:
    """Give the gradient (rows,) by a chunk's log-probs or values as that by its logits: of the
    label, of the softmax (to subtract), and of every logit, if there is such a part.
    """
    # d log p(label) / d logits = onehot(label) - p
    return (
        (grad, grad, None) if objective is None else objective.slopes(grad, log_probs, normalizers)
    )


def _d_logits(
    powers: Tensor,
    labels: Tensor,
    slopes: Slopes,
    scale: float,
    softcap_slope: Tensor | None,
    total: Tensor | float = 1.0,
) -> Tensor:
    """Turn the probabilities of a chunk, as powers (rows, V) over their total (rows,), into the
    gradient by hidden @ weight.T, in place.
    """
    label, softmax, every = slopes
    d_logits = powers.mul_((-softmax / total)[:, None])
    d_logits.scatter_add_(1, labels[:, None], label[:, None].to(d_logits.dtype))
    if every is not None:
        d_logits.add_(every[:, None] / d_logits.shape[1])
    if softcap_slope is not None:
        d_logits.mul_(softcap_slope)
    if scale != 1.0:
        d_logits.mul_(scale)
    return d_logits


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
