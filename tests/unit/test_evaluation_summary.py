"""An evaluation in numbers: by prompt, beside a baseline, by category, on a page."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cs336_alignment.evaluation.summary import count_outcomes, summarize_evaluation, to_json
from cs336_alignment.evaluation.summary_page import brief_table_of, to_markdown


def row(
    index: int, right: float, kept: float = 1.0, sample: int = 0, **other: Any
) -> dict[str, Any]:
    return {
        "index": index, "sample": sample, "prompt": f"q{index}", "response": f"r{index}",
        "ground_truth": "7", "reward": right, "format_reward": kept, "answer_reward": right,
        "token_entropy": 0.5, "length": 10 + index, "stopped": "eos", **other,
    }  # fmt: skip


def test_beside_a_baseline() -> None:
    model = [row(i, float(i % 4 > 0)) for i in range(40)]
    base = [row(i, float(i % 4 == 1)) for i in range(40)]
    summary = summarize_evaluation(model, base, groups={}, seed=0)
    reward = summary.findings[0]
    assert reward.metric == "eval/reward" and reward.model.value == 0.75
    assert reward.baseline is not None and reward.baseline.value == 0.25
    assert reward.difference is not None and reward.difference.value == 0.5
    assert 0.3 < reward.difference.low < 0.5 < reward.difference.high < 0.7
    assert reward.test is not None and reward.test.name == "McNemar exact"
    assert reward.test.discordant == reward.test.better == 20
    assert reward.test.p_value == 2 * 0.5**20
    lengths = next(f for f in summary.findings if f.metric == "eval/response_length")
    assert lengths.test is not None and lengths.test.name.startswith("paired permutation")
    assert lengths.test.p_value == 1.0


def test_equal_arms() -> None:
    rows = [row(i, float(i % 3 == 0)) for i in range(9)]
    for finding in summarize_evaluation(rows, rows, groups={}, seed=0).findings:
        assert finding.difference is not None and finding.test is not None
        assert finding.difference.value == finding.difference.low == finding.difference.high == 0
        assert finding.test.p_value == 1.0


def test_samples_are_averaged_before_prompts_are_resampled() -> None:
    # Two prompts, one always right and one never: however many samples, two independent things.
    rows = [row(i, float(i), sample=s) for i in range(2) for s in range(50)]
    summary = summarize_evaluation(rows, rows, groups={}, seed=0)
    reward = summary.findings[0]
    assert (summary.prompts, summary.samples) == (2, 50)
    assert (reward.model.value, reward.model.low, reward.model.high) == (0.5, 0.0, 1.0)
    assert reward.test is not None and reward.test.name.startswith("paired permutation")


def test_rows_in_any_order_pair_by_prompt() -> None:
    model = [row(i, float(i % 3 == 0)) for i in range(20)]
    shuffled = sorted(model, key=lambda r: (r["index"] * 7) % 20)
    summary = summarize_evaluation(model, shuffled, groups={}, seed=0)
    assert summary.findings[0].test is not None and summary.findings[0].test.discordant == 0
    with pytest.raises(ValueError, match="different prompts"):
        summarize_evaluation(model, model[:-1], groups={}, seed=0)


def test_what_a_backend_does_not_tell_is_left_out() -> None:
    rows = [row(i, 1.0, token_entropy=None) for i in range(3)]
    metrics = {f.metric for f in summarize_evaluation(rows, None, groups={}, seed=0).findings}
    assert "eval/response_entropy" not in metrics and "eval/response_length" in metrics


def test_outcomes_and_groups() -> None:
    rows = [row(0, 1.0), row(1, 0.0), row(2, 0.0, 0.0), row(3, 1.0, 0.0), row(4, 1.0)]
    assert count_outcomes(rows) == {(1, 1): 2, (1, 0): 1, (0, 1): 1, (0, 0): 1}
    groups = {"subject": {0: "algebra", 1: "algebra", 2: "geometry", 3: "algebra", 9: "none"}}
    summary = summarize_evaluation(rows, None, groups=groups, seed=0)
    by = {value: (n, f.model.value) for value, (n, f) in summary.groups["subject"].items()}
    assert by == {"algebra": (3, pytest.approx(2 / 3)), "geometry": (1, 0.0)}
    content = json.loads(json.dumps(to_json(summary), allow_nan=False))
    assert content["groups"]["subject"]["algebra"]["num_prompts"] == 3
    assert content["outcomes"]["format 0, answer 1"] == 1 and "comparison" not in content


def test_the_page_can_be_pasted() -> None:
    rows = [row(i, 0.0, response="```python\nx | y\n```" if i == 0 else "r") for i in range(8)]
    better = [row(i, float(i > 1)) for i in range(8)]
    summary = summarize_evaluation(rows, better, groups={}, seed=0)
    page = to_markdown(
        summary, rows, model="a|b", baseline="base", data="d", settings={"stop": ["|"]}, examples=2
    )  # fmt: skip
    assert "| eval/reward | 0.7500 [" in page and "| 0.0000 [0.0000, 0.0000] | -0.7500 [" in page
    assert "McNemar exact, two-sided, 6 discordant pairs, the model is higher in 0 of them" in page
    assert f"at most {1 - 0.025 ** (1 / 8):.4f}" in page  # nothing right: the bootstrap is mute
    assert "````text\n```python" in page and page.count("Example ") == 2
    assert "| 1 | 0 | 2 | 8 |" in page and "['\\|']" in page
    for line in page.splitlines():
        if line.startswith("|---"):
            assert line.count("|") in (3, 5, 6)
    header, cells = brief_table_of(summary)
    assert all(len(each) == len(header) == 5 for each in cells)
