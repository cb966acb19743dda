"""Thousands of strings that nobody would write as an answer: no reward crashes or hangs on any.

Run as a script it prints what the strings of a seed cost: `python tests/unit/test_reward_fuzz.py 10000`.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

CALL_SECONDS = 6.0  # of computing; MAX_SECONDS of the grader on a machine that is doing more
TRUTHS = ("7", "x^2+1", "\\frac{1}{2}", "\\sqrt{7}", "(1, 2]", "B", "\\{1,2\\}")
TOKENS = (
    *"0123456789xyzabni+-*/^=<>!(){}[],.;:$%_&|'\"` ",
    *("\\frac", "\\sqrt", "\\pi", "\\boxed{", "\\{", "\\}", "\\text{", "\\cup", "\\infty", "\\binom"),
    *("\\left(", "\\right)", "\\\\", "\\pm ", "\\%", "\\sin ", "\\le ", "\\frac{1}{2}", "^{2}", "^{99}"),
    *(" or ", " and ", " cm", "1/2", "1,000", "\\begin{pmatrix}", "\\end{pmatrix}", "\\log", "\\in "),
    *("####", "<answer>", "</answer>", "</think>", "The answer is ", "\n", "\\sum_{i=1}^{9}", "10^{", "e"),
)  # fmt: skip


def _unicode(rng: random.Random) -> str:
    points = (rng.choice((0x80, 0x3000, 0x10FFFF)) for _ in range(rng.randrange(1, 60)))
    return "".join(chr(rng.randrange(1, most)) for most in points)


def _soup(rng: random.Random) -> str:
    return "".join(rng.choices(TOKENS, k=rng.randrange(1, 25)))


def _nested(rng: random.Random) -> str:
    opening, closing = rng.choice(
        (("(", ")"), ("{", "}"), ("\\frac{1}{", "}"), ("\\sqrt{", "}"), ("\\boxed{", "}"), ("[", "]"),
         ("2^{", "}"), ("\\left(", "\\right)"), ("<answer>", "</answer>"), ("|", "|"), ("\\text{", "}"))
    )  # fmt: skip
    depth = rng.choice((2, 5, 9, 30, 100, 5_000))
    return opening * depth + rng.choice("123xyz") + closing * (depth - rng.randrange(2))


def _tower(rng: random.Random) -> str:
    sign = rng.choice(("^", "**"))
    numbers = [str(rng.choice((2, 9, 10, 99, 10**9))) for _ in range(rng.randrange(2, 8))]
    if rng.random() < 0.5:
        return "^{".join(numbers) + "}" * (len(numbers) - 1)
    return rng.choice(("", "x+", "\\sqrt{2}+")) + sign.join(numbers)


def _factorials(rng: random.Random) -> str:
    parts = (f"{rng.choice((3, 20, 99, 10**6))}{'!' * rng.randrange(1, 4)}" for _ in range(4))
    return rng.choice("+*/^").join(parts)


def _formula(rng: random.Random, depth: int = 3) -> str:
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(("x", "y", "z", "2", "3", "17", "0.5", "\\pi", "n"))
    one, two = _formula(rng, depth - 1), _formula(rng, depth - 1)
    return rng.choice(
        (f"({one}+{two})", f"{one}*{two}", f"\\frac{{{one}}}{{{two}}}", f"({one})^{{{rng.randrange(12)}}}",
         f"\\sqrt{{{one}}}", f"\\sin({one})", f"{one}-{two}", f"\\log({one})", f"({one})({two})")
    )  # fmt: skip


def _long(rng: random.Random) -> str:
    return rng.choice(TOKENS) * rng.choice((290, 10_000, 50_000))


KINDS: tuple[Callable[[random.Random], str], ...] = (
    _unicode, _soup, _soup, _nested, _tower, _factorials, _formula, _long,
)  # fmt: skip


def _fuzz(count: int, seed: int) -> tuple[float, float, str]:
    """Grade so many strings; returns all seconds, those of the slowest call, and its string."""
    from cs336_alignment.evaluation.answers import answers_equal
    from cs336_alignment.evaluation.grading import grade
    from cs336_alignment.evaluation.rewards import REWARDS

    answers_equal("x+1", "1+x")  # the import of sympy is not what is timed
    rng, slowest, begin = random.Random(seed), (0.0, ""), time.process_time()
    for number in range(count):
        text = KINDS[number % len(KINDS)](rng)
        truth = rng.choice((rng.choice(TRUTHS), text[:300], text[:280] + "+1"))
        started = time.process_time()
        equal = answers_equal(text, truth)
        assert isinstance(equal, bool)
        assert not (equal and text.strip() + "+1" == truth and "infty" not in text), text
        took = time.process_time() - started
        wrapped = rng.choice((text, f"a </think> <answer> {text} </answer>", f"#### {text}"))
        for name, reward in REWARDS.items() if number % 5 == 0 else ():
            row = grade(reward, wrapped, truth)
            assert "reward_error" not in row, (name, text, row)
        slowest = max(slowest, (took, text[:60]), (time.process_time() - started - took, text[:60]))
    return time.process_time() - begin, *slowest


def _check(count: int, seed: int) -> None:
    """In another process: a hang in C code would not let the test's own timeout through."""
    done = subprocess.run(
        [sys.executable, __file__, str(count), str(seed)], capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    _, slowest, text = done.stdout.rstrip("\n").split("\t", 2)
    assert float(slowest) < CALL_SECONDS, text


def test_five_hundred_strings() -> None:
    _check(500, seed=0)


@pytest.mark.slow
def test_ten_thousand_strings() -> None:
    _check(10_000, seed=1)


if __name__ == "__main__":
    total, slowest, text = _fuzz(int(sys.argv[1]), int((*sys.argv[1:], "0", "0")[1]))
    print(f"{total:.1f}", f"{slowest:.2f}", ascii(text), sep="\t")
