"""Rewards: does a response keep the format, and is the answer in it the ground truth?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from cs336_alignment.config import EvaluationConfig
from cs336_alignment.evaluation.answers import answers_equal
from cs336_alignment.evaluation.chosen_letter import chosen_letter, whole_letter
from cs336_alignment.evaluation.custom_reward import CustomReward
from cs336_alignment.evaluation.final_answer import in_answer_tags, last_number, marked_answer

RewardFunction = Callable[[str, str], Mapping[str, Any]]
"""(response, ground truth) → `reward`, `format_reward`, `answer_reward`, and what else is worth
keeping beside the response.
"""


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
    return in_answer_tags(response) if _has_format(response) else None


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
    right = answer is not None and answers_equal(answer, ground_truth)
    return _scores(_has_format(response), right)


def gsm8k_reward(response: str, ground_truth: str) -> dict[str, float]:
    """Score the final answer of a response that need not have tags, such as GSM8K's own.

    The final answer is the rest of the line after the last `####`; without one, the text in the
    last `<answer> </answer>`; without tags, what the last `\\boxed{}` holds; and where none of them
    is there or the one that is there is empty or never closed, the last number of the response.

    Args:
        response: what the model wrote after the prompt.
        ground_truth: the right answer.

    Returns:
        `reward`, `format_reward` and `answer_reward`, each 0.0 or 1.0. `format_reward` is 1 if the
        response marks its answer in one of the three ways; `answer_reward` does not need it;
        `reward` is `answer_reward`.

    Example:
        >>> gsm8k_reward("48 / 2 = 24\\n#### 24", "24")
        {'reward': 1.0, 'format_reward': 1.0, 'answer_reward': 1.0}
        >>> gsm8k_reward("She sold 24 clips.", "24")
        {'reward': 1.0, 'format_reward': 0.0, 'answer_reward': 1.0}
    """
    marked = marked_answer(response)
    answer = last_number(response) if marked is None else marked
    right = answer is not None and answers_equal(answer, ground_truth)
    return _scores(marked is not None, right)


def exact_match_reward(response: str, ground_truth: str) -> dict[str, float]:
    """Score a response that must be the ground truth, character for character.

    Args:
        response: what the model wrote after the prompt; if it has answer tags, what counts is the
            text in the last ones. White space at the ends is no difference.
        ground_truth: the right answer.

    Returns:
        `reward`, `format_reward` and `answer_reward`, each 0.0 or 1.0. `format_reward` is 1 if the
        answer is not empty; `reward` is `answer_reward`.

    Example:
        >>> exact_match_reward(" Paris\\n", "Paris")["reward"]
        1.0
        >>> exact_match_reward("paris", "Paris")["reward"]
        0.0
    """
    tagged = in_answer_tags(response)
    answer = response.strip() if tagged is None else tagged
    return _scores(bool(answer), bool(answer) and answer == ground_truth.strip())


def multiple_choice_reward(
    response: str, ground_truth: str, *, choices: Sequence[str] = ()
) -> dict[str, float]:
    """Score the letter that a response chooses, see `chosen_letter`.

    Args:
        response: what the model wrote after the prompt.
        ground_truth: the letter of the right choice.
        choices: the texts of the choices, where they are known; a response may give one of them in
            place of its letter.

    Returns:
        `reward`, `format_reward` and `answer_reward`, each 0.0 or 1.0. `format_reward` is 1 if the
        response chooses one letter; `reward` is `answer_reward`.

    Example:
        >>> multiple_choice_reward("The correct answer is B.", "B")["reward"]
        1.0
        >>> multiple_choice_reward("A", "B")
        {'reward': 0.0, 'format_reward': 1.0, 'answer_reward': 0.0}
    """
    letter = chosen_letter(response, choices)
    right = letter is not None and letter == whole_letter(ground_truth, choices)
    return _scores(letter is not None, right)


def _scores(has_format: bool, right: bool) -> dict[str, float]:
    answer = float(right)
    return {"reward": answer, "format_reward": float(has_format), "answer_reward": answer}


REWARDS: dict[str, RewardFunction] = {
    "r1_zero": r1_zero_reward,
    "gsm8k": gsm8k_reward,
    "exact_match": exact_match_reward,
    "multiple_choice": multiple_choice_reward,
}
"""Reward functions by the name a configuration gives them."""


def make_reward(config: EvaluationConfig) -> RewardFunction:
    """Give the reward that a configuration names.

    Args:
        config: the evaluation section, checked: a custom reward is allowed if it names one.

    Returns:
        One of `REWARDS`, or a `CustomReward`, which lives in a process of its own until it is
        closed.

    Raises:
        UserError: a custom reward cannot be imported (78).
    """
    if config.reward in REWARDS:
        return REWARDS[config.reward]
    return CustomReward(config.reward, config.reward_seconds)


def with_choices(reward: RewardFunction, choices: Sequence[str]) -> RewardFunction:
    """Tell a reward the choices of a question, if it is one that can use them."""
    if reward is multiple_choice_reward and choices:
        return partial(multiple_choice_reward, choices=choices)
    return reward


def describe_reward(config: EvaluationConfig, reward: RewardFunction) -> str:
    """Say in a line which reward grades."""
    if not isinstance(reward, CustomReward):
        return f"reward     {config.reward}"
    return (
        f"reward     {reward.path} of {reward.source['file']}, in a process of its own, at most "
        f"{config.reward_seconds:g} s a response"
    )


def code_of(reward: RewardFunction) -> str | None:
    """Give the sha256 of the file that a user's reward function is from; None for those here."""
    return reward.source["sha256"] if isinstance(reward, CustomReward) else None
