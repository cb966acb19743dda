"""Generations with their rewards, entropies and lengths: what a policy says, written down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.data.tokenize import tokenize_prompts
from cs336_alignment.evaluation.generate import LocalGenerator
from cs336_alignment.evaluation.grading import ERROR, failures_of, grade
from cs336_alignment.evaluation.rewards import RewardFunction
from cs336_alignment.evaluation.sampling import Generation, Request, Sampling, request_seed


def log_generations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    ground_truths: Sequence[str],
    reward_fn: RewardFunction,
    *,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    batch_size: int = 8,
    stop: Sequence[str] = ("</answer>",),
    seed: int = 0,
) -> dict[str, Any]:
    """Generate a response to each prompt and record it with its rewards, entropy and length.

    The result does not depend on `batch_size`, but for rounding: sampling is seeded prompt by
    prompt. A response ends at EOS, after a stop string (which stays in it), at `max_new_tokens`, or
    where the model has no more positions.

    Args:
        model: a causal language model; its mode is restored afterwards.
        tokenizer: of the model.
        prompts: N prompts, used verbatim.
        ground_truths: N final answers.
        reward_fn: (response, ground truth) → `reward`, `format_reward`, `answer_reward`, and more
            that is kept in the row. Where it fails the row has rewards 0.0 and `reward_error`.
        max_new_tokens: per prompt.
        temperature: 0 is greedy.
        batch_size: responses in the making at once.
        stop: strings that end a response.
        seed: of sampling; the global random state is left alone.

    Returns:
        `rows`: a dict for each prompt: `prompt`, `response`, `ground_truth`, `reward`,
        `format_reward`, `answer_reward`, `token_entropy` (mean over the response, nats), `length`
        (tokens), `stopped` (`eos`, `stop` or `length`), `index` and `sample` (numbers of the prompt
        and of the response to it). `summary`: see `summarize`.

    Raises:
        ValueError: different numbers of prompts and ground truths, a string for `stop`, or a prompt
            that is empty or leaves no position for a response.
        UserError: the reward failed on every response.
    """
    if isinstance(stop, str):  # its letters would each end a response
        raise ValueError(f"stop must be a sequence of strings, got the string {stop!r}")
    if len(prompts) != len(ground_truths):
        raise ValueError(f"got {len(prompts)} prompts and {len(ground_truths)} ground truths")
    requests = [
        Request(ids, request_seed(seed, number, 0))
        for number, ids in enumerate(tokenize_prompts(prompts, tokenizer))
    ]
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, stop=tuple(stop))
    generator = LocalGenerator(model, tokenizer, batch_size=batch_size)
    rows = [
        generation_row(generation, prompt, truth, reward_fn, index=number)
        for number, (generation, prompt, truth) in enumerate(
            zip(generator.generate(requests, sampling), prompts, ground_truths, strict=True)
        )
    ]
    failures_of(rows)
    return {"rows": rows, "summary": summarize(rows)}


def generation_row(
    generation: Generation,
    prompt: str,
    ground_truth: str,
    reward_fn: RewardFunction,
    *,
    index: int,
    sample: int = 0,
) -> dict[str, Any]:
    """Grade a response and write down all that is known of it; see `log_generations`.

    Args:
        generation: the response.
        prompt: its prompt.
        ground_truth: the final answer.
        reward_fn: grades.
        index: number of the prompt.
        sample: number of the response to it.
    """
    return {
        "index": index,
        "sample": sample,
        "prompt": prompt,
        "response": generation.text,
        "ground_truth": ground_truth,
        **grade(reward_fn, generation.text, ground_truth),
        "token_entropy": generation.token_entropy,
        "length": generation.length,
        "stopped": generation.stopped,
    }


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Average rewards, entropy and lengths over generated rows.

    Args:
        rows: as `generation_row` makes them.

    Returns:
        Means of `reward`, `format_reward`, `answer_reward`, `token_entropy` and `length` (tokens),
        of the lengths of rows with and without answer reward (`length_correct`,
        `length_incorrect`); `stop_rate`, the share of rows that came to an end by themselves, and
        `truncation_rate`, that of the others; and `reward_errors`, how many rows the reward failed
        on. None where there is no such row.
    """

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return math.fsum(known) / len(known) if known else None

    keys = ("reward", "format_reward", "answer_reward", "token_entropy", "length")
    return {
        **{key: mean([row[key] for row in rows]) for key in keys},
        "length_correct": mean([row["length"] for row in rows if row["answer_reward"] > 0]),
        "length_incorrect": mean([row["length"] for row in rows if row["answer_reward"] <= 0]),
        "stop_rate": mean([float(row["stopped"] != "length") for row in rows]),
        "truncation_rate": mean([float(row["stopped"] == "length") for row in rows]),
        "reward_errors": float(sum(ERROR in row for row in rows)) or None,
    }
