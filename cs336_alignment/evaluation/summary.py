"""What an evaluation found, with how sure it is, as numbers and for `evaluation.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cs336_alignment.evaluation.statistics import (
    LEVEL,
    Floats,
    PairedTest,
    bootstrap_means,
    paired_test,
    percentile_interval,
)

Row = Mapping[str, Any]
OUTCOMES = ((1, 1), (1, 0), (0, 1), (0, 0))  # format, answer
_QUANTITIES: dict[str, Callable[[Row], float | None]] = {
    "eval/reward": lambda row: row["reward"],
    "eval/format_reward": lambda row: row["format_reward"],
    "eval/answer_reward": lambda row: row["answer_reward"],
    "eval/stop_rate": lambda row: float(row["stopped"] != "length"),
    "eval/response_length": lambda row: row["length"],
    "eval/response_entropy": lambda row: row["token_entropy"],
}


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and the ends of its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Finding:
    """One metric of the model and, beside a baseline, of both, with the difference and its test."""

    metric: str
    model: Estimate
    baseline: Estimate | None = None
    difference: Estimate | None = None
    test: PairedTest | None = None


@dataclass(frozen=True)
class Summary:
    """An evaluation in numbers.

    Attributes:
        prompts: how many were answered.
        samples: responses to each.
        findings: one for each metric.
        outcomes: (format, answer) → responses of the model.
        baseline_outcomes: those of the baseline; None without one.
        groups: column → its value → (prompts, the reward there).
    """

    prompts: int
    samples: int
    findings: tuple[Finding, ...]
    outcomes: dict[tuple[int, int], int]
    baseline_outcomes: dict[tuple[int, int], int] | None
    groups: dict[str, dict[str, tuple[int, Finding]]]


def summarize_evaluation(
    rows: Sequence[Row],
    baseline: Sequence[Row] | None,
    *,
    groups: Mapping[str, Mapping[int, str]],
    seed: int,
) -> Summary:
    """Estimate every metric with its interval and, beside a baseline, test the differences.

    Args:
        rows: of the model, `log_generations`' with `index` and `sample`; at least one.
        baseline: of the baseline, for the same prompts and samples; None: there is none.
        groups: column → number of the example → its value there.
        seed: of resampling.

    Raises:
        ValueError: the baseline answered other prompts.
    """
    if baseline is not None and _asked(rows) != _asked(baseline):
        raise ValueError("model and baseline answered different prompts")
    by_value: dict[str, dict[str, tuple[int, Finding]]] = {}
    for column, values in groups.items():
        by_value[column] = {}
        for value in sorted(set(values.values())):
            mine, theirs = (
                None if side is None else [row for row in side if values.get(row["index"]) == value]
                for side in (rows, baseline)
            )
            if mine:
                found = _find(mine, theirs, ("eval/reward",), seed)[0]
                by_value[column][value] = len(_asked(mine)), found
    return Summary(
        len({row["index"] for row in rows}), len({row["sample"] for row in rows}),
        tuple(_find(rows, baseline, tuple(_QUANTITIES), seed)),
        count_outcomes(rows), None if baseline is None else count_outcomes(baseline), by_value,
    )  # fmt: skip


def _asked(rows: Sequence[Row]) -> set[tuple[int, int]]:
    return {(row["index"], row["sample"]) for row in rows}


def _find(
    rows: Sequence[Row], baseline: Sequence[Row] | None, metrics: Sequence[str], seed: int
) -> list[Finding]:
    sides = [rows] if baseline is None else [rows, baseline]
    columns, names, binary = [], [], []
    for metric in metrics:
        values = [_per_prompt(side, _QUANTITIES[metric]) for side in sides]
        if any(value is None for value in values):  # a backend does not tell
            continue
        columns += [value for value in values if value is not None]
        names.append(metric)
        both = np.concatenate(columns[-len(sides) :])
        binary.append(len(_asked(rows)) == len(columns[-1]) and bool(np.isin(both, (0, 1)).all()))
    table = np.stack(columns, axis=1)  # (P, metrics · sides)
    means = bootstrap_means(table, seed=seed)
    found = []
    for number, metric in enumerate(names):
        first = number * len(sides)
        model = Estimate(float(table[:, first].mean()), *percentile_interval(means[:, first]))
        if baseline is None:
            found.append(Finding(metric, model))
            continue
        before, after = table[:, first + 1], table[:, first]
        other = Estimate(float(before.mean()), *percentile_interval(means[:, first + 1]))
        gaps = means[:, first] - means[:, first + 1]
        gap = Estimate(float((after - before).mean()), *percentile_interval(gaps))
        test = paired_test(before, after, binary=binary[number], seed=seed)
        found.append(Finding(metric, model, other, gap, test))
    return found


def _per_prompt(rows: Sequence[Row], quantity: Callable[[Row], float | None]) -> Floats | None:
    """Average over the samples of each prompt, (P,) in the order of their numbers."""
    values: dict[int, list[float]] = {}
    for row in sorted(rows, key=lambda row: (row["index"], row["sample"])):
        value = quantity(row)
        if value is None:
            return None
        values.setdefault(row["index"], []).append(value)
    return np.array([sum(each) / len(each) for each in values.values()])


def outcome_of(row: Row) -> tuple[int, int]:
    """Say whether a response kept the format, and whether it is right."""
    return int(row["format_reward"] > 0), int(row["answer_reward"] > 0)


def count_outcomes(rows: Sequence[Row]) -> dict[tuple[int, int], int]:
    """Count responses by format and answer; what no response can be under its reward is 0."""
    found = Counter(outcome_of(row) for row in rows)
    return {outcome: found[outcome] for outcome in OUTCOMES}


def to_json(summary: Summary) -> dict[str, Any]:
    """Give what `evaluation.json` holds beside the metrics."""

    def name(outcome: tuple[int, int]) -> str:
        return f"format {outcome[0]}, answer {outcome[1]}"

    findings = summary.findings
    content: dict[str, Any] = {
        "num_prompts": summary.prompts,
        "num_samples": summary.samples,
        "confidence": LEVEL,
        "intervals": {found.metric: [found.model.low, found.model.high] for found in findings},
        "outcomes": {name(outcome): count for outcome, count in summary.outcomes.items()},
    }
    if summary.baseline_outcomes is not None:
        outcomes = summary.baseline_outcomes.items()
        content["baseline_outcomes"] = {name(outcome): count for outcome, count in outcomes}
        content["comparison"] = {found.metric: asdict(found) for found in findings}
    if summary.groups:
        content["groups"] = {
            column: {value: {"num_prompts": n, **asdict(found)} for value, (n, found) in by.items()}
            for column, by in summary.groups.items()
        }
    return content
