"""How sure an evaluation is: bootstrap intervals over prompts and paired tests of two models.

P prompts, K quantities, R resamples. A prompt's value is the mean over its samples: the prompts are
what was drawn independently, so they are what is resampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95
MOST_AT_ONCE = 2**22  # numbers of a block of resamples
EXACT_SIGNS = 13  # up to so many prompts that differ, all signs are tried: fewer than RESAMPLES
ROUNDING = 1e-9  # of sums that are equal but for the order of their terms

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PairedTest:
    """Whether two models differ on the same prompts.

    Attributes:
        name: of the test.
        p_value: two-sided.
        discordant: prompts on which the two differ.
        better: those of them on which the second is higher.
    """

    name: str
    p_value: float
    discordant: int
    better: int


def bootstrap_means(values: Floats, *, seed: int, resamples: int = RESAMPLES) -> Floats:
    """Resample prompts with replacement and give the means.

    Args:
        values: (P, K); all K quantities of a prompt stay together, so that the difference of two
            columns is resampled in pairs.
        seed: of the resampling.
        resamples: R.

    Returns:
        (R, K) means.

    Raises:
        ValueError: there is no prompt.
    """
    prompts = len(values)
    if not prompts:
        raise ValueError("no prompts to resample")
    generator = np.random.Generator(np.random.PCG64(seed))
    means = np.empty((resamples, values.shape[1]))
    rows = max(1, MOST_AT_ONCE // prompts)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = generator.integers(prompts, size=(count, prompts))
        drawn += np.arange(count)[:, None] * prompts
        times = np.bincount(drawn.ravel(), minlength=count * prompts).reshape(count, prompts)
        means[start : start + count] = times.astype(np.float64) @ values / prompts
    return means


def percentile_interval(means: Floats, level: float = LEVEL) -> tuple[float, float]:
    """Give the percentile interval of bootstrap means.

    Args:
        means: (R,) of one quantity.
        level: the share of them that lies in the interval.
    """
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_test(before: Floats, after: Floats, *, binary: bool, seed: int) -> PairedTest:
    """Test whether two models differ: exactly by McNemar where each prompt is right or wrong, else
    by permuting which model is which, prompt by prompt.

    Args:
        before: (P,) values of the first model.
        after: (P,) of the second, for the same prompts.
        binary: each value is one 0 or 1.
        seed: of the permutations, where there are too many to try all.
    """
    difference = after - before
    differs = difference[np.abs(difference) > ROUNDING]
    better = int((differs > 0).sum())
    if binary:
        return PairedTest(
            "McNemar exact", mcnemar(len(differs) - better, better), len(differs), better
        )
    name, p_value = _permute_signs(differs, seed)
    return PairedTest(name, p_value, len(differs), better)


def mcnemar(worse: int, better: int) -> float:
    """Give the exact two-sided p-value of McNemar's test, that of a binomial with probability 1/2.

    Args:
        worse: prompts that the first model alone gets right.
        better: prompts that the second model alone gets right.

    Example:
        >>> mcnemar(1, 5)  # (1 + 6) / 2 ** 6, on both sides
        0.21875
    """
    total = worse + better
    term = tail = 1  # whole numbers: nothing is rounded, however small the probability
    for k in range(min(worse, better)):
        term = term * (total - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**total)


def _permute_signs(differences: Floats, seed: int) -> tuple[str, float]:
    """Name the test that is made, and give its p-value.

    Args:
        differences: those that are not 0; the others change no sum.
        seed: of the signs.
    """
    count = len(differences)
    least = abs(differences.sum()) * (1 - ROUNDING)
    if count <= EXACT_SIGNS:
        signs = 1.0 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
        return "paired permutation, all", float((np.abs(signs @ differences) >= least).mean())
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = max(1, MOST_AT_ONCE // count)
    extreme = 1  # the permutation that was observed is one of them
    for block in range(ceil((RESAMPLES - 1) / rows)):
        size = min(rows, RESAMPLES - 1 - block * rows)
        signs = 1.0 - 2 * generator.integers(2, size=(size, count))
        extreme += int((np.abs(signs @ differences) >= least).sum())
    return f"paired permutation, {RESAMPLES:,}", extreme / RESAMPLES
