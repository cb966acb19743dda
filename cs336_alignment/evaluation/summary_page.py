"""A summary for people: the table of the console, and the Markdown page with tables to paste."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from cs336_alignment.evaluation.statistics import LEVEL, RESAMPLES
from cs336_alignment.evaluation.summary import OUTCOMES, Finding, Row, Summary, outcome_of

MOST_SHOWN = 1_500  # characters of a text in the page
_REWARDS = ("eval/reward", "eval/format_reward", "eval/answer_reward")


def table_of(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Give the header and the rows of the table of metrics."""
    if summary.baseline_outcomes is None:
        return ["metric", f"value [{LEVEL:.0%}]"], [
            [f.metric, str(f.model)] for f in summary.findings
        ]
    header = ["metric", "baseline", "model", "difference", "p"]
    return header, [_cells(found.metric, found) for found in summary.findings]


def brief_table_of(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Give a table for a terminal of 80 columns: beside a baseline, the interval of the difference
    alone.
    """
    header, rows = table_of(summary)
    for row, found in zip(rows, summary.findings, strict=True):
        row[0] = found.metric.removeprefix("eval/")
        if found.baseline is not None:
            row[1:3] = [f"{found.baseline.value:.4f}", f"{found.model.value:.4f}"]
        if (gap := found.difference) is not None:
            row[3] = f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
    return header, rows


def _cells(name: str, found: Finding) -> list[str]:
    if found.test is None:
        return [name, str(found.model)]
    p_value = found.test.p_value
    shown = f"{p_value:.4f}" if p_value >= 1e-3 else f"{p_value:.1e}"
    return [name, str(found.baseline), str(found.model), str(found.difference), shown]


def to_markdown(
    summary: Summary,
    rows: Sequence[Row],
    *,
    model: str,
    baseline: str | None,
    data: str,
    settings: Mapping[str, object],
    examples: int,
) -> str:
    """Write the page: tables to paste, and some responses of each outcome.

    Args:
        summary: of the evaluation.
        rows: of the model.
        model: its name.
        baseline: its name, if there is one.
        data: the evaluation data.
        settings: name → value.
        examples: responses shown of each outcome.
    """
    header, cells = table_of(summary)
    lines = [f"# {model} on {data}", ""]
    if baseline is not None:
        lines += [f"Baseline: {baseline}. The difference is model − baseline.", ""]
    lines += [*_table(header, cells), "", *_footnotes(summary), ""]
    columns = ["format", "answer", *(["baseline"] if baseline else []), "model"]
    counts = []
    for outcome, count in summary.outcomes.items():
        before = summary.baseline_outcomes
        sides = [count] if before is None else [before[outcome], count]
        if any(sides):
            counts.append([*map(str, outcome), *(f"{n:,}" for n in sides)])
    lines += ["## Responses", "", *_table(columns, counts), ""]
    for column, by_value in summary.groups.items():
        group = [
            [value, f"{n:,}", *_cells(value, found)[1:]] for value, (n, found) in by_value.items()
        ]
        lines += [
            f"## Reward by {column}",
            "",
            *_table([column, "prompts", *header[1:]], group),
            "",
        ]
    lines += _examples(rows, examples)
    pairs = [[name, str(value)] for name, value in settings.items()]
    return "\n".join([*lines, "## Settings", "", *_table(["setting", "value"], pairs), ""])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"

    marks = "|" + "|".join(["---", *["---:"] * (len(header) - 1)]) + "|"
    return [line(header), marks, *map(line, rows)]


def _footnotes(summary: Summary) -> list[str]:
    prompts = f"{summary.prompts:,} prompts"
    if summary.samples > 1:
        prompts += f", {summary.samples} samples of each (averaged, then resampled by prompt)"
    lines = [f"{prompts}. In brackets: {LEVEL:.0%} percentile bootstrap, {RESAMPLES:,} resamples."]
    for found in summary.findings:
        if found.metric in _REWARDS and found.model.low == found.model.high in (0, 1):
            most = 1 - ((1 - LEVEL) / 2) ** (1 / summary.prompts)
            end = f"at most {most:.4f}" if found.model.value == 0 else f"at least {1 - most:.4f}"
            lines.append(
                f"- {found.metric}: all prompts agree, which no resampling can widen; exactly "
                f"(Clopper–Pearson) it is {end}."
            )
        if found.test is not None:
            lines.append(
                f"- {found.metric}: {found.test.name}, two-sided, {found.test.discordant:,} "
                f"discordant pairs, the model is higher in {found.test.better:,} of them."
            )
    return lines


def _examples(rows: Sequence[Row], most: int) -> list[str]:
    lines: list[str] = []
    for outcome in OUTCOMES:
        chosen = [row for row in rows if outcome_of(row) == outcome][:most]
        if chosen:
            lines += [f"## Format {outcome[0]}, answer {outcome[1]}", ""]
        for row in chosen:
            lines += [f"Example {row['index'] + 1}, ground truth `{row['ground_truth']}`:", ""]
            lines += [*_fenced(row["prompt"]), "", *_fenced(row["response"]), ""]
    return lines


def _fenced(text: str) -> list[str]:
    if len(text) > MOST_SHOWN:  # the end of a prompt is its question, and of a response its answer
        text = "… " + text[-MOST_SHOWN:]
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", text, fence]
