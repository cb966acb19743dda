"""Averages of the weights: what is evaluated, exported and lies in a checkpoint's model file, while
the weights themselves are trained on.

The set of weights that is not in the model lies in the optimizer's state as `other_weights`: what
is saved while an average is shown holds both, and what is restored then, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

OTHER = "other_weights"


class Average:
    """What the trainer asks of an average; as it stands, nothing changes what is shown."""

    def update(self) -> None:
        """Take a step's new weights into account."""

    def shown(self) -> contextlib.AbstractContextManager[None]:
        """Have the average in the model within a context, then the trained weights, bit for bit."""
        return contextlib.nullcontext()


class NoAverage(Average):
    """The trained weights are what is shown."""


class MovingAverage(Average):
    """An exponential moving average, as long as training lasts.

    Args:
        optimizer: of the weights, its state allocated.
        decay: what the average keeps of itself at a step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        self._weights, self._decay = _weights(optimizer), decay
        self._averages = [weight.detach().clone() for weight in self._weights]
        for weight, average in zip(self._weights, self._averages, strict=True):
            assert optimizer.state[weight]
            optimizer.state[weight][OTHER] = average

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights."""
        torch._foreach_lerp_(self._averages, self._weights, 1.0 - self._decay)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Exchange average and weights, tensor by tensor."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, other in zip(self._weights, self._averages, strict=True):
            kept = weight.clone()
            weight.copy_(other)
            other.copy_(kept)


class ScheduleFreeAverage(Average):
    """The average that a schedule-free optimizer computes from its state.

    Its way back from the average is not exact to the last bit, so the weights are set aside: their
    size in memory once more, while the average is shown.

    Args:
        optimizer: with the modes `train` and `eval`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Compute the average, then put the weights back."""
        weights, state = _weights(self._optimizer), self._optimizer.state
        for weight in weights:
            state[weight][OTHER] = weight.detach().clone()
        with torch.no_grad():
            self._optimizer.eval()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            with torch.no_grad():
                for weight in weights:
                    weight.copy_(state[weight].pop(OTHER))
            for group in self._optimizer.param_groups:
                group["train_mode"] = True


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def build_average(optimizer: torch.optim.Optimizer, ema_decay: float | None) -> Average:
    """Make the average of an optimizer's weights that the config asks for.

    Args:
        optimizer: its state allocated, its weights those that training begins with.
        ema_decay: of a moving average; None: there is none, unless the optimizer makes one.
    """
    if "train_mode" in optimizer.param_groups[0]:
        return ScheduleFreeAverage(optimizer)
    return NoAverage() if ema_decay is None else MovingAverage(optimizer, ema_decay)
