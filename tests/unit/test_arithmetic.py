"""The arithmetic task: right answers, right reasoning, a sealed split, a lossless tokenizer."""

import filecmp
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from cs336_alignment.data.arithmetic import (
    MAX_OPERAND,
    generate_rows,
    is_held_out,
    solve,
)

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "cs336_alignment" / "assets" / "arithmetic"
TEMPLATE = ROOT / "cs336_alignment" / "data" / "templates" / "r1_zero.prompt"
BUILD_SCRIPT = ROOT / "scripts" / "build_arithmetic_tokenizer.py"

OPERANDS = st.integers(0, MAX_OPERAND)
EDGE_CASES = [
    (0, "+", 0),
    (999, "+", 999),
    (999, "+", 1),
    (5, "+", 95),
    (0, "-", 0),
    (1000 - 1, "-", 999),
    (100, "-", 1),
    (1, "-", 0),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ASSETS)


def read_question(question: str) -> tuple[int, str, int]:
    """Reads operands and operation from any wording, without the generator's help."""
    first, second = (int(number) for number in re.findall(r"\d+", question))
    if question.startswith("Subtract"):
        return second, "-", first
    subtracts = any(mark in question for mark in (" - ", " minus ", " gives away "))
    return first, "-" if subtracts else "+", second


def check_answer(a: int, operation: str, b: int, answer: str) -> None:
    """Recomputes every number of a worked answer from the operands."""
    expected = a + b if operation == "+" else a - b
    reasoning, final = answer.split("\n#### ")
    assert final == str(expected)

    header, columns = re.fullmatch(r"Align (.+?): (.+)\.", reasoning).groups()
    top, written_operation, bottom = header.split(" ")
    assert (int(top), written_operation, int(bottom)) == (a, operation, b)
    assert len(top) == len(bottom) == max(len(str(a)), len(str(b)))

    sign, passed_word = (1, "carry") if operation == "+" else (-1, "borrow")
    total, passed = 0, 0
    for position, column in enumerate(columns.split("; ")):
        scale = 10**position
        x, y = a // scale % 10, b // scale % 10
        place, equation = column.split(" ", 1)
        assert place == ("ones", "tens", "hundreds")[position]
        equation, *rest = equation.split(", ")
        left, right = equation.split(" = ")
        terms = [int(term) for term in left.split(f" {operation} ")]
        assert terms[0] + sign * sum(terms[1:]) == int(right) >= 0
        assert terms[1:] == ([y] if position == 0 else [y, passed])
        is_last = position == len(top) - 1
        if operation == "+":
            assert terms[0] == x
            passed = int(right) // 10
            total += scale * (int(right) if is_last else int(right) % 10)
        else:
            assert int(right) <= 9
            passed = int(terms[0] != x)
            assert terms[0] == x + 10 * passed
            total += scale * int(right)
        assert rest == ([] if is_last else [f"{passed_word} {passed}"])
    assert position == len(top) - 1
    assert total == expected


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_and_reasoning_are_right(split: str) -> None:
    for row in generate_rows(split, 3_000, seed=1):
        check_answer(*read_question(row["question"]), row["answer"])


@pytest.mark.parametrize(("a", "operation", "b"), EDGE_CASES)
def test_edge_cases_are_right(a: int, operation: str, b: int) -> None:
    reasoning, result = solve(a, operation, b)
    check_answer(a, operation, b, f"{reasoning}\n#### {result}")


@given(OPERANDS, OPERANDS)
def test_any_problem_is_right(a: int, b: int) -> None:
    for first, operation, second in [(a, "+", b), (max(a, b), "-", min(a, b))]:
        reasoning, result = solve(first, operation, second)
        check_answer(first, operation, second, f"{reasoning}\n#### {result}")


def test_reasoning_reads_as_documented() -> None:
    assert solve(347, "+", 85) == (
        "Align 347 + 085: ones 7 + 5 = 12, carry 1; tens 4 + 8 + 1 = 13, carry 1; "
        "hundreds 3 + 0 + 1 = 4.",
        432,
    )
    assert solve(402, "-", 85) == (
        "Align 402 - 085: ones 12 - 5 = 7, borrow 1; tens 10 - 8 - 1 = 1, borrow 1; "
        "hundreds 4 - 0 - 1 = 3.",
        317,
    )


@given(OPERANDS, OPERANDS)
def test_held_out_ignores_operand_order(a: int, b: int) -> None:
    assert is_held_out(a, b) == is_held_out(b, a)


def test_a_tenth_of_the_pairs_is_held_out() -> None:
    pairs = [(a, b) for a in range(0, MAX_OPERAND + 1, 7) for b in range(0, a + 1, 3)]
    share = sum(is_held_out(a, b) for a, b in pairs) / len(pairs)
    assert share == pytest.approx(0.1, abs=0.01)


def test_splits_share_no_operand_pair() -> None:
    pairs: dict[str, set[frozenset[int]]] = {}
    for split in ("train", "test"):
        questions = [read_question(row["question"]) for row in generate_rows(split, 5_000, seed=0)]
        assert all(is_held_out(a, b) == (split == "test") for a, _, b in questions)
        pairs[split] = {frozenset((a, b)) for a, _, b in questions}
    assert pairs["train"].isdisjoint(pairs["test"])


def test_rows_are_distinct_and_start_with_the_rows_of_a_smaller_count() -> None:
    rows = generate_rows("train", 20_000, seed=0)
    assert len({row["question"] for row in rows}) == len(rows) == 20_000
    assert rows[:100] == generate_rows("train", 100, seed=0)
    assert rows[:100] != generate_rows("train", 100, seed=1)


def test_every_wording_and_length_occurs() -> None:
    questions = [row["question"] for row in generate_rows("test", 400, seed=0)]
    wordings = {re.sub(r"\d+", "#", question) for question in questions}
    plain = {wording for wording in wordings if " has # " not in wording}
    assert plain == {
        "# + # = ?",
        "What is # plus #?",
        "Find the sum of # and #.",
        "# - # = ?",
        "What is # minus #?",
        "Subtract # from #.",
    }
    assert any("gets # more" in wording for wording in wordings)
    assert any("gives away #" in wording for wording in wordings)
    lengths = {len(number) for question in questions for number in re.findall(r"\d+", question)}
    assert lengths == {1, 2, 3}


def test_one_of_a_thing_is_singular() -> None:
    questions = [row["question"] for row in generate_rows("train", 5_000, seed=0)]
    counted = [match for q in questions if (match := re.search(r" has (\d+) (\w+)", q))]
    assert {match[1] for match in counted} > {"0", "1", "2"}
    assert all(match[2].endswith("s") == (match[1] != "1") for match in counted)


def test_rows_do_not_depend_on_the_process() -> None:
    code = (
        "import json\n"
        "from cs336_alignment.data.arithmetic import generate_rows\n"
        "print(json.dumps([generate_rows(s, 50, seed=3) for s in ('train', 'test')]))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hash_seed in ("0", "1")
    ]
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[0]) == [generate_rows(s, 50, seed=3) for s in ("train", "test")]


def test_first_rows_are_pinned() -> None:
    # Guards against a drift of the random stream between Python versions.
    assert generate_rows("train", 1, seed=0)[0]["question"] == "Find the sum of 880 and 759."
    assert generate_rows("test", 1, seed=0)[0]["question"] == "Find the sum of 633 and 724."


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_tokenizer_is_lossless_on_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    template = TEMPLATE.read_text(encoding="utf-8")
    for row in generate_rows("train", 300, seed=2):
        reasoning, final = row["answer"].split("\n#### ")
        prompt = template.replace("{question}", row["question"])
        response = f" {reasoning} </think> <answer> {final} </answer>"
        for text in (prompt, response, row["answer"], prompt + response):
            assert tokenizer.decode(encode(tokenizer, text)) == text
        # Tags are ordinary tokens: graders that skip special tokens must still see them.
        kept = tokenizer.decode(encode(tokenizer, prompt + response), skip_special_tokens=True)
        assert kept == prompt + response
        assert len(encode(tokenizer, prompt)) <= 26
        assert len(encode(tokenizer, response)) <= 45


TASK_LIKE_TEXT = st.text(
    st.sampled_from(" \n\t.,;:+-=?#<>/0123456789abzAZé²٣字🙂"), max_size=60
) | st.lists(
    st.sampled_from(
        [" </think>", " <answer> ", "</answer>", " </think> <answer> ", "User: ", " ones ", "12"]
    )
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=200) | TASK_LIKE_TEXT)
def test_tokenizer_is_lossless_on_any_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_template_around_the_question_is_two_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    template = TEMPLATE.read_text(encoding="utf-8")
    for row in generate_rows("test", 50, seed=0):
        prompt = encode(tokenizer, template.replace("{question}", row["question"]))
        assert prompt[1:-1] == encode(tokenizer, row["question"])
    assert len(encode(tokenizer, template.replace("{question}", ""))) == 2


def test_every_digit_is_its_own_token(tokenizer: PreTrainedTokenizerBase) -> None:
    digits = encode(tokenizer, "0123456789")
    assert len(set(digits)) == 10
    for row in generate_rows("test", 100, seed=0):
        text = f"{row['question']} {row['answer']}"
        tokens = [tokenizer.decode([index]) for index in encode(tokenizer, text)]
        assert all(len(token) == 1 for token in tokens if any(c.isdigit() for c in token))


def test_task_words_are_whole_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    # Every word of fresh rows is in the vocabulary: none falls back to letters.
    for split in ("train", "test"):
        for row in generate_rows(split, 1_000, seed=5):
            reasoning, _ = row["answer"].split("\n#### ")
            for text in (row["question"], f" {reasoning}"):
                tokens = [tokenizer.decode([index]) for index in encode(tokenizer, text)]
                assert not any(len(token) == 1 and token.isalpha() for token in tokens)


def test_special_tokens_and_config_agree(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert tokenizer.bos_token is None
    assert tokenizer("1 + 1 = ?")["input_ids"] == encode(tokenizer, "1 + 1 = ?")
    config = AutoConfig.from_pretrained(ASSETS)
    assert config.model_type == "llama"
    assert config.vocab_size == len(tokenizer)
    assert config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_shipped_files_are_what_the_script_builds(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, str(BUILD_SCRIPT), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    names = ["config.json", "tokenizer.json", "tokenizer_config.json"]
    _, mismatched, missing = filecmp.cmpfiles(ASSETS, tmp_path, names, shallow=False)
    assert (mismatched, missing) == ([], [])
    assert sum((ASSETS / name).stat().st_size for name in names) < 100_000
