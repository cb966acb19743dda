"""From the fields of a row to an example: a prompt and the response that is trained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from cs336_alignment.data.sources import Row
from cs336_alignment.errors import ExitStatus, Place, UserError, describe

FINAL_MARK = "####"
CLOSING_TAG = "</think>"
CALCULATOR = re.compile(r"<<[^<>]*>>")
PLACEHOLDER = re.compile(r"\{(question|instruction)\}")
VERBATIM_PROMPT = "prompt"
TEMPLATED_PROMPTS = ("question", "instruction")
RESPONSES = ("response", "answer", "output")


@dataclass(frozen=True)
class Example:
    """One example as text.

    Attributes:
        prompt: what the model is given.
        response: what it is trained to say, without EOS.
        ground_truth: the final answer that a reward compares with; None if the row has none.
        place: the row it came from.
    """

    prompt: str
    response: str
    ground_truth: str | None
    place: Place


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt with one placeholder, `{question}` or `{instruction}`.

    Attributes:
        name: of the template, or the path of its file.
        text: with the placeholder.
    """

    name: str
    text: str

    @property
    def tagged(self) -> bool:
        """Whether the prompt opens a `<think>` that the response must close."""
        return self.text.endswith("<think>")

    def fill(self, value: str) -> str:
        """Put a question or instruction in the placeholder's place; braces in it stay as they
        are.
        """
        start, end = PLACEHOLDER.search(self.text).span()  # type: ignore[union-attr]  # checked at load
        return self.text[:start] + value + self.text[end:]


def load_template(name: str) -> PromptTemplate:
    """Load a template of the package (`r1_zero`, `question_only`, `alpaca`) or a user's `.prompt`
    file.

    Raises:
        UserError: no such template (78), or not exactly one placeholder in it (65).
    """
    folder = resources.files("cs336_alignment.data") / "templates"
    if name.endswith(".prompt"):
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as failure:
            raise UserError(
                "D110", f"cannot read the prompt template {name}: {failure}", ExitStatus.NOT_FOUND
            ) from failure
    elif (shipped := folder / f"{name}.prompt").is_file() and "/" not in name:
        text = shipped.read_text(encoding="utf-8")
    else:
        names = sorted(
            Path(str(item)).stem for item in folder.iterdir() if str(item).endswith(".prompt")
        )
        raise UserError(
            "C105",
            f"there is no prompt template {name}",
            ExitStatus.BAD_CONFIG,
            expected=", ".join(names) + ", or the path of a .prompt file",
            hint="data.prompt_template=r1_zero",
        )
    if len(PLACEHOLDER.findall(text)) != 1:
        raise UserError(
            "D111",
            f"the prompt template {name} needs exactly one placeholder",
            ExitStatus.BAD_DATA,
            expected="{question} or {instruction}, once",
        )
    return PromptTemplate(name, text)


def to_example(row: Row, template: PromptTemplate) -> Example:
    """Turn a row into an example.

    A `prompt` is used verbatim; a `question` or `instruction` fills the template. The response is
    the field `response`, `answer` or `output`. An `answer` in GSM8K's form (reasoning, then `####
    final`) loses its calculator annotations; under a template that opens `<think>` it becomes
    ` {reasoning} </think> <answer> {final} </answer>`.

    Raises:
        UserError: a field is missing, ambiguous, empty or no string (65).
    """
    prompt_field = _only(row, (VERBATIM_PROMPT, *TEMPLATED_PROMPTS), "D202")
    response_field = _only(row, RESPONSES, "D202")
    prompt = _text(row, prompt_field)
    response = _text(row, response_field)
    if prompt_field == "instruction" and row.fields.get("input"):
        raise UserError(
            "D206",
            "the row has an `input` beside its instruction, and the template has no place for it",
            ExitStatus.BAD_DATA,
            place=_at(row, "input"),
            got=describe(row.fields["input"]),
            hint="join the input to the instruction, or give the whole text as `prompt`",
        )
    ground_truth = _ground_truth(row)
    if prompt_field in TEMPLATED_PROMPTS:
        prompt = template.fill(prompt)
        if response_field == "answer":
            response, final = _shape_answer(row, response, tagged=template.tagged)
            ground_truth = final if ground_truth is None else ground_truth
        elif template.tagged and CLOSING_TAG not in response:
            raise UserError(
                "D207",
                f"the prompt template {template.name} opens <think>, and the response does not "
                "close it",
                ExitStatus.BAD_DATA,
                place=_at(row, response_field),
                expected=f"reasoning, then {CLOSING_TAG}, then the answer",
                got=describe(response),
                hint="use data.prompt_template=alpaca or question_only for plain responses",
            )
    return Example(prompt, response, ground_truth, row.place)


def _shape_answer(row: Row, answer: str, *, tagged: bool) -> tuple[str, str | None]:
    reasoning, mark, final = answer.rpartition(FINAL_MARK)
    reasoning, final = CALCULATOR.sub("", reasoning).strip(), final.strip()
    if not mark and not tagged:
        return answer, None
    if not mark or not final or not reasoning:
        raise UserError(
            "D204",
            "the answer has no reasoning and final answer to put into <think> and <answer>",
            ExitStatus.BAD_DATA,
            place=_at(row, "answer"),
            expected=f"reasoning, then a line `{FINAL_MARK} final`",
            got=describe(answer),
            hint="use data.prompt_template=question_only, or rows with `prompt` and `response`",
        )
    if tagged:
        return f" {reasoning} </think> <answer> {final} </answer>", final
    return f"{reasoning}\n{FINAL_MARK} {final}", final


def _only(row: Row, names: tuple[str, ...], code: str) -> str:
    present = [name for name in names if name in row.fields]
    if len(present) == 1:
        return present[0]
    columns = ", ".join(row.fields) or "none"
    problem = "fields that exclude each other" if present else "a field is missing"
    raise UserError(
        code,
        problem,
        ExitStatus.BAD_DATA,
        place=row.place,
        expected="one of " + ", ".join(names),
        got=f"columns {columns}",
        hint="rows are prompt/response, question/answer or instruction/output",
    )


def _text(row: Row, name: str) -> str:
    value = row.fields[name]
    if not isinstance(value, str):
        raise UserError(
            "D205",
            f"{name} is not a string",
            ExitStatus.BAD_DATA,
            place=_at(row, name),
            expected="non-empty string",
            got=describe(value),
        )
    if not value.strip():
        raise UserError(
            "D203",
            f"{name} is empty",
            ExitStatus.BAD_DATA,
            place=_at(row, name),
            expected="non-empty string",
            got=describe(value),
            hint="fix or remove the row",
        )
    if any(0xD800 <= ord(c) <= 0xDFFF for c in value):
        raise UserError(
            "D207",
            f"{name} holds half of a surrogate pair, which is no character",
            ExitStatus.BAD_DATA,
            place=_at(row, name),
            expected="Unicode text",
        )
    return value


def _ground_truth(row: Row) -> str | None:
    """Give the row's own final answer, if it has one; here a number may stand as a number."""
    value = row.fields.get("ground_truth")
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else _text(row, "ground_truth")


def _at(row: Row, name: str) -> Place:
    return Place(row.place.path, row.place.line, name)
