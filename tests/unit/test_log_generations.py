"""Generation: what is recorded is what the model said, whatever the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cs336_alignment.errors import UserError
from cs336_alignment.evaluation.log_generations import summarize
from cs336_alignment.evaluation.rewards import r1_zero_reward
from cs336_alignment.model.policy import Policy
from cs336_alignment.model.source import resolve_model
from cs336_alignment.sft import compute_entropy, log_generations
from cs336_alignment.tracking.console import Console
from cs336_alignment.tracking.tracker import show_examples

PROMPTS = ["1 + 1 = ?", "What is 12 plus 30?", "7 - 2 = ?", "347 + 85 = ?", "9"]
TRUTHS = ["2", "42", "5", "432", "9"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve_model("builtin:arithmetic", None, False).location)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, initializer_range=0.5, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def alone(model: Any, tokenizer: Any, prompt: str, steps: int) -> tuple[list[int], list[float]]:
    """Greedy decoding written out: no cache, no padding, one prompt."""
    ids = tokenizer(prompt)["input_ids"]
    start, entropies = len(ids), []
    while len(ids) - start < steps:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        entropies.append(compute_entropy(logits).item())
        ids = [*ids, int(logits.argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return ids[start:], entropies


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_rows_equal_decoding_one_by_one(batch_size: int, model: Any, tokenizer: Any) -> None:
    result = log_generations(
        model, tokenizer, PROMPTS, TRUTHS, r1_zero_reward, max_new_tokens=12,
        batch_size=batch_size, stop=(),
    )  # fmt: skip
    for row, prompt, truth in zip(result["rows"], PROMPTS, TRUTHS, strict=True):
        tokens, entropies = alone(model, tokenizer, prompt, 12)
        ended = tokens[-1] == tokenizer.eos_token_id
        assert (row["prompt"], row["ground_truth"]) == (prompt, truth)
        assert row["response"] == tokenizer.decode(tokens[: len(tokens) - ended])
        assert row["length"] == len(tokens)
        assert row["stopped"] == ("eos" if ended else "length")
        assert row["token_entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-6)


def test_the_trained_attention_generates_the_same(model: Any, tokenizer: Any) -> None:
    plain = log_generations(model, tokenizer, PROMPTS, TRUTHS, r1_zero_reward, max_new_tokens=8)
    Policy(model)  # switches the attention to the one that takes flat rows
    flat = log_generations(model, tokenizer, PROMPTS, TRUTHS, r1_zero_reward, max_new_tokens=8)
    model.set_attn_implementation("sdpa")
    assert [r["response"] for r in plain["rows"]] == [r["response"] for r in flat["rows"]]


def test_a_stop_string_ends_its_row_and_only_that(model: Any, tokenizer: Any) -> None:
    free = log_generations(
        model, tokenizer, PROMPTS, TRUTHS, r1_zero_reward, max_new_tokens=12, stop=()
    )
    text = free["rows"][1]["response"]
    stop = text[3:5]
    result = log_generations(
        model, tokenizer, PROMPTS, TRUTHS, r1_zero_reward, max_new_tokens=12, stop=(stop,)
    )
    for row, whole in zip(result["rows"], free["rows"], strict=True):
        if stop in whole["response"]:
            end = whole["response"].index(stop) + len(stop)
            assert row["response"] == whole["response"][:end]
            assert row["stopped"] == "stop" and 0 < row["length"] <= whole["length"]
        else:
            assert (row["response"], row["stopped"]) == (whole["response"], whole["stopped"])
    assert result["rows"][1]["stopped"] == "stop"


def test_sampling_repeats_by_seed_and_leaves_the_global_state_alone(
    model: Any, tokenizer: Any
) -> None:
    def sample(seed: int) -> list[str]:
        result = log_generations(
            model, tokenizer, PROMPTS, TRUTHS, r1_zero_reward, max_new_tokens=8, temperature=1.5,
            seed=seed,
        )  # fmt: skip
        return [row["response"] for row in result["rows"]]

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = sample(1)
    assert torch.equal(before, torch.get_rng_state())
    assert first == sample(1) != sample(2)


def test_summary_is_over_the_rows() -> None:
    common = {"format_reward": 1.0, "token_entropy": 0.5}
    rows = [
        {**common, "reward": 1.0, "answer_reward": 1.0, "length": 4, "stopped": "stop"},
        {**common, "reward": 0.0, "answer_reward": 0.0, "length": 10, "stopped": "length"},
        {**common, "reward": 0.0, "answer_reward": 0.0, "length": 6, "stopped": "eos"},
    ]
    summary = summarize(rows)
    assert summary["length"] == pytest.approx(20 / 3)
    assert (summary["length_correct"], summary["length_incorrect"]) == (4, 8)
    assert summary["stop_rate"] == pytest.approx(2 / 3)
    assert summarize(rows[1:])["length_correct"] is None
    assert all(value is None for value in summarize([]).values())


def test_a_reward_that_fails_costs_its_own_row_alone(model: Any, tokenizer: Any) -> None:
    def reward(response: str, truth: str) -> dict[str, float]:
        return {"reward": 1.0 / (int(truth) - 5), "format_reward": 1.0, "answer_reward": 1.0}

    result = log_generations(model, tokenizer, PROMPTS, TRUTHS, reward, max_new_tokens=2)
    failed = [row for row in result["rows"] if "reward_error" in row]
    assert [row["ground_truth"] for row in failed] == ["5"] and failed[0]["reward"] == 0.0
    assert "ZeroDivisionError" in failed[0]["reward_error"]
    assert result["summary"]["reward_errors"] == 1
    with pytest.raises(UserError, match="all 1 responses"):
        log_generations(model, tokenizer, ["7 - 2 = ?"], ["5"], reward, max_new_tokens=2)


def test_a_reward_below_zero_is_shown_as_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "q", "response": "r", "ground_truth": "t", "answer_reward": -1.0}
    show_examples(Console(enabled=True), [{**row, "format_reward": 1.0}], 1)
    show_examples(Console(enabled=True), [{**row, "format_reward": -1.0}], 1)
    said = capsys.readouterr().out
    assert "(wrong)" in said and "(no answer)" in said and "correct" not in said


def test_numbers_must_agree(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="1 prompts and 2"):
        log_generations(model, tokenizer, ["a"], ["b", "c"], r1_zero_reward)
