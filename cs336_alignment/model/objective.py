"""What is trained in the place of a token's log-prob, and its slope by the logits.

R response tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """What a token is worth; the loss is minus its weighted sum, as it is for log-probs.

    With z the logits of a position, Z = logsumexp(z), log p = z[label] - Z its log-prob:

        (1 - label_smoothing) · w · log p + label_smoothing · mean(z - Z) - z_loss · Z²

    Attributes:
        label_smoothing: the share of the target that is spread evenly over the vocabulary (Szegedy
            and others, arXiv 1512.00567), as in torch's `cross_entropy`.
        z_loss: keeps Z near 0 (Chowdhery and others, arXiv 2204.02311).
        dft: w is p, without a slope of its own (dynamic fine-tuning, arXiv 2508.05629): tokens that
            the model finds unlikely pull less; else w is 1.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    dft: bool = False

    def values(self, log_probs: Tensor, logits: Tensor, normalizers: Tensor) -> Tensor:
        """Compute the worth of each token.

        Args:
            log_probs: (R,) of the labels.
            logits: (R, V).
            normalizers: (R,) logsumexp of the logits.

        Returns:
            (R,), with a graph if the arguments have one.
        """
        values = log_probs * log_probs.detach().exp() if self.dft else log_probs
        if self.label_smoothing:
            spread = logits.mean(-1) - normalizers
            values = (1 - self.label_smoothing) * values + self.label_smoothing * spread
        return values - self.z_loss * normalizers**2 if self.z_loss else values

    def slopes(
        self, grad: Tensor, log_probs: Tensor, normalizers: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Turn the gradient by `values` into that by the logits.

        Args:
            grad: (R,) by each value.
            log_probs: (R,) of the labels.
            normalizers: (R,) logsumexp of the logits.

        Returns:
            a, b and c, (R,) each, of the gradient (R, V) `a·onehot(label) - b·softmax + c / V`; c
            is None where it is 0.
        """
        label = grad * (1 - self.label_smoothing) * (log_probs.exp() if self.dft else 1.0)
        every = grad * self.label_smoothing
        softmax = label + every + 2 * self.z_loss * grad * normalizers
        return label, softmax, every if self.label_smoothing else None
