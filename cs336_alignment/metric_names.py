"""The metrics that an evaluation writes: their names, which way is better, and what they need."""

from __future__ import annotations

import difflib

GENERATED = (  # of what the model says; they come where `evaluation.generation_steps` is due
    "eval/reward", "eval/format_reward", "eval/answer_reward", "eval/stop_rate",
    "eval/truncation_rate", "eval/response_entropy", "eval/response_length",
    "eval/response_length_correct", "eval/response_length_incorrect", "eval/reward_errors",
)  # fmt: skip
EVALUATED = (
    "eval/loss", "eval/loss_first_token", "eval/loss_stop_token", "eval/token_entropy", *GENERATED,
)  # fmt: skip
# Nothing may be correct, nothing wrong, no response may end in a stop token, no reward may fail.
SOMETIMES = frozenset({
    "eval/response_length_correct", "eval/response_length_incorrect", "eval/loss_stop_token",
    "eval/reward_errors",
})  # fmt: skip
SMALLER_WORDS = ("loss", "entropy", "length", "perplexity", "truncation", "error", "seconds")
GREATER_WORDS = ("reward", "rate", "accuracy")


def greater_is_better(metric: str) -> bool | None:
    """Tell from a metric's name which way is better; None where the name does not say.

    Example:
        >>> greater_is_better("eval/answer_reward"), greater_is_better("eval/loss/gsm8k")
        (True, False)
    """
    name = metric.removeprefix("eval/").partition("/")[0]
    if any(word in name for word in SMALLER_WORDS):
        return False
    return True if any(word in name for word in GREATER_WORDS) else None


def nearest_metric(metric: str, known: tuple[str, ...] = EVALUATED) -> str | None:
    """Find the metric that was probably meant, with or without its `eval/`.

    Example:
        >>> nearest_metric("answer_rewrad")
        'eval/answer_reward'
    """
    short = {name.removeprefix("eval/"): name for name in known}
    leaf = metric.removeprefix("eval/").removeprefix("eval_")
    matches = difflib.get_close_matches(leaf, short, n=1)
    return short[matches[0]] if matches else None
