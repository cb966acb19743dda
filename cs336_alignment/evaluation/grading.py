"""Grading that no reward function can stop: what goes wrong is written beside the response."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cs336_alignment.errors import UserError, describe
from cs336_alignment.evaluation.custom_reward import RewardFailure
from cs336_alignment.evaluation.rewards import RewardFunction

REWARD_KEYS = ("reward", "format_reward", "answer_reward")
ERROR = "reward_error"
# What a row of generations holds besides; a reward cannot give these.
ROW_KEYS = (
    "index", "sample", "prompt", "response", "ground_truth", "token_entropy", "length", "stopped",
    ERROR,
)  # fmt: skip
MOST_CHARACTERS = 500


def grade(reward: RewardFunction, response: str, ground_truth: str) -> dict[str, Any]:
    """Score a response; a reward that fails scores 0.

    Args:
        reward: grades.
        response: what the model wrote.
        ground_truth: the right answer.

    Returns:
        `reward`, `format_reward` and `answer_reward`, finite floats, and what else the reward gave;
        if it raised, or gave no such mapping, three times 0.0 and `reward_error`, what happened.
    """
    try:
        found = reward(response, ground_truth)
        problem = _problem(found)
    except Exception as failure:
        problem = f"{type(failure).__name__}: {failure}"
        if isinstance(failure, RewardFailure):
            problem = str(failure)
    if problem is not None:
        return {**dict.fromkeys(REWARD_KEYS, 0.0), ERROR: problem[:MOST_CHARACTERS]}
    return {**found, **{key: float(found[key]) for key in REWARD_KEYS}}


def _problem(found: Any) -> str | None:
    """Say what is wrong with what a reward gave, None if nothing is."""
    if not isinstance(found, Mapping):
        return f"it gave {describe(found)}, not a dict with {', '.join(REWARD_KEYS)}"
    if lacking := [key for key in REWARD_KEYS if key not in found]:
        return f"it gave no {', '.join(lacking)}, but {', '.join(map(str, found)) or 'nothing'}"
    for key in REWARD_KEYS:
        try:
            value = float(found[key])
        except (TypeError, ValueError, OverflowError):
            return f"its {key} is {describe(found[key])}, no number"
        if isinstance(found[key], str) or not math.isfinite(value):
            return f"its {key} is {describe(found[key])}, no finite number"
    if taken := [key for key in found if key in ROW_KEYS]:
        return f"it gave {', '.join(taken)}, which every row has already"
    extra = {key: value for key, value in found.items() if key not in REWARD_KEYS}
    try:
        json.dumps(extra)
    except (TypeError, ValueError, RecursionError) as failure:
        return f"what it gave cannot be written as JSON: {failure}"
    return None


def close_reward(reward: RewardFunction) -> None:
    """End what a reward keeps open, if it does."""
    close = getattr(reward, "close", None)
    if close is not None:
        close()


def failures_of(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Tell in a line how many rows could not be graded and what happened in the first of them; None
    if all could.

    Raises:
        UserError: none could (70).
    """
    failed = [row for row in rows if ERROR in row]
    if not failed:
        return None
    first = f"prompt {failed[0]['index'] + 1}: {failed[0][ERROR]}"
    if len(failed) == len(rows):
        raise UserError(
            "R320",
            f"the reward failed on all {len(rows):,} responses, so there is nothing to report",
            got=first,
            hint="mend the function of evaluation.reward; responses that are kept stay",
        )
    return (
        f"the reward failed on {len(failed):,} of {len(rows):,} responses, which count as 0; the "
        f"first, {first}"
    )
