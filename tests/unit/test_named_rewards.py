"""The rewards that a configuration names: what each takes for the answer, and what it never does."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from cs336_alignment.config import Config, EvaluationConfig
from cs336_alignment.config_check import REWARDS as NAMES
from cs336_alignment.config_check import check
from cs336_alignment.data.final_answers import last_boxed
from cs336_alignment.errors import UserError
from cs336_alignment.evaluation.answers import MAX_CHARS
from cs336_alignment.evaluation.chosen_letter import chosen_letter
from cs336_alignment.evaluation.final_answer import last_number, marked_answer
from cs336_alignment.evaluation.grading import failures_of, grade
from cs336_alignment.evaluation.log_generations import summarize
from cs336_alignment.evaluation.rewards import (
    REWARDS,
    exact_match_reward,
    gsm8k_reward,
    make_reward,
    multiple_choice_reward,
    with_choices,
)
from cs336_alignment.evaluation.truths import doubtful_truths

CITIES = ("London", "Paris", "Rome", "Berlin")


def scores(found: Any) -> tuple[float, float]:
    assert found["reward"] == found["answer_reward"]
    return found["format_reward"], found["answer_reward"]


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("\\boxed{5}", "5"), ("\\boxed{\\frac{1}{2}} and \\boxed{ 6 }.", "6"),
        ("\\boxed{\\boxed{5}}", "5"), ("\\fbox{5}", "5"), ("$\\boxed 5$", "5"), ("\\boxed 12.", "12"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"), ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{}", ""), ("\\boxed{1} \\boxed{2", None), ("5", None), ("\\boxed", None),
        ("\\boxedx{5}", None), ("\\boxed{a}}b}", "a"),
    ],
)  # fmt: skip
def test_the_last_box(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


# (response, format, answer reward for "72")
GSM8K = [
    ("48 + 24 = 72\n#### 72", 1, 1), ("#### 72 clips\nThe end.", 1, 1), ("#### 71\n#### 72", 1, 1),
    ("#### 72\n#### 71", 1, 0), ("The answer is 72.\n#### 71", 1, 0), ("####", 0, 0), ("#### \n72", 0, 1),
    ("<answer> 72 </answer>", 1, 1), ("72 <answer> 71 </answer>", 1, 0), ("<answer> 72", 0, 1),
    ("so \\boxed{72}.", 1, 1), ("\\boxed{71} or 72", 1, 0), ("<answer> \\boxed{72} </answer>", 1, 1),
    ("\\boxed{72} <answer> 71 </answer>", 1, 0), ("#### \\boxed{72}", 1, 1), ("\\boxed{72", 0, 1),
    ("She sold 72 clips.", 0, 1), ("48 and then 72", 0, 1), ("72 and then 48", 0, 0), ("$72.00", 0, 1),
    ("It is 7.2", 0, 0), ("172", 0, 0), ("72/2", 0, 0), ("7,200", 0, 0), ("-72", 0, 0), ("x = -72", 0, 0),
    ("100-72", 0, 1), ("seventy-two", 0, 0), ("", 0, 0), ("72!", 0, 1), ("72%", 0, 1), ("7.2e1", 0, 1),
]  # fmt: skip


@pytest.mark.parametrize(("response", "form", "answer"), GSM8K)
def test_gsm8k(response: str, form: int, answer: int) -> None:
    assert scores(gsm8k_reward(response, "72")) == (form, answer)


def test_the_last_number_as_it_is_spelled() -> None:
    assert last_number("from 1,234,567.5 to -3.5%") == "-3.5%"
    assert last_number("at 3:30.") == "3:30"
    assert last_number("none") is None
    assert marked_answer("nothing marked 5") is None


def test_exact_match() -> None:
    assert scores(exact_match_reward(" Paris\n", "Paris")) == (1, 1)
    assert scores(exact_match_reward("I think <answer> Paris </answer> it is", " Paris")) == (1, 1)
    assert scores(exact_match_reward("paris", "Paris")) == (1, 0)
    assert scores(exact_match_reward("72.0", "72")) == (1, 0)
    assert scores(exact_match_reward("Paris <answer> </answer>", "Paris")) == (0, 0)
    assert scores(exact_match_reward("  ", "")) == (0, 0)


CHOOSES_B = [
    "The correct answer is B", "<answer> B </answer>", "x </think> <answer>(b)</answer>", "(B)", "B.", "B",
    "b", "**B**", "\\boxed{B}", "$\\boxed{\\text{B}}$", "\\boxed{(B)}", "#### B", "Answer: B", "**Answer:** (B)",
    "answer is: **B**.", "The answer is (b) because it rains.", "B. Paris", "B) Paris", "(B) Paris", "B: Paris",
    "Paris", " paris. ", "The answer is Paris.", "It rains.\nThe answer is Paris", "<answer>Paris</answer>",
    "I first thought the answer is A, but the correct answer is B.", "The answer is B, not A.",
    "The answer is not A. The answer is B.", "Option B is correct.", "So B is the correct answer.",
    "I choose B", "I would go with option (B).", "The answer is A. No: the answer is B.", "Thinking.\nB",
    "B\n\nQuestion: what next?", "Thinking.\n\n(B)", "<answer> The answer is B </answer>", "Answer: $B$",
    "the right option is B)", "<answer>B. Paris</answer>", "\\boxed{7} is a number. The answer is B.",
    "The answer is B and I am sure.", "A is wrong. The answer is B.", "Final answer: B!",
]  # fmt: skip
CHOOSES_NONE = [
    "", "A dog is an animal.", "A man saw it, so it is a city.", "The answer is A dog.", "The answer is a city.",
    "The answer is A or B", "The answer is either A or B.", "A and B", "<answer>A, B</answer>", "Not B",
    "The answer is clear.", "I think so.", "A. London\nB. Paris\nC. Rome", "The answer is not B.",
    "I would not choose B.", "I don't think the answer is B.", "If the answer is B, then it rains.",
    "Vitamin B is best.", "The wrong answer is B.", "<answer> </answer> B", "<answer> B", "AB", "Bob", "C major",
    "The answer is B or maybe C", "A. Paris", "The answer is E", "<answer>A dog</answer>", "London or Paris",
    "12", "B&C", "Is the answer B or C?", "The grade was A+.",
]  # fmt: skip


@pytest.mark.parametrize("response", CHOOSES_B)
def test_the_letter_that_is_chosen(response: str) -> None:
    assert chosen_letter(response, CITIES) == "B"
    assert scores(multiple_choice_reward(response, "B", choices=CITIES)) == (1, 1)
    assert scores(multiple_choice_reward(response, "C", choices=CITIES)) == (1, 0)


@pytest.mark.parametrize("response", CHOOSES_NONE)
def test_no_letter_is_guessed(response: str) -> None:
    assert chosen_letter(response, CITIES) is None
    assert scores(multiple_choice_reward(response, "B", choices=CITIES)) == (0, 0)


def test_choices_need_not_be_known() -> None:
    assert scores(multiple_choice_reward("The answer is (E).", "E")) == (1, 1)
    assert scores(multiple_choice_reward("Paris", "B")) == (0, 0)
    assert scores(multiple_choice_reward("B", "(b)")) == (1, 1)
    reward = with_choices(REWARDS["multiple_choice"], CITIES)
    assert reward("Paris", "B")["reward"] == 1
    assert with_choices(REWARDS["gsm8k"], CITIES) is REWARDS["gsm8k"]


@pytest.mark.parametrize(
    "text", ["answer is ", " ", "(A) ", "\\text{", "<answer>", "\\boxed{", "1,", "####", "\n"]
)
def test_long_responses_take_no_longer_than_they_are(text: str) -> None:
    response = text * (200_000 // len(text))
    started = time.process_time()
    for reward in REWARDS.values():
        reward(response, "7")
    assert time.process_time() - started < 20  # where a pattern is quadratic it takes minutes


def test_a_configuration_names_them() -> None:
    assert set(REWARDS) == set(NAMES)
    for name, reward in REWARDS.items():
        assert make_reward(EvaluationConfig(reward=name)) is reward


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"reward": "gsm8"}, "C103", "package.module:function"),
        ({"reward": "a b:c", "allow_custom_reward": True}, "C103", "package.module:function"),
        ({"reward": "mine:score"}, "C141", "evaluation.allow_custom_reward=true"),
        ({"reward_seconds": 5.0}, "C104", "only a function of your own"),
        ({"reward": "m:f", "allow_custom_reward": True, "reward_seconds": 0.0}, "C103", "above 0"),
    ],
)  # fmt: skip
def test_what_a_configuration_may_not_say(options: dict[str, Any], code: str, says: str) -> None:
    config = Config(evaluation=EvaluationConfig(**options))
    config.data.train_path = config.model.name_or_path = "x"
    with pytest.raises(UserError) as caught:
        check(config)
    assert f"error[{code}]" in str(caught.value) and says in str(caught.value)
    assert str(caught.value).count("error[") == 1
    config.evaluation = EvaluationConfig(
        reward="m.n:f.g", allow_custom_reward=True, reward_seconds=3
    )
    check(config)


GOOD = {"reward": 1, "format_reward": True, "answer_reward": 0.5}


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (1.0, "not a dict"), (None, "not a dict"), ({}, "gave no reward, format_reward, answer_reward"),
        ({**GOOD, "reward": math.nan}, "no finite number"), ({**GOOD, "reward": math.inf}, "no finite"),
        ({**GOOD, "reward": "1"}, "no finite number"), ({**GOOD, "reward": None}, "no number"),
        ({**GOOD, "prompt": "x"}, "gave prompt"), ({**GOOD, "more": object()}, "as JSON"),
        (ValueError("bad"), "ValueError: bad"), ({**GOOD, "reward": 10**400}, "no number"),
    ],
)  # fmt: skip
def test_a_reward_that_fails_is_written_down(found: Any, says: str) -> None:
    def reward(response: str, ground_truth: str) -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    row = grade(reward, "r", "t")
    assert says in row.pop("reward_error")
    assert row == {"reward": 0.0, "format_reward": 0.0, "answer_reward": 0.0}


def test_further_keys_are_kept() -> None:
    row = grade(lambda response, truth: {**GOOD, "steps": [1, 2]}, "r", "t")
    assert row == {"reward": 1.0, "format_reward": 1.0, "answer_reward": 0.5, "steps": [1, 2]}
    assert all(type(row[key]) is float for key in GOOD)


def test_failures_are_counted_and_never_all() -> None:
    common = {"reward": 0.0, "format_reward": 0.0, "answer_reward": 0.0, "token_entropy": 1.0,
              "length": 3, "stopped": "eos"}  # fmt: skip
    rows: list[dict[str, Any]] = [{"index": i, **common} for i in range(4)]
    assert failures_of(rows) is None and failures_of([]) is None
    assert summarize(rows)["reward_errors"] is None
    rows[2]["reward_error"] = rows[3]["reward_error"] = "it raised KeyError: x"
    assert summarize(rows)["reward_errors"] == 2
    text = failures_of(rows)
    assert text is not None and "2 of 4" in text and "prompt 3: it raised KeyError: x" in text
    with pytest.raises(UserError) as caught:
        failures_of(rows[2:])
    assert (
        caught.value.code == "R320"
        and caught.value.status == 70
        and "prompt 3" in str(caught.value)
    )


def test_ground_truths_that_cannot_be_graded_are_named() -> None:
    truths = {0: "72", 3: "\\frac{1}{2}", 4: "\\int_0^1 x dx", 7: "7" * (MAX_CHARS + 1), 8: "$ $", 9: "Monday",
              11: "\\sum x", 12: "(-\\infty, 2)", 13: "12\\text{ cm}^2"}  # fmt: skip
    lines = doubtful_truths(truths, {}, "r1_zero")
    assert lines == doubtful_truths(truths, {}, "gsm8k")
    assert len(lines) == 3
    assert lines[0].startswith("2 of 9 ground truths are formulas") and "example 5" in lines[0]
    assert lines[1].startswith("1 of 9 ground truths are longer than") and "example 8" in lines[1]
    assert lines[2].startswith("1 of 9 ground truths are empty") and "example 9" in lines[2]
    assert not doubtful_truths(truths, {}, "exact_match")
    lines = doubtful_truths({0: "B", 1: "Paris", 2: "Oslo"}, {1: CITIES}, "multiple_choice")
    assert len(lines) == 1 and "1 of 3" in lines[0] and "Oslo" in lines[0]
