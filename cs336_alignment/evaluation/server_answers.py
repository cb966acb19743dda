"""Answers of an OpenAI-compatible server, checked, and made what `Generation` promises."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from cs336_alignment.data.tokenize import decode
from cs336_alignment.evaluation.sampling import Generation, Sampling, end_of_stop

ENDED = ("stop", "stop_sequence", "eos_token")  # Text Generation Inference has names of its own
CUT = ("length", "max_tokens")


class NoAnswer(Exception):
    """What came is no response; the message says why."""


@dataclass(frozen=True)
class Answer:
    """What a server says of one response.

    Attributes:
        text: as it came.
        cut: whether it ended for its length.
        matched: the stop string that ended it, if the server tells.
        num_tokens: of the response, None where the server does not count.
        num_prompt_tokens: of the prompt, likewise.
    """

    text: str
    cut: bool
    matched: str | None
    num_tokens: int | None
    num_prompt_tokens: int | None


def read_answer(answer: Any, model: str) -> Answer:
    """Read the answer of either endpoint.

    Args:
        answer: parsed JSON.
        model: that was asked for; `NAME@main` and `NAME-2024-08-06` pass as its full names.

    Raises:
        NoAnswer: a field is missing or is not what it must be.
    """
    if not isinstance(answer, Mapping):
        raise NoAnswer("the answer is no JSON object")
    named = answer.get("model")
    if named is not None and not (isinstance(named, str) and named.startswith(model)):
        raise NoAnswer(f"it comes from the model {named}, and {model} was asked")
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise NoAnswer("it has no choice, or several")
    choice = choices[0]
    message = choice.get("message")
    if isinstance(message, Mapping):
        for field in ("tool_calls", "reasoning_content", "reasoning"):
            if message.get(field):
                raise NoAnswer(
                    f"the server has taken {field} out of the text; start it without parsers of "
                    "reasoning and tools, or use evaluation.server_api=completions"
                )
    text = message.get("content") if isinstance(message, Mapping) else choice.get("text")
    if not isinstance(text, str):
        raise NoAnswer("it has no text")
    reason = choice.get("finish_reason")
    if reason not in (*ENDED, *CUT):
        raise NoAnswer(f"finish_reason is {reason}")
    told = [choice.get(name) for name in ("stop_reason", "matched_stop")]  # vLLM's, SGLang's
    matched = next((value for value in told if isinstance(value, str)), None)
    usage = answer.get("usage") or {}
    if not isinstance(usage, Mapping):
        raise NoAnswer("usage is no JSON object")
    return Answer(
        text, reason in CUT, matched, _count(usage, "completion_tokens"),
        _count(usage, "prompt_tokens"),
    )  # fmt: skip


def _count(usage: Mapping[str, Any], name: str) -> int | None:
    value = usage.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise NoAnswer(f"usage.{name} is {value}")
    return value


def to_generation(
    answer: Answer,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    eos: Collection[str],
) -> Generation:
    """Give the response as the model at hand would: with its stop string, without its EOS.

    Args:
        answer: of the server, which may keep a stop string, tell it, or run on behind it.
        sampling: that was asked for.
        tokenizer: of the model.
        eos: texts of the tokens that end a response.

    Raises:
        NoAnswer: it is shorter than `min_new_tokens`, or longer than `max_new_tokens`.
    """
    text, num_tokens = answer.text, answer.num_tokens
    end = end_after_minimum(text, sampling, tokenizer)
    stopped: Literal["eos", "stop", "length"]
    if end is not None:
        if end < len(text):
            text, num_tokens = text[:end], None
        stopped = "stop"
    elif not answer.cut and answer.matched in sampling.stop:
        text, stopped = text + str(answer.matched), "stop"
    elif answer.cut:
        stopped = "length"
    else:
        stopped = "eos"
        text = next((text.removesuffix(s) for s in sorted(eos) if s and text.endswith(s)), text)
    if num_tokens is None:
        num_tokens = count_tokens(text, tokenizer) + (stopped == "eos")
        num_tokens = min(num_tokens, sampling.max_new_tokens)
    elif num_tokens > sampling.max_new_tokens:
        raise NoAnswer(f"{num_tokens} tokens, above max_new_tokens={sampling.max_new_tokens}")
    elif num_tokens < sampling.min_new_tokens:
        raise NoAnswer(
            f"{num_tokens} tokens, below evaluation.min_new_tokens={sampling.min_new_tokens}, "
            "which this server seems not to know"
        )
    return Generation(text, (), None, num_tokens, stopped)


def end_after_minimum(
    text: str, sampling: Sampling, tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """Find where the first stop string ends that counts; None: there is none.

    Args:
        text: of a response.
        sampling: its stop strings; one that is over before `min_new_tokens` does not count.
        tokenizer: of the model.
    """
    if not any(string in text for string in sampling.stop):
        return None
    earlier = ""
    if sampling.min_new_tokens > 1:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        earlier = decode(tokenizer, ids[: sampling.min_new_tokens - 1])
    return end_of_stop(text, earlier, sampling.stop)


def count_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the tokens of a text that is no prompt."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
