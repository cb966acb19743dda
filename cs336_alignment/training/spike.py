"""Loss spikes: a step whose loss is far above those before it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

SPIKE_WINDOW = 32  # steps that a loss is compared with
SPIKE_SOONEST = 8  # fewer say nothing


def is_spike(loss: float, recent: Sequence[float], nats: float) -> bool:
    """Tell whether a loss is more than so many nats above the median of the steps before.

    A distance, not a ratio: near the end of training a loss of 0.01 may well be ten times the one
    before.

    Args:
        loss: token mean of the step, in nats.
        recent: those of the steps before it, newest last.
        nats: the distance.

    Example:
        >>> is_spike(4.5, [2.0] * 20, nats=2.0), is_spike(3.5, [2.0] * 20, nats=2.0)
        (True, False)
    """
    return len(recent) >= SPIKE_SOONEST and loss > median(recent[-SPIKE_WINDOW:]) + nats
