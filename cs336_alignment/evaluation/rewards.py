"""Rewards: does a response keep the format, and is the answer in it the ground truth?"""

from __future__ import annotations

from collections.abc import Callable

from cs336_alignment.evaluation.answers import answers_equal

RewardFunction = Callable[[str, str], dict[str, float]]


def extract_answer(response: str) -> str | None:
    """The text in the last pair of answer tags, or None without `</think> <answer>…</answer>`.

    As in CS336's grader the last `<answer>` counts, so an answer given twice is its last version,
    and of nested tags the innermost. If that last tag is never closed there is no answer.

    Args:
        response: what the model wrote after the prompt.

    Returns:
        The stripped text between the tags (perhaps empty), or None.

    Example:
        >>> extract_answer("3 + 4 is 7. </think> <answer> 7 </answer>")
        '7'
        >>> extract_answer("7") is None
        True
    """
    if not _has_format(response):
        return None
    start = response.rfind("<answer>") + len("<answer>")
    end = response.find("</answer>", start)
    return None if end < 0 else response[start:end].strip()


def _has_format(response: str) -> bool:
    opening = response.find("</think> <answer>")
    return opening >= 0 and response.find("</answer>", opening) >= 0


def r1_zero_reward(response: str, ground_truth: str) -> dict[str, float]:
    """Score a response to the `r1_zero` prompt: 1 for a right answer in the right format, else 0.

    Args:
        response: what the model wrote after the prompt (which ends in `<think>`).
        ground_truth: the right answer.

    Returns:
        `reward`, `format_reward` and `answer_reward`, each 0.0 or 1.0. The format is kept if the
        response contains `</think> <answer>` (one space) and `</answer>` after it; `answer_reward`
        needs the format too; `reward` is `answer_reward`.

    Example:
        >>> r1_zero_reward("3 + 4 is 7. </think> <answer> 7 </answer>", "7")
        {'reward': 1.0, 'format_reward': 1.0, 'answer_reward': 1.0}
        >>> r1_zero_reward("The answer is 7.", "7")
        {'reward': 0.0, 'format_reward': 0.0, 'answer_reward': 0.0}
    """
    answer = extract_answer(response)
    answer_reward = float(answer is not None and answers_equal(answer, ground_truth))
    return {
        "reward": answer_reward,
        "format_reward": float(_has_format(response)),
        "answer_reward": answer_reward,
    }


REWARDS: dict[str, RewardFunction] = {"r1_zero": r1_zero_reward}
"""Reward functions by the name a configuration gives them."""
