"""Intervals that cover, and tests that say what their formulas say."""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest

from cs336_alignment.evaluation.statistics import (
    EXACT_SIGNS,
    RESAMPLES,
    bootstrap_means,
    mcnemar,
    paired_test,
    percentile_interval,
)


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (0, 1), (3, 3), (5, 1), (2, 12), (40, 61)])
def test_mcnemar_is_the_binomial_tail(worse: int, better: int) -> None:
    n = worse + better
    # By its definition: every outcome that is at most as probable as the one observed.
    tail = sum(comb(n, k) for k in range(n + 1) if comb(n, k) <= comb(n, better))
    assert mcnemar(worse, better) == pytest.approx(tail / 2**n, abs=1e-15)
    assert mcnemar(better, worse) == mcnemar(worse, better)


def test_mcnemar_of_thousands_neither_overflows_nor_underflows() -> None:
    assert mcnemar(0, 1000) == 2.0**-999
    assert mcnemar(5000, 5000) == 1.0
    assert 0 < mcnemar(4000, 6000) < 1e-80


def test_the_bootstrap_interval_covers_a_known_mean() -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    trials, covered, wide = 300, 0, []
    for trial in range(trials):
        values = generator.binomial(1, 0.3, size=(100, 1)).astype(float)
        low, high = percentile_interval(bootstrap_means(values, seed=trial, resamples=600)[:, 0])
        covered += low <= 0.3 <= high
        wide.append(high - low)
    assert 0.91 <= covered / trials <= 0.98
    # The normal approximation's width.
    assert np.mean(wide) == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 100) ** 0.5, rel=0.05)


def test_a_difference_is_resampled_in_pairs() -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    first = generator.normal(size=500)
    means = bootstrap_means(np.stack([first, first + 0.25], axis=1), seed=2)
    assert means.shape == (RESAMPLES, 2)
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 0.25, atol=1e-12)
    assert means[:, 0].std() == pytest.approx(first.std() / 500**0.5, rel=0.05)
    np.testing.assert_array_equal(
        means, bootstrap_means(np.stack([first, first + 0.25], 1), seed=2)
    )


def test_blocks_of_resamples_are_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.Generator(np.random.PCG64(3)).normal(size=(40, 2))
    whole = bootstrap_means(values, seed=4, resamples=300)
    monkeypatch.setattr("cs336_alignment.evaluation.statistics.MOST_AT_ONCE", 41)
    np.testing.assert_allclose(bootstrap_means(values, seed=4, resamples=300), whole, atol=1e-15)


def test_equal_arms_differ_by_nothing() -> None:
    values = np.random.Generator(np.random.PCG64(5)).normal(size=30)
    for binary, arm in ((False, values), (True, (values > 0).astype(float))):
        test = paired_test(arm, arm, binary=binary, seed=0)
        assert test.p_value == 1.0 and test.discordant == test.better == 0


def test_permuting_all_signs_is_exact() -> None:
    gaps = np.array([0.5, -0.25, 1.0, 0.75, 0.0, 0.25])
    sums = [abs(np.dot(signs, gaps)) for signs in itertools.product((-1, 1), repeat=len(gaps))]
    expected = np.mean(np.array(sums) >= abs(gaps.sum()) - 1e-12)
    test = paired_test(np.zeros(6), gaps, binary=False, seed=0)
    assert test.name == "paired permutation, all" and test.p_value == expected
    assert (test.discordant, test.better) == (5, 4)


def test_drawn_permutations_agree_with_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    gaps = np.random.Generator(np.random.PCG64(6)).normal(0.3, 1, size=EXACT_SIGNS)
    exact = paired_test(np.zeros(EXACT_SIGNS), gaps, binary=False, seed=0)
    monkeypatch.setattr("cs336_alignment.evaluation.statistics.EXACT_SIGNS", 0)
    drawn = paired_test(np.zeros(EXACT_SIGNS), gaps, binary=False, seed=0)
    assert drawn.name == "paired permutation, 10,000"
    assert drawn.p_value == pytest.approx(exact.p_value, abs=0.02)
    # Of differences that all point one way no permutation is more extreme: the least p-value.
    least = paired_test(np.zeros(60), np.ones(60), binary=False, seed=0)
    assert least.p_value == 1 / RESAMPLES


def test_binary_pairs_go_to_mcnemar() -> None:
    before, after = np.array([1.0, 0, 0, 0, 0, 0, 0, 1]), np.array([0.0, 1, 1, 1, 1, 1, 0, 1])
    test = paired_test(before, after, binary=True, seed=0)
    assert (test.name, test.discordant, test.better) == ("McNemar exact", 6, 5)
    assert test.p_value == mcnemar(1, 5) == 0.21875


def test_no_prompt_is_no_evaluation() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        bootstrap_means(np.zeros((0, 1)), seed=0)
