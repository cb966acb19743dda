"""Which of a run's generations its page shows: as many as fit, and how many there are besides."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cs336_alignment.tracking.run_record import GENERATIONS

BUDGET_BYTES = 4_000_000
MOST_EVALUATIONS = 40
MOST_CHARACTERS = 20_000  # of one text
ROW_BYTES = 120  # what a row holds besides its texts
SHORTEST_PREFIX = 40
FILE = re.compile(r"step-(\d+)\.jsonl")


@dataclass
class _Texts:
    """Prompts, each once, however many evaluations asked it."""

    places: dict[tuple[str, str], int] = field(default_factory=dict)

    def place(self, prompt: str, truth: str) -> int:
        return self.places.setdefault((prompt, truth), len(self.places))


def choose_generations(run: Path, budget: int = BUDGET_BYTES) -> dict[str, Any]:
    """Read what a page shows of `generations/step-….jsonl`.

    The last evaluation gets half of the room, the others equal parts of the rest; each shows its
    first rows, so that the same prompts can be followed through the run. Of very many evaluations
    some are taken, evenly spaced, the first and the last among them.

    Args:
        run: its folder.
        budget: bytes that the rows may take, about.

    Returns:
        `evaluations`: `step`, `file`, `shown`, `of` and `unreadable` lines of each that is shown;
        `left_out`: how many are not; `prefix`: with which all prompts begin; `prompts`: the rest of
        each, its ground truth, and the characters that were cut from it; `rows`: lists in the order
        of `fields`, where `evaluation` and `prompt` are places in these lists.
    """
    files = sorted(
        (int(found[1]), path) for path in (run / GENERATIONS).glob("step-*.jsonl")
        if (found := FILE.fullmatch(path.name))
    )  # fmt: skip
    chosen = files
    if len(files) > MOST_EVALUATIONS:
        places = np.linspace(0, len(files) - 1, MOST_EVALUATIONS).round().astype(int)
        chosen = [files[place] for place in places]
    texts, parts = _Texts(), {}
    left = budget
    for number, (step, path) in enumerate(reversed(chosen)):
        others = len(chosen) - number
        allowance = left // 2 if number == 0 and others > 1 else left // others
        parts[step] = part = _read(path, allowance, texts)
        left -= part["bytes"]
    prompts = list(texts.places)
    prefix = _common_prefix([prompt for prompt, _ in prompts])
    fields = ("evaluation", "prompt", "index", "sample", "response", "cut", "format_reward",
              "answer_reward", "reward", "token_entropy", "length", "stopped", "error")  # fmt: skip
    rows = []
    for place, (step, _) in enumerate(chosen):
        for row in parts[step]["rows"]:
            values = {**row, "evaluation": place}
            rows.append([values[name] for name in fields])
    return {
        "evaluations": [
            {"step": step, "file": f"{GENERATIONS}/{path.name}", "shown": len(parts[step]["rows"]),
             "of": parts[step]["of"], "unreadable": parts[step]["unreadable"]}
            for step, path in chosen
        ],
        "left_out": len(files) - len(chosen),
        "prefix": prefix,
        "prompts": [
            [*_cut(prompt.removeprefix(prefix)), truth[:MOST_CHARACTERS]]
            for prompt, truth in prompts
        ],
        "fields": fields,
        "rows": rows,
    }  # fmt: skip


def _read(path: Path, allowance: int, texts: _Texts) -> dict[str, Any]:
    """Read the first rows of a file for so many bytes, and count the others."""
    rows: list[dict[str, Any]] = []
    spent = number = unreadable = 0
    full = False
    for number, line in _numbered_lines(path):
        if full:
            continue
        row = _parse(line)
        if row is None:
            unreadable += 1
            continue
        prompt, truth = str(row.get("prompt", "")), str(row.get("ground_truth", ""))
        response, cut = _cut(str(row.get("response", "")))
        error = str(row.get("reward_error") or "")[:MOST_CHARACTERS]
        cost = ROW_BYTES + len(json.dumps(response)) + len(json.dumps(error))
        if (prompt, truth) not in texts.places:
            cost += len(json.dumps(prompt[:MOST_CHARACTERS])) + len(json.dumps(truth))
        if spent + cost > allowance and rows:
            full = True
            continue
        spent += cost
        numbers = {
            name: _number(row.get(name))
            for name in ("format_reward", "answer_reward", "reward", "token_entropy", "length")
        }
        rows.append({
            "prompt": texts.place(prompt, truth), "response": response, "cut": cut,
            "index": row.get("index", number - 1), "sample": row.get("sample", 0), **numbers,
            "stopped": str(row.get("stopped", "")), "error": error,
        })  # fmt: skip
    return {"rows": rows, "of": number, "bytes": spent, "unreadable": unreadable}


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        yield from enumerate(file, start=1)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and np.isfinite(value)
    return float(f"{float(value):.6g}") if known else None


def _cut(text: str) -> tuple[str, int]:
    return text[:MOST_CHARACTERS], max(0, len(text) - MOST_CHARACTERS)


def _common_prefix(prompts: Sequence[str]) -> str:
    """The template that all prompts begin with, in whole lines or words; "" if it is short."""
    if len(prompts) < 2:
        return ""
    first, last = min(prompts), max(prompts)
    differ = (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    common = first[: next(differ, len(first))]
    for end in "\n ":
        prefix = common[: common.rfind(end) + 1]
        if len(prefix) >= SHORTEST_PREFIX:
            return prefix
    return ""
