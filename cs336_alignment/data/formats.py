"""From the fields of a row to an example: texts, a conversation, or tokens, and what it weighs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from cs336_alignment.data.choices import LETTERS, ask, read_choices, read_letter
from cs336_alignment.data.final_answers import FINAL_LINE, FINAL_MARK, last_boxed
from cs336_alignment.data.layout import ANYWHERE, OPTIONAL, Layout
from cs336_alignment.data.messages import WEIGHT, is_weight
from cs336_alignment.data.row import Row, is_number, parsed, wrong
from cs336_alignment.data.templates import PromptTemplate
from cs336_alignment.errors import Place

MOST_IDS = 2**31  # ids are kept in 32 bits
CLOSING_TAG = "</think>"
CALCULATOR = re.compile(r"<<[^<>a-zA-Z]*=[^<>]*>>")  # GSM8K's <<48/2=24>>
OPTIONAL_ROLES = {*ANYWHERE, *(role for roles in OPTIONAL.values() for role in roles)}
IGNORED_LABEL = -100  # transformers' mark for a token that is only read
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "bot": "assistant", "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "assistant",  # its value is JSON: a call or a list of calls
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One example before it becomes tokens; exactly one of the three contents is there.

    Attributes:
        place: the row it came from.
        texts: prompt, and the response that is trained, without EOS.
        messages: of a conversation, as the chat template takes them.
        tokens: ids, and a weight for each, 0 where it is only read.
        tools: of a conversation.
        ground_truth: the final answer that a reward compares with, if there is one.
        choices: that the question gives, in the order of their letters.
        weight: of the whole example.
    """

    place: Place
    texts: tuple[str, str] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    tokens: tuple[Sequence[int], Sequence[float]] | None = None
    tools: Sequence[Any] | None = None
    ground_truth: str | None = None
    choices: tuple[str, ...] = ()
    weight: float = 1.0


def to_example(
    row: Row, layout: Layout, template: PromptTemplate | None, train_on: str = "response"
) -> Example:
    """Turn a row into an example.

    A `prompt` is used verbatim; a question or instruction fills the template, or becomes the user's
    turn if there is none. An answer in GSM8K's form (reasoning, then `#### final`) loses its
    calculator annotations; under a template that opens `<think>` it becomes
    ` {reasoning} </think> <answer> {final} </answer>`. So does a solution of MATH, whose final
    answer is its `answer` or what its last `\\boxed{}` holds. Of a multiple-choice row the letter
    is the answer, and the choice's text stands where the reasoning would.

    Args:
        row: as read.
        layout: of its source.
        template: for questions and instructions; None: the tokenizer's chat template.
        train_on: `data.train_on`; with `all` the turns of a prompt are trained, too.

    Raises:
        UserError: a field is missing, empty, or not what its role needs (65).
    """
    for role, column in layout.columns.items():
        if column not in row.fields and role not in OPTIONAL_ROLES:
            found = f"columns {', '.join(row.fields) or 'none'}"
            raise wrong("D202", f"{column} is missing", row.at(column), found=found)
    weight = _weight(row, layout)
    shape = {
        "messages": _from_messages,
        "sharegpt": _from_sharegpt,
        "prompt_response": _from_prompt,
        "question_answer": _from_question,
        "alpaca": _from_question,
        "math": _from_problem,
        "multiple_choice": _from_choices,
        "tokens": _from_tokens,
        "text": _from_text,
    }[layout.format]
    example = shape(row, layout, template)
    truth = _ground_truth(row, layout) or example.ground_truth
    messages = example.messages
    if layout.format == "prompt_response" and messages is not None and train_on != "all":
        count = len(parsed(row.fields[layout.columns["prompt"]]))
        messages = (*(_as_context(message) for message in messages[:count]), *messages[count:])
    return replace(example, messages=messages, ground_truth=truth, weight=weight)


def _from_prompt(row: Row, layout: Layout, _: PromptTemplate | None) -> Example:
    prompt, response = layout.columns["prompt"], layout.columns["response"]
    if _holds_turns(row.fields[prompt]) and _holds_turns(row.fields[response]):
        turns = (*_messages(row, prompt), *_messages(row, response))
        return Example(row.place, messages=turns, tools=_tools(row, layout))
    if (tools := _tools(row, layout)) is not None:
        raise wrong("D213", "tools stand beside a prompt of text", row.at(layout.columns["tools"]),
                    "prompt and response as lists of messages, or data.columns.tools='' to pass "
                    "the column over", tools)  # fmt: skip
    return Example(row.place, texts=(_text(row, prompt), _text(row, response)))


def _from_question(row: Row, layout: Layout, template: PromptTemplate | None) -> Example:
    asked = layout.columns["question" if layout.format == "question_answer" else "instruction"]
    answered = layout.columns["response"]
    question, response = _text(row, asked), _text(row, answered)
    extra = row.fields.get(layout.columns.get("input", ""))
    if extra is not None and not isinstance(extra, str):
        raise wrong("D205", "input is not a string", row.at("input"), "a string", extra)
    tagged = template is not None and template.tagged
    truth = None
    if answered == "answer":
        response, truth = _shape_answer(row, response, tagged=tagged)
    elif tagged and CLOSING_TAG not in response:
        assert template is not None
        raise wrong(
            "D207",
            f"the template {template.name} opens <think>, and the response does not close it",
            row.at(answered),
            f"reasoning, then {CLOSING_TAG}, then the answer",
            response,
            hint="use data.prompt_template=alpaca, question_only or chat for plain responses",
        )
    if not extra or not extra.strip():
        return _asked(row, template, question, response, truth)
    if template is None:
        return _asked(row, template, f"{question}\n\n{extra}", response, truth)
    if template.text_with_input is None:
        raise wrong(
            "D206",
            "the row has an `input`, and the prompt template has no place for it",
            row.at(layout.columns["input"]),
            got=extra,
            hint="use data.prompt_template=alpaca, or a .prompt file with {input}",
        )
    return Example(row.place, texts=(template.fill(question, extra), response), ground_truth=truth)


def _asked(
    row: Row, template: PromptTemplate | None, question: str, response: str, truth: str | None
) -> Example:
    """Put a question into the template, or make it the user's turn."""
    if template is not None:
        return Example(row.place, texts=(template.fill(question), response), ground_truth=truth)
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": response})
    return Example(row.place, messages=turns, ground_truth=truth)


def _in_tags(reasoning: str, final: str) -> str:
    return f" {reasoning} {CLOSING_TAG} <answer> {final} </answer>"


def _from_problem(row: Row, layout: Layout, template: PromptTemplate | None) -> Example:
    column = layout.columns["solution"]
    solution = _text(row, column)
    final = _ground_truth(row, layout) or last_boxed(solution)
    if not final:
        raise wrong(
            "D217",
            f"the {column} has no final answer in a \\boxed{{}}",
            row.at(column),
            "… \\boxed{answer} …, the braces closed, or a column `answer`",
            solution[-40:],
            hint="give the answer in a column of its own: data.columns.ground_truth=…",
        )
    if template is not None and template.tagged:
        solution = _in_tags(solution.strip(), final)
    return _asked(row, template, _text(row, layout.columns["problem"]), solution, final)


def _from_choices(row: Row, layout: Layout, template: PromptTemplate | None) -> Example:
    question, column = _text(row, layout.columns["question"]), layout.columns["choices"]
    values = [row.fields.get(name) for name in layout.lettered] or parsed(row.fields[column])
    choices = read_choices(row, column, values)
    letter = read_letter(row, layout.columns["answer"], choices)
    response = letter
    if template is not None and template.tagged:
        response = _in_tags(str(choices[LETTERS.index(letter)]), letter)
    example = _asked(row, template, ask(question, choices), response, letter)
    return replace(example, choices=tuple(map(str, choices)))


def _from_messages(row: Row, layout: Layout, _: PromptTemplate | None) -> Example:
    messages = _messages(row, layout.columns["messages"])
    return Example(row.place, messages=messages, tools=_tools(row, layout))


def _from_sharegpt(row: Row, layout: Layout, _: PromptTemplate | None) -> Example:
    column = layout.columns["conversations"]
    messages: list[Mapping[str, Any]] = []
    system = row.fields.get(layout.columns.get("system", ""))
    if system:
        messages.append({"role": "system", "content": system})
    for index, turn in enumerate(_messages(row, column)):
        if "from" not in turn:
            messages.append(turn)  # the column's name is ShareGPT's, its turns are messages
            continue
        role, value = SHAREGPT_ROLES.get(str(turn["from"])), turn.get("value")
        calls = _calls(value) if turn["from"] == "function_call" else None
        if role is None or not isinstance(value, str) or calls == []:
            raise wrong(
                "D211", f"turn {index + 1} is no turn of a conversation", row.at(column),
                f"from: {', '.join(SHAREGPT_ROLES)}; value: text (of a function_call JSON with "
                "name and arguments)", turn,
            )  # fmt: skip
        said = {"content": value} if calls is None else {"content": None, "tool_calls": calls}
        # Keys of no meaning here stay: the chat template may read them, and the linter looks.
        kept = {key: each for key, each in turn.items() if key not in ("from", "value")}
        messages.append({"role": role, **said, **kept})
    return Example(row.place, messages=tuple(messages), tools=_tools(row, layout))


def _calls(value: Any) -> list[Any]:
    """Read the calls of a ShareGPT turn as `tool_calls`; none if they are not readable."""
    calls = parsed(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return []
    return [{"type": "function", "function": call} for call in calls]


def _from_text(row: Row, layout: Layout, _: PromptTemplate | None) -> Example:
    return Example(row.place, texts=("", _text(row, layout.columns["text"])))


def _from_tokens(row: Row, layout: Layout, _: PromptTemplate | None) -> Example:
    column = layout.columns["labels"]
    ids, labels = parsed(row.fields[layout.columns["input_ids"]]), parsed(row.fields[column])
    sound = isinstance(ids, list) and all(type(i) is int and 0 <= i < MOST_IDS for i in ids)
    if not sound or not ids:
        raise wrong("D212", "input_ids are no token ids", row.at("input_ids"),
                    "a list of numbers from 0, not empty", ids)  # fmt: skip
    if not (isinstance(labels, list) and len(labels) == len(ids)):
        raise wrong("D212", f"{column} does not go with input_ids", row.at(column),
                    f"a list of {len(ids)}", labels)  # fmt: skip
    if column == "response_mask":
        if any(value not in (0, 1) for value in labels):
            raise wrong("D212", "response_mask is no mask", row.at(column),
                        "0 or 1 for every token of input_ids", labels)  # fmt: skip
        return Example(row.place, tokens=(ids, [float(value) for value in labels]))
    for token, label in zip(ids, labels, strict=True):
        if label not in (token, IGNORED_LABEL):
            raise wrong("D212", "labels are not those of input_ids", row.at(column),
                        f"{token}, the token itself, or {IGNORED_LABEL} where it is only read "
                        "(not shifted); a mask of 0 and 1 is read from a column called "
                        "response_mask", label)  # fmt: skip
    return Example(row.place, tokens=(ids, [float(label != IGNORED_LABEL) for label in labels]))


def _messages(row: Row, column: str) -> tuple[Mapping[str, Any], ...]:
    value = parsed(row.fields[column])
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise wrong("D211", f"{column} is no conversation", row.at(column),
                    "a list of messages, not empty", value)  # fmt: skip
    return tuple(value)


def _holds_turns(value: Any) -> bool:
    """Whether a value is a list, or a cell of text in which a list of messages stands."""
    if not isinstance(value, str):
        return isinstance(value, list)
    turns = parsed(value)
    return isinstance(turns, list) and all(isinstance(m, dict) and "role" in m for m in turns)


def _as_context(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**message, "train": False} if message.get("role") == "assistant" else message


def _tools(row: Row, layout: Layout) -> Sequence[Any] | None:
    tools = parsed(row.fields.get(layout.columns.get("tools", "")))
    if tools in (None, [], ""):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise wrong("D213", "tools are no list of JSON schemas", row.at(layout.columns["tools"]),
                    "a list of objects", tools)  # fmt: skip
    return tools


def _shape_answer(row: Row, answer: str, *, tagged: bool) -> tuple[str, str | None]:
    found = FINAL_LINE.search(answer)
    reasoning = CALCULATOR.sub("", answer[: found.start()]).strip() if found else ""
    final = found[1].strip() if found else ""
    if final and reasoning:
        shaped = _in_tags(reasoning, final) if tagged else f"{reasoning}\n{FINAL_MARK} {final}"
        return shaped, final
    if not tagged:
        return answer, None
    raise wrong(
        "D204",
        "the answer has no reasoning and final answer to put into <think> and <answer>",
        row.at("answer"),
        f"reasoning, then a line `{FINAL_MARK} final`",
        answer,
        hint="use data.prompt_template=question_only, or rows with `prompt` and `response`",
    )


def _text(row: Row, column: str) -> str:
    value = row.fields[column]
    if not isinstance(value, str):
        raise wrong("D205", f"{column} is not a string", row.at(column), "non-empty string", value)
    if not value.strip():
        hint = "fix the row, or set data.on_bad_row=drop (drops are counted)"
        raise wrong(
            "D203", f"{column} is empty", row.at(column), "non-empty string", value, hint=hint
        )
    return value


def _ground_truth(row: Row, layout: Layout) -> str | None:
    """Give the row's own final answer, if it has one; here a number may stand as a number."""
    column = layout.columns.get("ground_truth", "")
    value = row.fields.get(column)
    if value is None:
        return None
    return str(value) if is_number(value) else _text(row, column)


def _weight(row: Row, layout: Layout) -> float:
    column = layout.columns.get("weight", "")
    value = row.fields.get(column)
    if value is None or value == "":  # an empty cell of a CSV file
        return 1.0
    if isinstance(value, str):  # nor can a number be told from text there
        with suppress(ValueError):
            value = float(value)
    if not is_weight(value):
        raise wrong("D214", f"{column} is no weight", row.at(column), WEIGHT, value)
    return float(value)
