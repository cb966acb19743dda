"""Templates to the byte, rows shaped exactly, and every field that cannot be trained named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cs336_alignment.data.formats import Example, to_example
from cs336_alignment.data.layout import detect
from cs336_alignment.data.row import Row
from cs336_alignment.data.templates import PromptTemplate, load_template
from cs336_alignment.errors import ExitStatus, Place, UserError

R1_ZERO = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. "
    "The Assistant first thinks about the reasoning process in the mind and then provides the User with "
    "the answer. The reasoning process is enclosed within <think> </think> and answer is enclosed within "
    "<answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> <answer> answer "
    "here </answer>.\nUser: {question}\nAssistant: <think>"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
PLACE = Place("rows.jsonl", 7)
GSM8K = {
    "question": "Natalia sold clips to 48 of her friends in April, and half as many in May. How many?",
    "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72",
}  # fmt: skip
REASONING = (
    "Natalia sold 48/2 = 24 clips in May.\n"
    "Natalia sold 48+24 = 72 clips altogether in April and May."
)


def row(**fields: Any) -> Row:
    return Row(fields, PLACE)


class Shaped(NamedTuple):
    prompt: str
    response: str
    ground_truth: str | None


def shape(given: Row, template: PromptTemplate | None) -> Shaped:
    layout = detect(list(given.fields), given.place, wanted="auto", columns={})
    example = to_example(given, layout, template)
    assert example.texts is not None
    return Shaped(*example.texts, example.ground_truth)


@pytest.fixture(scope="module")
def r1_zero() -> PromptTemplate:
    return load_template("r1_zero")


@pytest.mark.parametrize(
    ("name", "text"), [("r1_zero", R1_ZERO), ("question_only", "{question}"), ("alpaca", ALPACA)]
)
def test_templates_to_the_byte(name: str, text: str) -> None:
    template = load_template(name)
    assert template.text.encode() == text.encode()
    assert template.tagged is (name == "r1_zero")


@pytest.mark.parametrize(
    "value", ["{question}", "{0} {} {{x}} {instruction}", r"\1 \g<0> $x %s", "ü\n"]
)
def test_what_fills_a_template_stays_as_it_is(value: str, r1_zero: PromptTemplate) -> None:
    head, tail = R1_ZERO.split("{question}")
    assert r1_zero.fill(value) == head + value + tail
    assert load_template("question_only").fill(value) == value


def test_gsm8k_in_r1_zero(r1_zero: PromptTemplate) -> None:
    example = shape(row(**GSM8K), r1_zero)
    assert example.prompt == R1_ZERO.replace("{question}", GSM8K["question"])
    assert example.response == f" {REASONING} </think> <answer> 72 </answer>"
    assert example.ground_truth == "72"


def test_gsm8k_without_tags() -> None:
    example = shape(row(**GSM8K), load_template("question_only"))
    assert example.prompt == GSM8K["question"]
    assert example.response == f"{REASONING}\n#### 72"
    assert example.ground_truth == "72"


@pytest.mark.parametrize(
    ("answer", "reasoning", "final"),
    [
        ("a\n#### 1,200", "a", "1,200"),
        ("a\n####-5", "a", "-5"),
        ("  a  \n\n####  5 \n", "a", "5"),
        ("a #### b\n#### 5", "a #### b", "5"),  # the last mark parts
        ("2 < 3 and <<1+1=2>>2 > 1\n#### 5", "2 < 3 and 2 > 1", "5"),
        ("<<<1=1>>>\n#### 5", "<>", "5"),
    ],
)
def test_how_an_answer_is_parted(
    answer: str, reasoning: str, final: str, r1_zero: PromptTemplate
) -> None:
    example = shape(row(question="q", answer=answer), r1_zero)
    assert example.response == f" {reasoning} </think> <answer> {final} </answer>"
    assert example.ground_truth == final


@pytest.mark.parametrize(
    "answer", ["no mark", "#### 5", "a\n####", "a\n####  ", "<<1+1=2>>\n#### 5"]
)
def test_an_answer_that_cannot_be_parted_is_named(answer: str, r1_zero: PromptTemplate) -> None:
    with pytest.raises(UserError) as caught:
        shape(row(question="q", answer=answer), r1_zero)
    assert (caught.value.code, caught.value.status) == ("D204", 65)
    assert str(caught.value.place) == 'rows.jsonl:7, field "answer"'


def test_an_answer_without_a_mark_stands_under_a_plain_template() -> None:
    example = shape(row(question="q", answer=" yes, <<1>> "), load_template("question_only"))
    assert (example.response, example.ground_truth) == (" yes, <<1>> ", None)


@pytest.mark.parametrize("field", ["response", "answer", "output"])
def test_a_prompt_is_verbatim(field: str, r1_zero: PromptTemplate) -> None:
    prompt, response = " {question} <think>\n", "a <<1+1=2>>2\n#### 2 "
    example = shape(row(prompt=prompt, **{field: response}, other=None), r1_zero)
    assert (example.prompt, example.response, example.ground_truth) == (prompt, response, None)


def test_instruction_and_output_fill_alpaca() -> None:
    example = shape(
        row(instruction="Sum {a}.", input="", output="b #### 1"), load_template("alpaca")
    )
    assert example.prompt == ALPACA.replace("{instruction}", "Sum {a}.")
    assert example.response == "b #### 1"


def test_a_response_to_a_question_is_verbatim(r1_zero: PromptTemplate) -> None:
    example = shape(row(question="q", response=" t </think> <answer> 1 </answer>"), r1_zero)
    assert example.response == " t </think> <answer> 1 </answer>"
    assert example.prompt.endswith("User: q\nAssistant: <think>")


def test_a_response_that_leaves_the_thought_open_is_named(r1_zero: PromptTemplate) -> None:
    with pytest.raises(UserError, match="opens <think>") as caught:
        shape(row(instruction="Sum.", output="3"), r1_zero)
    assert str(caught.value.place) == 'rows.jsonl:7, field "output"'


@pytest.mark.parametrize(
    ("given", "ground_truth"), [("73", "73"), (73, "73"), (0.5, "0.5"), (0, "0"), (None, "72")]
)
def test_a_rows_own_ground_truth_comes_first(
    given: Any, ground_truth: str, r1_zero: PromptTemplate
) -> None:
    assert shape(row(**GSM8K, ground_truth=given), r1_zero).ground_truth == ground_truth


BAD_VALUES: list[tuple[Any, str, str]] = [
    ("", "D203", '"" (str, length 0)'),
    ("  ", "D203", '"  " (str, length 2)'),
    ("\n\t\u00a0", "D203", "length 3"),
    (None, "D205", "null"),
    (3, "D205", "3 (int)"),
    (0.5, "D205", "0.5 (float)"),
    (True, "D205", "true (bool)"),
    (["a"], "D205", '["a"] (list)'),
    ({"text": "a"}, "D205", "(dict)"),
]


@pytest.mark.parametrize(("value", "code", "got"), BAD_VALUES)
@pytest.mark.parametrize("field", ["prompt", "response", "question", "answer"])
@pytest.mark.fault("T11 empty, blank, null or other fields, wrong columns")
def test_a_field_that_cannot_be_trained_is_named(
    field: str, value: Any, code: str, got: str, r1_zero: PromptTemplate
) -> None:
    good = {"prompt": "p", "response": "r"} if field in ("prompt", "response") else dict(GSM8K)
    with pytest.raises(UserError) as caught:
        shape(row(**{**good, field: value}), r1_zero)
    error = caught.value
    assert (error.code, error.status) == (code, ExitStatus.BAD_DATA)
    assert str(error.place) == f'rows.jsonl:7, field "{field}"'
    assert got in (error.got or "") and error.expected
    str(error).encode()  # can be printed


@pytest.mark.parametrize("value", [["72"], {"a": 1}, True, ""])
def test_a_ground_truth_that_is_none_is_named(value: Any, r1_zero: PromptTemplate) -> None:
    with pytest.raises(UserError) as caught:
        shape(row(**GSM8K, ground_truth=value), r1_zero)
    assert caught.value.status == 65
    assert str(caught.value.place) == 'rows.jsonl:7, field "ground_truth"'


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({}, "D202", "columns none"),
        ({"body": "a"}, "D202", "columns body"),
        ({"prompt": "a", "Response": "b"}, "D202", "columns prompt, Response"),
        ({"response": "b"}, "D202", "columns response"),
        (
            {"prompt": "a", "question": "b", "answer": "c"},
            "D209",
            "prompt_response, question_answer",
        ),
        ({"prompt": "a", "response": "b", "output": "c"}, "D210", "response, output"),
        ({"messages": [], "prompt": "a", "response": "c"}, "D209", "messages, prompt_response"),
    ],
)
@pytest.mark.fault("T11 empty, blank, null or other fields, wrong columns")
def test_wrong_columns_are_named(
    fields: dict[str, Any], code: str, text: str, r1_zero: PromptTemplate
) -> None:
    with pytest.raises(UserError) as caught:
        shape(row(**fields), r1_zero)
    assert (caught.value.code, caught.value.status) == (code, 65)
    assert caught.value.place == PLACE and text in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "wanted", "columns", "layout"),
    [
        ({"prompt": 1, "response": 2}, "auto", {}, ("prompt_response", {"prompt", "response"})),
        ({"prompt": 1, "completion": 2}, "auto", {}, ("prompt_response", {"prompt", "completion"})),
        ({"messages": 1, "prompt": 2}, "auto", {}, ("messages", {"messages"})),
        ({"conversations": 1, "system": 2}, "auto", {}, ("sharegpt", {"conversations", "system"})),
        ({"instruction": 1, "input": 2, "output": 3, "text": 4}, "auto", {},
         ("alpaca", {"instruction", "input", "output"})),
        ({"instruction": 1, "output": 3, "text": 4}, "text", {}, ("text", {"text"})),
        ({"text": 1, "meta": 2}, "auto", {}, ("text", {"text"})),
        ({"input_ids": 1, "labels": 2}, "auto", {}, ("tokens", {"input_ids", "labels"})),
        ({"q": 1, "a": 2}, "auto", {"question": "q", "response": "a"}, ("question_answer", {"q", "a"})),
        ({"prompt": 1, "response": 2, "output": 3}, "auto", {"response": "output"},
         ("prompt_response", {"prompt", "output"})),
        ({"prompt": 1, "question": 2, "answer": 3}, "question_answer", {},
         ("question_answer", {"question", "answer"})),
        ({"prompt": 1, "response": 2, "weight": 3}, "auto", {},
         ("prompt_response", {"prompt", "response", "weight"})),
    ],
)  # fmt: skip
def test_the_format_is_seen_from_the_columns(
    fields: dict[str, Any], wanted: str, columns: dict[str, str], layout: tuple[str, set[str]]
) -> None:
    found = detect(list(fields), PLACE, wanted=wanted, columns=columns)
    seen = {column for role, column in found.columns.items() if role not in found.late}
    assert (found.format, seen) == layout
    assert set(found.ignored) == set(fields) - layout[1]


def test_a_mapped_column_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="no such column") as caught:
        detect(["q", "a"], PLACE, wanted="auto", columns={"question": "Q"})
    assert caught.value.status == 78


ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "Sum.\n\n### Input:\n1 {instruction}\n\n### Response:\n"
)


def test_alpaca_with_an_input() -> None:
    shaped = shape(
        row(instruction="Sum.", input="1 {instruction}", output="c"), load_template("alpaca")
    )
    assert shaped.prompt == ALPACA_INPUT
    empty = shape(row(instruction="Sum.", input="  ", output="c"), load_template("alpaca"))
    assert empty.prompt == ALPACA.replace("{instruction}", "Sum.")


def example_of(**fields: Any) -> Example:
    given = row(**fields)
    layout = detect(list(fields), PLACE, wanted="auto", columns={})
    return to_example(given, layout, None)


def test_sharegpt_becomes_messages() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0.5}]
    example = example_of(conversations=turns, system="s")
    assert example.messages == (
        {"role": "system", "content": "s"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0.5},
    )  # fmt: skip
    plain = example_of(conversations=[{"role": "user", "content": "a"}])
    assert plain.messages == ({"role": "user", "content": "a"},)


def test_sharegpt_calls_become_tool_calls() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    for value in (json.dumps(call), json.dumps([call])):
        example = example_of(
            conversations=[{"from": "function_call", "value": value, "train": False}]
        )
        assert example.messages == (
            {"role": "assistant", "content": None, "train": False,
             "tool_calls": [{"type": "function", "function": call}]},
        )  # fmt: skip


def test_keys_of_sharegpt_turns_stay_for_the_linter() -> None:
    example = example_of(conversations=[{"from": "gpt", "value": "b", "loss": False}])
    assert example.messages == ({"role": "assistant", "content": "b", "loss": False},)


def test_lists_may_stand_as_json_in_a_cell_of_text() -> None:
    turns = [{"role": "user", "content": "[1]"}, {"role": "assistant", "content": "b"}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    example = example_of(messages=json.dumps(turns), tools=json.dumps(tools))
    assert example.messages == tuple(turns) and example.tools == tools
    assert example_of(messages=json.dumps(turns), tools="").tools is None
    ids = example_of(input_ids="[4, 5]", labels="[-100, 5]")
    assert ids.tokens == ([4, 5], [0.0, 1.0])
    assert example_of(prompt="[1]", response="[2]").texts == ("[1]", "[2]")
    cells = example_of(prompt=json.dumps(turns[:1]), response=json.dumps(turns[1:]))
    assert cells.messages == tuple(turns)
    asked = [*turns, turns[0]]  # what the assistant said in the prompt is context
    context = example_of(prompt=json.dumps(asked), response=json.dumps(turns[1:])).messages
    assert context is not None and [m.get("train", True) for m in context] == [
        True,
        False,
        True,
        True,
    ]


def test_only_calculations_are_taken_out_of_an_answer() -> None:
    kept = "kernel<<<1, 2>>>(x); a <<b>> c <<int x=1>>"
    shaped = shape(
        row(question="q", answer=f"{kept} 2+2=<<2+2=4>>4\n#### 4"), load_template("question_only")
    )
    assert shaped.response == f"{kept} 2+2=4\n#### 4"


def test_the_context_of_an_instruction_is_its_input() -> None:
    given = row(instruction="Sum.", context="1 {instruction}", response="c")
    assert shape(given, load_template("alpaca")).prompt == ALPACA_INPUT


@pytest.mark.parametrize(("cell", "weight"), [("", 1.0), ("0.5", 0.5), ("0", 0.0), (2, 2.0)])
def test_a_weight_may_stand_as_text(cell: Any, weight: float) -> None:
    assert example_of(prompt="a", response="b", weight=cell).weight == weight


def test_tools_beside_a_prompt_of_messages_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    ask, answer = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    assert example_of(prompt=ask, completion=answer, tools=tools).tools == tools


def test_an_empty_name_takes_the_role_from_a_column() -> None:
    fields = {"prompt": "a", "response": "b", "weight": 0.5, "tools": [{"name": "f"}]}
    layout = detect(list(fields), PLACE, wanted="auto", columns={"weight": "", "tools": ""})
    assert set(layout.ignored) == {"weight", "tools"} and not {"weight", "tools"} & {
        *layout.columns
    }
    assert to_example(row(**fields), layout, None).weight == 1.0


def test_without_a_template_a_question_is_a_users_turn() -> None:
    example = example_of(question="q", answer="why <<1=1>>\n#### 3")
    assert [m["content"] for m in example.messages or ()] == [
        "q",
        "why \n#### 3".replace(" \n", "\n"),
    ]
    assert example.ground_truth == "3"
    both = example_of(instruction="do", input="this", output="done")
    assert [m["content"] for m in both.messages or ()] == ["do\n\nthis", "done"]


def test_a_prompt_of_messages_is_context() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    example = example_of(prompt=[*turns, turns[0]], completion=[turns[1]])
    assert [m.get("train", True) for m in example.messages or ()] == [True, False, True, True]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"messages": "hello"}, "D211"),
        ({"messages": []}, "D211"),
        ({"messages": [1]}, "D211"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "D211"),
        ({"conversations": [{"from": "human", "value": 3}]}, "D211"),
        ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "D211"),
        ({"conversations": [{"from": "function_call", "value": '[{"arguments": {}}]'}]}, "D211"),
        ({"messages": '[{"role": "user"'}, "D211"),
        ({"prompt": "a", "response": "b", "tools": [{"name": "f"}]}, "D213"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": "calculator"}, "D213"),
        ({"input_ids": [1, 2], "labels": [1]}, "D212"),
        ({"input_ids": [1, 2], "labels": [-100, 3]}, "D212"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "D212"),
        ({"input_ids": [1, -2], "response_mask": [0, 1]}, "D212"),
        ({"input_ids": [], "response_mask": []}, "D212"),
        ({"input_ids": [1, True], "response_mask": [0, 1]}, "D212"),
        ({"input_ids": [1, 2], "response_mask": [0, 2]}, "D212"),
        ({"prompt": "a", "response": "b", "weight": -1}, "D214"),
        ({"prompt": "a", "response": "b", "weight": True}, "D214"),
        ({"prompt": "a", "response": "b", "weight": float("inf")}, "D214"),
        ({"instruction": "a", "input": 3, "output": "b"}, "D205"),
    ],
)
def test_what_no_format_takes_is_named(fields: dict[str, Any], code: str) -> None:
    with pytest.raises(UserError) as caught:
        example_of(**fields)
    assert (caught.value.code, caught.value.status) == (code, 65)


def test_tokens_come_as_they_are() -> None:
    assert example_of(input_ids=[4, 5, 6], labels=[-100, 5, 6]).tokens == (
        [4, 5, 6],
        [0.0, 1.0, 1.0],
    )
    masked = example_of(input_ids=[4, 5, 6], response_mask=[0, 1, 0], weight=2)
    assert masked.tokens == ([4, 5, 6], [0.0, 1.0, 0.0]) and masked.weight == 2.0


def test_a_value_is_shortened_in_a_message(r1_zero: PromptTemplate) -> None:
    with pytest.raises(UserError) as caught:
        shape(row(question="q", answer="secret " * 100), r1_zero)
    assert str(caught.value).count("secret") < 15 and "length 700" in str(caught.value)


def test_an_input_without_a_place_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        shape(row(instruction="a", input="b", output="c"), load_template("question_only"))
    assert caught.value.code == "D206" and caught.value.status == 65
    assert str(caught.value.place) == 'rows.jsonl:7, field "input"'


def test_a_users_template(tmp_path: Path) -> None:
    path = tmp_path / "mine.prompt"
    path.write_text("{x} ü\nQ: {question}\nA: <think>", encoding="utf-8")
    template = load_template(str(path))
    assert template.name == str(path) and template.tagged
    example = shape(row(**GSM8K), template)
    assert example.prompt == f"{{x}} ü\nQ: {GSM8K['question']}\nA: <think>"
    assert example.response.endswith(" </think> <answer> 72 </answer>")


@pytest.mark.parametrize(
    "text", ["", "Q:", "{question} {question}", "{question} {instruction}", "{Question}"]
)
def test_a_template_needs_one_placeholder(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.prompt"
    path.write_text(text)
    with pytest.raises(UserError, match="exactly one placeholder") as caught:
        load_template(str(path))
    assert (caught.value.code, caught.value.status) == ("D111", 65)


@pytest.mark.parametrize("name", ["r1_zro", "", "../templates/r1_zero", "R1_ZERO", "/etc/passwd"])
def test_an_unknown_template_is_78(name: str) -> None:
    with pytest.raises(UserError, match="no prompt template") as caught:
        load_template(name)
    assert caught.value.status == 78
    assert "alpaca, question_only, r1_zero" in (caught.value.expected or "")


def test_a_template_file_that_cannot_be_read_is_66(tmp_path: Path) -> None:
    (tmp_path / "bytes.prompt").write_bytes(b"\xff{question}")
    (tmp_path / "folder.prompt").mkdir()
    for name in ("nowhere.prompt", "bytes.prompt", "folder.prompt"):
        with pytest.raises(UserError, match="cannot read") as caught:
            load_template(str(tmp_path / name))
        assert (caught.value.code, caught.value.status) == ("D110", 66)


MARKDOWN = [
    "x\n\n#### Summary\n\nSo it is <<a>> done.",
    "#### Title\nand a text",
    "a #### b",
    "x\n##### 5",
]


@pytest.mark.parametrize("answer", MARKDOWN)
def test_a_heading_is_no_final_answer(answer: str, r1_zero: PromptTemplate) -> None:
    example = shape(row(question="q", answer=answer), load_template("question_only"))
    assert (example.response, example.ground_truth) == (answer, None)
    with pytest.raises(UserError, match="no reasoning and final answer"):
        shape(row(question="q", answer=answer), r1_zero)
