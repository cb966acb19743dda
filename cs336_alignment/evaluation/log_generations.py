"""Generate for given prompts, score what comes, and record it: `log_generations`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from cs336_alignment.data.tokenize import tokenize_prompts
from cs336_alignment.evaluation.rewards import RewardFunction
from cs336_alignment.model.log_probs import compute_entropy


class _StopStrings(StoppingCriteria):
    """Ends a row when one of the strings stands in what it generated."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_width: int
    ) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.prompt_width = prompt_width
        # A token stands for at least one byte, so a stop string lies within this many tokens of the
        # end.
        self.tail = max(len(text.encode()) for text in self.stop) + 1
        self.done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if self.done is None:
            self.done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        tails = input_ids[:, max(self.prompt_width, input_ids.shape[1] - self.tail) :].tolist()
        for row in (~self.done).nonzero().flatten().tolist():
            text = _decode(self.tokenizer, tails[row])
            if any(string in text for string in self.stop):
                self.done[row] = True
        return self.done


class _EntropyRecorder(LogitsProcessor):
    """Notes the entropy of every next-token distribution, before temperature; changes nothing."""

    def __init__(self) -> None:
        self.entropies: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.entropies.append(compute_entropy(scores))  # (B,)
        return scores


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

    Prompts are sorted by length and left-padded in batches; the result is in the order of the
    prompts. A row ends at EOS, after a stop string (which stays in the response), or at
    `max_new_tokens`.

    Args:
        model: a causal language model; its mode is restored afterwards.
        tokenizer: of the model.
        prompts: N prompts, used verbatim.
        ground_truths: N final answers.
        reward_fn: (response, ground truth) → `reward`, `format_reward`, `answer_reward`.
        max_new_tokens: per prompt.
        temperature: 0 is greedy.
        batch_size: prompts generated at once.
        stop: strings that end a response.
        seed: of sampling; the global random state is left alone.

    Returns:
        `rows`: a dict for each prompt: `prompt`, `response`, `ground_truth`, `reward`,
        `format_reward`, `answer_reward`, `token_entropy` (mean over the response, nats), `length`
        (tokens), `stopped` (`eos`, `stop` or `length`). `summary`: means of the rewards,
        `stop_rate`, `token_entropy`, and `length`, `length_correct`, `length_incorrect` (None
        where there is no such response).

    Raises:
        ValueError: different numbers of prompts and ground truths, or a string for `stop`.
    """
    if isinstance(stop, str):  # its letters would each end a response
        raise ValueError(f"stop must be a sequence of strings, got the string {stop!r}")
    if len(prompts) != len(ground_truths):
        raise ValueError(f"got {len(prompts)} prompts and {len(ground_truths)} ground truths")
    rows = generate_rows(
        model, tokenizer, tokenize_prompts(prompts, tokenizer), ground_truths, reward_fn,
        max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size, stop=stop,
        seed=seed,
    )  # fmt: skip
    rows = [{**row, "prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)]
    return {"rows": rows, "summary": summarize(rows)}


def generate_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    ground_truths: Sequence[str],
    reward_fn: RewardFunction,
    *,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    stop: Sequence[str],
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Do the work of `log_generations` for prompts that are tokens already.

    Args:
        model: a causal language model; its mode is restored afterwards.
        tokenizer: of the model.
        prompts: N prompts as token ids.
        ground_truths: N final answers.
        reward_fn: as there, like all that follows.
        max_new_tokens: per prompt.
        temperature: 0 is greedy.
        batch_size: prompts generated at once.
        stop: strings that end a response.
        seed: of sampling.
        advance: called with the number of prompts done; what it raises ends the generation.

    Returns:
        The rows, in the order of the prompts; their `prompt` is decoded.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    rows: list[dict[str, Any]] = [{} for _ in prompts]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=_cuda_devices(model)):
            torch.manual_seed(seed)
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = [prompts[i] for i in chosen]
                generated = _generate(model, tokenizer, batch, max_new_tokens, temperature, stop)
                for index, result in zip(chosen, generated, strict=True):
                    truth = ground_truths[index]
                    rows[index] = {
                        "prompt": _decode(tokenizer, prompts[index]),
                        "response": result["response"],
                        "ground_truth": truth,
                        **reward_fn(result["response"], truth),
                        **{key: result[key] for key in ("token_entropy", "length", "stopped")},
                    }
                advance(len(chosen))
    finally:
        model.train(training)
    return rows


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    stop: Sequence[str],
) -> list[dict[str, Any]]:
    width = max(len(prompt) for prompt in prompts)
    eos_ids = _eos_ids(model, tokenizer)
    pad_id = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(eos_ids), 0)
    )
    input_ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):  # left-padded: generation goes on at the right end
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        attention_mask[row, width - len(prompt) :] = 1
    recorder = _EntropyRecorder()
    criteria = [_StopStrings(tokenizer, stop, width)] if stop else []
    # A GenerationConfig of its own: the folder's may hold sampling options that greedy would warn
    # about.
    options = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        pad_token_id=pad_id,
        eos_token_id=sorted(eos_ids) or None,
        use_cache=True,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
    )
    generate: Any = model.generate  # its decorators hide its type
    output = generate(
        input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=options,
        logits_processor=LogitsProcessorList([recorder]),
        stopping_criteria=StoppingCriteriaList(criteria),
    )
    new_tokens = output[:, width:].tolist()
    entropies = torch.stack(recorder.entropies, dim=1).tolist()  # (B, steps)
    return [
        _read_row(tokenizer, tokens, entropy, eos_ids, stop)
        for tokens, entropy in zip(new_tokens, entropies, strict=True)
    ]


def _read_row(
    tokenizer: PreTrainedTokenizerBase,
    tokens: list[int],
    entropies: list[float],
    eos_ids: set[int],
    stop: Sequence[str],
) -> dict[str, Any]:
    """Cut one row where it ended; what follows is padding."""
    end = next((i for i, token in enumerate(tokens) if token in eos_ids), None)
    length = len(tokens) if end is None else end + 1
    text = _decode(tokenizer, tokens[: length - (end is not None)])
    stopped = "length" if end is None else "eos"
    ends = [text.find(string) + len(string) for string in stop if string in text]
    if ends:
        text, stopped = text[: min(ends)], "stop"
        length = _tokens_until(tokenizer, tokens[:length], min(ends))
    return {
        "response": text,
        "token_entropy": sum(entropies[:length]) / max(1, length),
        "length": length,
        "stopped": stopped,
    }


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """Give the exact text: special tokens kept, no spaces tidied away."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(tokens, **options))


def _tokens_until(tokenizer: PreTrainedTokenizerBase, tokens: list[int], characters: int) -> int:
    """Count the tokens whose text reaches this many characters."""
    low, high = 1, len(tokens)
    while low < high:
        middle = (low + high) // 2
        if len(_decode(tokenizer, tokens[:middle])) >= characters:
            high = middle
        else:
            low = middle + 1
    return low


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ids = {tokenizer.eos_token_id}
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids.update(configured if isinstance(configured, list) else [configured])
    return {i for i in ids if i is not None}


def _cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Average rewards, entropy and lengths over generated rows.

    Args:
        rows: as `log_generations` makes them.

    Returns:
        Means; `length_correct` and `length_incorrect` are over the rows with and without answer
        reward.
    """

    def mean(key: str, chosen: Sequence[dict[str, Any]]) -> float | None:
        return math.fsum(row[key] for row in chosen) / len(chosen) if chosen else None

    correct = [row for row in rows if row["answer_reward"] > 0]
    incorrect = [row for row in rows if row["answer_reward"] <= 0]
    summary = {
        key: mean(key, rows)
        for key in ("reward", "format_reward", "answer_reward", "token_entropy")
    }
    stops = [{"stop": float(row["stopped"] != "length")} for row in rows]
    return {
        **summary,
        "stop_rate": mean("stop", stops),
        "length": mean("length", rows),
        "length_correct": mean("length", correct),
        "length_incorrect": mean("length", incorrect),
    }
