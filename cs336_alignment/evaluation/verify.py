"""What counts as a correct response, for data that are filtered and for responses that are kept."""

from __future__ import annotations

from collections.abc import Callable

from cs336_alignment.config import EvaluationConfig
from cs336_alignment.evaluation.rewards import REWARDS


def make_verify(config: EvaluationConfig) -> Callable[[str, str], bool]:
    """Make the function that `data.filter=correct` asks.

    Args:
        config: names the reward.

    Returns:
        (response, ground truth) → whether the answer has a reward.

    Example:
        >>> verify = make_verify(EvaluationConfig())
        >>> verify("3 + 4 is 7. </think> <answer> 7 </answer>", "7")
        True
    """
    reward = REWARDS[config.reward]
    return lambda response, truth: reward(response, truth)["answer_reward"] > 0
