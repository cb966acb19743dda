"""Several sources in one run: how often each is drawn, as a pure function of seed and epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cs336_alignment.errors import UserError

MOST_PASSES = 1000  # through all sources together, in one epoch
Permutation = Callable[[int, int, int], NDArray[np.int64]]


@dataclass(frozen=True)
class Mixture:
    """Sources drawn in proportion to their weights.

    Every epoch holds the same number of examples of each source. A source goes on where the last
    epoch left it, pass after pass, each pass in an order of its own, so nothing is drawn twice
    before everything was drawn once.

    Attributes:
        sizes: examples of each source.
        weights: of each source, above 0; they need not sum to 1.
        stop: what ends an epoch: `first_exhausted`, before any source would repeat, or
            `all_exhausted`, when every source was seen whole and small ones several times.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    stop: str

    @cached_property
    def draws(self) -> tuple[int, ...]:
        """How many examples of each source an epoch holds, at least 1.

        Example:
            >>> Mixture((100, 10), (0.5, 0.5), "first_exhausted").draws
            (10, 10)
            >>> Mixture((100, 10), (0.5, 0.5), "all_exhausted").draws
            (100, 100)
        """
        epochs = [size / weight for size, weight in zip(self.sizes, self.weights, strict=True)]
        first = self.stop == "first_exhausted"
        scale, whole = (min(epochs), math.floor) if first else (max(epochs), math.ceil)
        # Rounded first: 0.1 · 30 must count as 3, whatever floating point makes of it.
        draws = tuple(max(1, whole(round(scale * weight, 6))) for weight in self.weights)
        most = MOST_PASSES * sum(self.sizes)
        if sum(draws) > most:
            raise UserError(
                "C123",
                f"an epoch of this mixture would hold {sum(draws):,} examples",
                expected=f"at most {most:,}, a thousand times those of the sources",
                hint="bring the weights of data.sources nearer together, or use "
                "data.mixture_stop=first_exhausted",
            )
        return draws

    def order(self, seed: int, epoch: int, permutation: Permutation | None) -> NDArray[np.int64]:
        """Give the example ids of an epoch; ids count through all sources.

        Args:
            seed: of the run.
            epoch: from 0.
            permutation: (size, seed, number) → order; None keeps the order of the data, the
                sources interleaved evenly.
        """
        ids, places, first = [], [], 0
        for source, (size, draws) in enumerate(zip(self.sizes, self.draws, strict=True)):
            positions = np.arange(epoch * draws, (epoch + 1) * draws)
            drawn = positions % size
            if permutation is not None:
                for number in range(positions[0] // size, positions[-1] // size + 1):
                    here = slice(*(np.array([number, number + 1]) * size - positions[0]).clip(0))
                    # Of each source its own stream of orders.
                    stream = number * len(self.sizes) + source
                    drawn[here] = permutation(size, seed + 1, stream)[drawn[here]]
            ids.append(first + drawn)
            places.append((np.arange(draws) + 0.5) / draws)
            first += size
        joined = np.concatenate(ids)
        if permutation is not None:
            return joined[permutation(len(joined), seed, epoch)]
        return joined[np.argsort(np.concatenate(places), kind="stable")]
