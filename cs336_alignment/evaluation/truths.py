"""Ground truths that a reward cannot do justice to, found before anything is generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cs336_alignment.evaluation.answers import MAX_CHARS, is_read
from cs336_alignment.evaluation.chosen_letter import whole_letter
from cs336_alignment.evaluation.spelling import normal_form

_GRADED_AS_MATHS = ("r1_zero", "gsm8k")
_MOST_SHOWN = 40  # characters of a ground truth


def doubtful_truths(
    truths: Mapping[int, str],
    choices: Mapping[int, Sequence[str]],
    reward: str,
    advance: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Name the ground truths by which a right answer may count as wrong.

    Args:
        truths: number of the example → its ground truth.
        choices: number of the example → the choices that its question gives, if any.
        reward: the name of the reward.
        advance: called with the number of ground truths looked at since the last call.

    Returns:
        A line for each kind of doubt, with how many there are and the first of them.
    """
    found: dict[str, list[int]] = {}
    for number, truth in truths.items():
        if reward in _GRADED_AS_MATHS:
            reason = _doubt(truth)
        elif reward == "multiple_choice" and whole_letter(truth, choices.get(number, ())) is None:
            reason = "no letter of a choice: nothing is right"
        else:
            reason = None
        if reason is not None:
            found.setdefault(reason, []).append(number)
        advance(1)
    return [
        f"{len(numbers):,} of {len(truths):,} ground truths are {reason} (the first is that of "
        f"example {numbers[0] + 1}: {_shown(truths[numbers[0]])})"
        for reason, numbers in found.items()
    ]


def _doubt(truth: str) -> str | None:
    if not normal_form(truth.strip()):
        return "empty: nothing is right"
    if len(truth.strip()) > MAX_CHARS:
        return f"longer than {MAX_CHARS} characters: they are compared as text alone"
    if not is_read(truth):
        return "formulas that the grader does not read: they are compared as text alone"
    return None


def _shown(truth: str) -> str:
    text = " ".join(truth.split())
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "…"
