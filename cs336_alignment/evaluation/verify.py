"""What counts as a correct response, for data that are filtered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cs336_alignment.config import EvaluationConfig
from cs336_alignment.errors import UserError
from cs336_alignment.evaluation.grading import ERROR, close_reward, grade
from cs336_alignment.evaluation.rewards import RewardFunction, make_reward


@contextmanager
def verifying(config: EvaluationConfig) -> Iterator[Callable[[str, str], bool]]:
    """Give the function that `data.filter=correct` asks, for the time of a block.

    Args:
        config: names the reward; it is made when the function is first called.

    Returns:
        (response, ground truth) → whether the answer has a reward. It raises UserError where the
        reward fails (70): a row that could not be verified is not a wrong one.

    Example:
        >>> with verifying(EvaluationConfig()) as verify:
        ...     verify("3 + 4 is 7. </think> <answer> 7 </answer>", "7")
        True
    """
    made: list[RewardFunction] = []

    def verify(response: str, ground_truth: str) -> bool:
        if not made:
            made.append(make_reward(config))
        found = grade(made[0], response, ground_truth)
        if ERROR in found:
            raise UserError(
                "R322",
                "the reward failed on a row of the training data, so data.filter=correct cannot "
                "tell whether it is correct",
                got=f"{found[ERROR]}; ground truth {ground_truth[:80]!r}",
                hint="mend the function of evaluation.reward, or data.filter=none",
            )
        return bool(found["answer_reward"] > 0)

    try:
        yield verify
    finally:
        for reward in made:
            close_reward(reward)
