"""Proportions are exact, nothing repeats before all is seen, and everything follows the seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from cs336_alignment.data.batching import StepPlan
from cs336_alignment.data.mixture import Mixture
from cs336_alignment.errors import UserError


def epoch(plan: StepPlan, number: int) -> list[int]:
    steps = plan.steps_per_epoch
    return [
        i for step in range(number * steps, (number + 1) * steps) for i in plan.example_ids(step)
    ]


@pytest.mark.parametrize(
    ("sizes", "weights", "stop", "draws"),
    [
        ((100, 10), (1, 1), "first_exhausted", (10, 10)),
        ((100, 10), (1, 1), "all_exhausted", (100, 100)),
        ((30, 30), (0.1, 0.3), "first_exhausted", (10, 30)),
        ((30, 30), (0.1, 0.3), "all_exhausted", (30, 90)),
        ((7, 7, 7), (1, 1, 1), "first_exhausted", (7, 7, 7)),
        ((1000, 3), (1e-6, 1), "first_exhausted", (1, 3)),
    ],
)
def test_draws(
    sizes: tuple[int, ...], weights: tuple[float, ...], stop: str, draws: tuple[int, ...]
) -> None:
    assert Mixture(sizes, weights, stop).draws == draws


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted"])
def test_a_source_is_seen_evenly(stop: str, shuffle: bool) -> None:
    mixture = Mixture((50, 8), (2, 1), stop)
    plan = StepPlan(58, 6, seed=3, shuffle=shuffle, mixture=mixture)
    seen: Counter[int] = Counter()
    for number in range(5):
        ids = epoch(plan, number)
        assert len(ids) == plan.epoch_size == sum(mixture.draws)
        assert sum(i < 50 for i in ids) == mixture.draws[0]
        seen.update(ids)
        for source in (range(50), range(50, 58)):
            counts = [seen[i] for i in source]
            assert max(counts) - min(counts) <= 1


def test_it_is_a_function_of_seed_and_step() -> None:
    def plan(seed: int) -> StepPlan:
        return StepPlan(30, 4, seed, mixture=Mixture((20, 10), (1, 1), "all_exhausted"))

    forward = [plan(1).example_ids(step) for step in range(40)]
    assert [plan(1).example_ids(step) for step in reversed(range(40))] == forward[::-1]
    assert [plan(2).example_ids(step) for step in range(40)] != forward
    assert epoch(plan(1), 0) != epoch(plan(1), 1)


def test_without_shuffling_sources_are_interleaved() -> None:
    plan = StepPlan(30, 30, 0, shuffle=False, mixture=Mixture((20, 10), (2, 1), "all_exhausted"))
    ids = epoch(plan, 0)
    for start in range(0, 30, 3):
        assert sum(i >= 20 for i in ids[start : start + 3]) == 1
    assert [i for i in ids if i < 20] == list(range(20))


def test_an_epoch_beyond_all_measure_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        _ = Mixture((12, 12), (1.0, 1e-9), "all_exhausted").draws
    assert (caught.value.code, caught.value.status) == ("C123", 78)
    assert Mixture((12, 12), (1.0, 1e-9), "first_exhausted").draws == (12, 1)


def test_passes_of_a_small_source_are_whole() -> None:
    """Pass after pass through all of it, each in the order of that pass, across epochs."""
    mixture = Mixture((7, 40), (1.0, 1.0), "all_exhausted")
    calls = []

    def permutation(size: int, seed: int, number: int) -> NDArray[np.int64]:
        calls.append((size, seed, number))
        return np.random.Generator(np.random.PCG64([seed, number])).permutation(size)

    drawn: list[int] = []
    for number in range(3):
        mixed = mixture.order(5, number, permutation)
        joined = permutation(80, 5, number).argsort()
        drawn += [int(i) for i in mixed[joined] if i < 7]
    assert len(drawn) == 120
    for start in range(0, 119, 7):
        expected = permutation(7, 6, 2 * (start // 7))
        assert drawn[start : start + 7] == expected[: len(drawn[start : start + 7])].tolist()
