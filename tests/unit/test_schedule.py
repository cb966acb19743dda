"""Each schedule warms up, follows its formula, and is a function of the step alone."""

from __future__ import annotations

import math
import random

import pytest

from cs336_alignment.config import OptimizerConfig
from cs336_alignment.config_check import SCHEDULES
from cs336_alignment.training.schedule import learning_rate, warmup_length

PEAK = 3e-4


def config(name: str, **options: float | int | None) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=PEAK, lr_scheduler_type=name, **options)  # type: ignore[arg-type]


def curve(name: str, total: int, **options: float | int | None) -> list[float]:
    chosen = config(name, **options)
    return [learning_rate(chosen, step, total) for step in range(total)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_is_linear_and_moves_at_once(name: str) -> None:
    rates = curve(name, 100, warmup_steps=4)
    assert rates[:4] == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK])
    assert rates[4] == PEAK  # progress 0
    assert max(rates) == PEAK


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0, 1, 3, 500])
def test_every_step_of_a_run_has_a_rate_above_zero(name: str, total: int, warmup: int) -> None:
    rates = curve(name, total, warmup_steps=warmup)
    assert all(0 < rate <= PEAK for rate in rates)  # a step at rate 0 would be paid for nothing
    after = rates[warmup:]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize(
    ("name", "middle", "last"),
    [
        ("constant", 1.0, 1.0),
        ("linear", 0.5, 0.01),
        ("cosine", 0.5, (1 + math.cos(math.pi * 0.99)) / 2),
        ("warmup_stable_decay", 1.0, 1 / 11),
    ],
)
def test_middle_and_end_values(name: str, middle: float, last: float) -> None:
    rates = curve(name, 110, warmup_steps=10)  # 100 steps after the warmup
    assert rates[60] == pytest.approx(middle * PEAK)
    assert rates[-1] == pytest.approx(last * PEAK)


@pytest.mark.parametrize("name", ["linear", "cosine", "warmup_stable_decay"])
def test_the_end_of_the_curve_is_zero(name: str) -> None:
    assert learning_rate(config(name, warmup_steps=3), 50, 50) == pytest.approx(0, abs=1e-20)


def test_stable_decay_is_constant_until_the_last_tenth() -> None:
    rates = curve("warmup_stable_decay", 100, warmup_steps=0)
    assert set(rates[:90]) == {PEAK}
    assert rates[90:] == pytest.approx([PEAK * (10 - k) / 10 for k in range(10)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_rate_depends_on_nothing_but_its_step(name: str) -> None:
    chosen, steps = config(name, warmup_ratio=0.1), list(range(50))
    in_order = [learning_rate(chosen, step, 50) for step in steps]
    random.Random(0).shuffle(steps)
    shuffled = {step: learning_rate(chosen, step, 50) for step in steps}
    assert in_order == [shuffled[step] for step in range(50)]


def test_the_warmup_ratio_is_rounded_up() -> None:
    assert warmup_length(config("cosine", warmup_ratio=0.03), 10) == 1
    assert warmup_length(config("cosine", warmup_ratio=0.03), 101) == 4
    assert warmup_length(config("cosine", warmup_ratio=0.0), 101) == 0
    assert warmup_length(config("cosine", warmup_steps=7), 101) == 7


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="polynomial"):
        learning_rate(config("polynomial", warmup_steps=0), 1, 10)
