"""Curves out of `metrics.jsonl`, and long ones thinned so that no extreme value is lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

STRETCHES = 1000
DIGITS = 6  # significant ones, more than a screen shows


@dataclass(frozen=True)
class Curve:
    """One metric over the steps, in their order.

    Attributes:
        steps: (N,) ascending, each once.
        values: (N,) NaN where the file has null: the value was not finite.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def describe(self) -> dict[str, Any]:
        """Give what a table says of it: `count`, `not_finite`, and as [step, value], None where
        no value is finite, `first`, `last`, `least` and `greatest`; and the `median`.
        """
        finite = np.flatnonzero(np.isfinite(self.values))
        facts: dict[str, Any] = {
            "count": len(self.values),
            "not_finite": len(self.values) - len(finite),
            **dict.fromkeys(("first", "last", "least", "greatest", "median")),
        }
        if len(finite):
            values = self.values[finite]
            places = {"first": finite[0], "last": finite[-1], "least": finite[values.argmin()],
                      "greatest": finite[values.argmax()]}  # fmt: skip
            for name, place in places.items():
                facts[name] = [int(self.steps[place]), float(self.values[place])]
            facts["median"] = float(np.median(values))
        return facts

    def as_json(self, stretches: int = STRETCHES) -> dict[str, Any]:
        """Give the points to draw.

        Of a curve of more than two points a stretch each stretch, equal in number of points, gives
        its least and its greatest value in their order, and its mean, from which a smooth line
        can be drawn.

        Returns:
            `x` and `y`; None stands for what was not finite. Of a thinned curve also `of`, the
            number of points that it had, and `mx` and `my`, the means.
        """
        if len(self.steps) <= 2 * stretches:
            return {"x": self.steps.tolist(), "y": [_short(value) for value in self.values]}
        x: list[int] = []
        y: list[float | None] = []
        means: list[tuple[int, float | None]] = []
        for part in np.array_split(np.arange(len(self.steps)), stretches):
            finite = part[np.isfinite(self.values[part])]
            middle = int(self.steps[part[len(part) // 2]])
            if not len(finite):
                x.append(middle)
                y.append(None)
                means.append((middle, None))
                continue
            values = self.values[finite]
            for place in sorted({int(finite[values.argmin()]), int(finite[values.argmax()])}):
                x.append(int(self.steps[place]))
                y.append(_short(self.values[place]))
            means.append((middle, _short(values.mean())))
        mx, my = zip(*means, strict=True)
        return {"x": x, "y": y, "mx": mx, "my": my, "of": len(self.steps)}


def read_curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Collect every metric of a run.

    Args:
        rows: of `metrics.jsonl`. Of several values of a metric at one step the last counts.

    Returns:
        Name → curve, in the order in which the names come up.
    """
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        step = row["step"]
        for name, value in row.items():
            if name in ("step", "time") or isinstance(value, str | bool | list | dict):
                continue
            found.setdefault(name, {})[step] = np.nan if value is None else value
    curves = {}
    for name, points in found.items():
        steps = np.fromiter(points, np.int64, len(points))
        values = np.fromiter(points.values(), np.float64, len(points))
        order = np.argsort(steps, kind="stable")
        curves[name] = Curve(steps[order], values[order])
    return curves


def _short(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None
