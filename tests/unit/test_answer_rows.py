"""Rows with an answer that can be graded: MATH and MMLU as they lie in files, read or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cs336_alignment.data.choices import ask, columns_without_header, lettered_columns, subject_of
from cs336_alignment.data.formats import Example, to_example
from cs336_alignment.data.layout import detect
from cs336_alignment.data.row import Row
from cs336_alignment.data.sources import open_source
from cs336_alignment.data.templates import load_template
from cs336_alignment.errors import Place, UserError

PLACE = Place("rows.jsonl", 7)
MATH = {
    "problem": "What is $\\frac{1}{4} + \\frac14$?",
    "solution": "It is $\\frac{2}{4}$. So it is $\\boxed{\\frac{1}{2}}$.",
    "level": "Level 1",
    "type": "Algebra",
}
QUESTION = "Which is the capital of France?"
CITIES = ["London", "Paris", "Rome", "Berlin"]
ASKED = f"{QUESTION}\nA. London\nB. Paris\nC. Rome\nD. Berlin"


def shape(fields: dict[str, Any], template: str = "r1_zero", **options: Any) -> Example:
    wanted = options.pop("wanted", "auto")
    layout = detect(list(fields), PLACE, wanted=wanted, columns=options)
    return to_example(Row(fields, PLACE), layout, load_template(template))


def texts(example: Example) -> tuple[str, str]:
    assert example.texts is not None
    return example.texts


def test_math_in_r1_zero() -> None:
    example = shape(MATH)
    prompt, response = texts(example)
    template = load_template("r1_zero")
    assert template is not None and prompt == template.fill(MATH["problem"])
    assert response == f" {MATH['solution']} </think> <answer> \\frac{{1}}{{2}} </answer>"
    assert example.ground_truth == "\\frac{1}{2}"
    assert texts(shape(MATH, "question_only")) == (MATH["problem"], MATH["solution"])
    chat = shape(MATH, "chat")
    assert chat.messages is not None and chat.ground_truth == "\\frac{1}{2}"
    assert [m["content"] for m in chat.messages] == [MATH["problem"], MATH["solution"]]


def test_math_with_an_answer_of_its_own() -> None:
    example = shape({**MATH, "solution": "Half of it.", "answer": "0.5"})
    assert example.ground_truth == "0.5" and "<answer> 0.5 </answer>" in texts(example)[1]
    assert shape({**MATH, "answer": 12}).ground_truth == "12"


@pytest.mark.parametrize("solution", ["It is 5.", "It is \\boxed{5", "It is \\boxed{}"])
def test_math_without_a_final_answer_is_refused(solution: str) -> None:
    for template in ("r1_zero", "question_only", "chat"):
        with pytest.raises(UserError) as caught:
            shape({**MATH, "solution": solution}, template)
        assert caught.value.code == "D217"
        assert 'rows.jsonl:7, field "solution"' in str(caught.value)


@pytest.mark.parametrize("answer", [1, 1.0, "B", "b", "(B)", "Paris", " Paris ", "1"])
def test_the_right_choice_by_letter_number_or_text(answer: object) -> None:
    example = shape(
        {"question": QUESTION, "choices": CITIES, "answer": answer, "subject": "cities"}
    )
    assert example.ground_truth == "B" and example.choices == tuple(CITIES)
    template = load_template("r1_zero")
    assert template is not None
    assert texts(example) == (template.fill(ASKED), " Paris </think> <answer> B </answer>")


@pytest.mark.parametrize(
    "fields",
    [
        {"choices": CITIES}, {"options": CITIES}, {"choices": json.dumps(CITIES)},
        dict(zip("ABCD", CITIES, strict=True)), dict(zip("abcd", CITIES, strict=True)),
        {f"choice_{letter}": city for letter, city in zip("abcd", CITIES, strict=True)},
        {f"Option {letter}": city for letter, city in zip("ABCD", CITIES, strict=True)},
        {**dict(zip("ABCD", CITIES, strict=True)), "E": ""},
        {**dict(zip("ABCD", CITIES, strict=True)), "E": None},
    ],
)  # fmt: skip
def test_choices_in_a_list_or_a_column_each(fields: dict[str, Any]) -> None:
    example = shape({"question": QUESTION, **fields, "answer": "B"}, "question_only")
    assert texts(example) == (ASKED, "B")
    assert (example.ground_truth, example.choices) == ("B", tuple(CITIES))


def test_other_numbers_of_choices() -> None:
    assert shape({"question": "q", "choices": ["x", "y"], "answer": "y"}).ground_truth == "B"
    ten = [f"c{i}" for i in range(10)]
    assert shape({"question": "q", "choices": ten, "answer": "J"}).ground_truth == "J"
    assert shape({"question": "q", "A": "x", "B": "y", "C": "z", "answer": 2}).ground_truth == "C"


@pytest.mark.parametrize(
    ("choices", "answer", "code", "says"),
    [
        (CITIES, "E", "D216", "names none of the 4"), (CITIES, 4, "D216", "names none"),
        (CITIES, -1, "D216", "names none"), (CITIES, "Oslo", "D216", "names none"),
        (CITIES, None, "D216", "names none"), (CITIES, True, "D216", "names none"),
        (CITIES, float("nan"), "D216", "names none"), (CITIES, "", "D216", "names none"),
        (CITIES, "A, B", "D216", "names none"), (["x", "x"], "x", "D216", "names none"),
        # two readings are an error, not a guess
        (["1", "2", "3"], "2", "D216", "C by its number and B by its text"),
        (["B", "A"], "A", "D216", "A by its letter and B by its text"),
        ([1, 2, 3], 2, "D216", "C by its number and B by its text"),
        (["x"], "A", "D218", "no list"), ([], "A", "D218", "no list"), ("x y", "A", "D218", "no list"),
        (["x", " "], "A", "D218", "none empty"), (["x", None, "y"], "A", "D218", "no list"),
        (["x"] * 11, "A", "D218", "2 to 10"), (None, "A", "D218", "no list"), (4, "A", "D218", "no list"),
        ({"text": ["x", "y"]}, "A", "D218", "no list"),
    ],
)  # fmt: skip
def test_rows_without_a_right_choice_are_refused(
    choices: object, answer: object, code: str, says: str
) -> None:
    with pytest.raises(UserError) as caught:
        shape({"question": "q", "choices": choices, "answer": answer})
    assert caught.value.code == code and says in str(caught.value)
    assert f'rows.jsonl:7, field "{"answer" if code == "D216" else "choices"}"' in str(caught.value)


def test_a_number_beside_texts_is_a_number() -> None:
    assert shape({"question": "q", "choices": ["0", "1", "2"], "answer": 1}).ground_truth == "B"


def test_formats_are_told_apart() -> None:
    def name(*columns: str, **options: Any) -> str:
        return detect(columns, PLACE, wanted=options.pop("wanted", "auto"), columns=options).format

    assert name("problem", "solution", "level", "type") == "math"
    assert name("question", "subject", "choices", "answer") == "multiple_choice"
    assert name("question", "A", "B", "answer") == "multiple_choice"
    assert name("question", "answer", "A") == "question_answer"
    assert name("question", "answer", "choices", wanted="question_answer") == "question_answer"
    assert name("q", "a", question="q", response="a") == "question_answer"
    assert name("q", "opts", "a", question="q", choices="opts", answer="a") == "multiple_choice"
    layout = detect(["question", "A", "B", "C", "answer", "id"], PLACE, wanted="auto", columns={})
    assert layout.lettered == ("A", "B", "C") and layout.ignored == ("id",)
    assert "choices from `A` to `C`" in str(layout)
    with pytest.raises(UserError) as caught:
        name("question", "answer", wanted="multiple_choice")
    assert caught.value.code == "D202" and "choices" in str(caught.value)
    assert lettered_columns(["A", "C"]) == () and lettered_columns(["b", "a", "c"]) == (
        "a",
        "b",
        "c",
    )


MMLU = """"Find the degree for the given field extension Q(sqrt(2), sqrt(3)) over Q.",0,4,2,6,B
"Let p = (1, 2, 5, 4)(2, 3) in S_5 . Find
the index of <p> in S_5.",8,2,24,120,C
"""


def rows_of(path: Path) -> list[Row]:
    found = list(open_source(str(path), seed=0, default_split="test").rows())
    assert all(isinstance(row, Row) for row in found), found
    return [row for row in found if isinstance(row, Row)]


def test_mmlu_without_a_header_is_read_as_such(tmp_path: Path) -> None:
    path = tmp_path / "abstract_algebra_test.csv"
    path.write_text(MMLU)
    source = open_source(str(path), seed=0, default_split="test")
    assert (
        "abstract_algebra_test.csv" in source.notes[-1] and "without a header" in source.notes[-1]
    )
    first, second = rows_of(path)
    assert list(first.fields) == ["question", "A", "B", "C", "D", "answer", "subject"]
    assert first.fields["subject"] == "abstract_algebra" and first.place.line == 1
    assert (second.place.line, second.fields["D"], second.fields["answer"]) == (2, "120", "C")
    assert [shape(row.fields, "question_only").ground_truth for row in (first, second)] == [
        "B",
        "C",
    ]
    (tmp_path / "one.csv").write_text(MMLU.splitlines()[0] + "\n")
    assert rows_of(tmp_path / "one.csv")[0].fields["subject"] == "one"
    tabs = tmp_path / "tabs_val.tsv"
    tabs.write_text("What is it?\tx\ty\tz\tw\tA\n")
    assert rows_of(tabs)[0].fields["subject"] == "tabs"


def test_a_header_is_never_taken_for_a_row(tmp_path: Path) -> None:
    path = tmp_path / "x_test.csv"
    path.write_text("question,A,B,C,D,answer\nWhat is it?,x,y,z,w,B\n")
    (row,) = rows_of(path)
    assert row.fields["answer"] == "B" and row.place.line == 2 and "subject" not in row.fields
    assert not open_source(str(path), seed=0, default_split="test").notes
    path.write_text("prompt,response\nWhat is it?,B\n")
    assert rows_of(path)[0].fields == {"prompt": "What is it?", "response": "B"}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("0,What is it?,x,y,z,A", ""),  # an index column: not MMLU's row
        ("What is it?,x,y,z,w,v,A", ""),  # five choices, or a column before the question
        ("What is it?,x,y,z,w,E", ""), ("What is it?,x,y,z,w,a", ""),
        ("What is it?,x,y,z,w,A", "What is it?,x,y,z,w,E"),
        ("The question,the answer,A,B,C,D", "What is it?,x,y,z,w,A"),
        ("Question,one,two,three,four,D", "What is it?,x,y,z,w,A"),
        ("word,one,two,three,four,D", "What is it?,x,y,z,w,A"),
    ],
)  # fmt: skip
def test_what_may_be_a_header_is_one(first: str, second: str) -> None:
    assert columns_without_header(first.split(","), second.split(",") if second else ()) is None


def test_what_is_no_header_and_no_row_of_mmlu_is_refused(tmp_path: Path) -> None:
    """The first row then gives the names of the columns, and these fit no format."""
    path = tmp_path / "x.csv"
    path.write_text("What is it?,x,y,z,w,E\nWhat is that?,x,y,z,w,A\n")
    (row,) = rows_of(path)
    with pytest.raises(UserError) as caught:
        detect(list(row.fields), row.place, wanted="multiple_choice", columns={})
    assert caught.value.code == "D202" and "What is it?" in str(caught.value)


def test_small_things() -> None:
    assert ask("2 + 2 = ?\n", [3, 4]) == "2 + 2 = ?\nA. 3\nB. 4"
    assert subject_of(Path("a/high_school_physics_dev.csv.gz")) == "high_school_physics"
    assert subject_of(Path("contest.csv")) == "contest"
