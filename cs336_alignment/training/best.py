"""Which step is the best, and whether to go on: pure functions of the metrics that a run wrote."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from cs336_alignment.config import TrainerConfig
from cs336_alignment.errors import UserError
from cs336_alignment.metric_names import SOMETIMES, greater_is_better, nearest_metric


@dataclass(frozen=True)
class Score:
    """What an evaluation found.

    Attributes:
        step: that it evaluated.
        value: of the metric; NaN where it was not a number.
    """

    step: int
    value: float


@dataclass(frozen=True)
class Criterion:
    """What makes one step better than another.

    Attributes:
        metric: its name in `metrics.jsonl`.
        greater: whether more of it is better.
    """

    metric: str
    greater: bool

    @staticmethod
    def of(config: TrainerConfig) -> Criterion | None:
        """Read a config that was checked; None: the last step counts, whatever it is worth."""
        metric = config.metric_for_best_model
        if metric is None:
            return None
        given = config.greater_is_better
        return Criterion(metric, bool(greater_is_better(metric) if given is None else given))

    def scores(self, rows: Iterable[Mapping[str, Any]]) -> list[Score]:
        """Find the metric in a run's metrics, in their order."""
        return [Score(row["step"], _number(row[self.metric])) for row in rows if self.metric in row]

    def ranked(self, scores: Iterable[Score]) -> list[Score]:
        """Put evaluations in order, the best first, of equals the earlier; NaN is left out."""
        numbers = [score for score in scores if not math.isnan(score.value)]
        return sorted(numbers, key=lambda score: score.value, reverse=self.greater)

    def best(self, scores: Iterable[Score]) -> Score | None:
        """Choose the best of some evaluations; None if no value is a number."""
        return next(iter(self.ranked(scores)), None)

    def stale(self, scores: Sequence[Score], since: int = 0) -> int:
        """Count the evaluations after the best one, but only those of later steps than `since`."""
        best = self.best(scores)
        place = -1 if best is None else scores.index(best)
        return sum(score.step > since for score in scores[place + 1 :])


@dataclass(frozen=True)
class Verdict:
    """What follows from the evaluations so far.

    Attributes:
        best: the best step that has a checkpoint or is the present one; None: nothing to choose.
        saved: whether that step's checkpoint is there.
        lost: the step that was better by the metrics and whose checkpoint is gone; None: none.
        stop: whether patience is at its end.
    """

    best: Score | None = None
    saved: bool = True
    lost: Score | None = None
    stop: bool = False


@dataclass(frozen=True)
class Judge:
    """Applies a criterion to a run, again and again; all it knows is in the run's own files.

    Args:
        criterion: None: no verdict ever chooses or stops.
        patience: evaluations without a better one that end the run; None: no number does.
        comparable_since: evaluations of earlier steps asked other questions.
        patient_since: up to this step nothing counts against the patience: a run that stopped for
            want of it was given more steps.
        evaluations: gives the rows of `metrics.jsonl`.
        saved_steps: gives the steps that have a checkpoint.
    """

    criterion: Criterion | None
    patience: int | None
    _: KW_ONLY
    comparable_since: int
    patient_since: int
    evaluations: Callable[[], Sequence[Mapping[str, Any]]]
    saved_steps: Callable[[], Collection[int]]

    def verdict(self, step: int, metrics: Mapping[str, float] | None = None) -> Verdict:
        """Judge where a run stands; `metrics`: of this step, not yet written.

        Step 0 is the model as it came: it counts for patience, and is never what a run exports.
        """
        if self.criterion is None:
            return Verdict()
        scores = self._comparable({"step": step, **(metrics or {})})
        trained = [score for score in scores if score.step > 0]
        saved = set(self.saved_steps())
        best = self.criterion.best(trained)
        kept = self.criterion.best([s for s in trained if s.step in saved or s.step == step])
        stale = self.criterion.stale(scores, self.patient_since)
        return Verdict(
            kept,
            saved=kept is None or kept.step in saved,
            lost=None if best == kept else best,
            stop=self.patience is not None and stale >= self.patience,
        )

    def choices(self, step: int) -> list[Score]:
        """Give the trained steps that have a checkpoint or are the present one, best first."""
        if self.criterion is None:
            return []
        saved = {*self.saved_steps(), step}
        left = [s for s in self._comparable() if 0 < s.step <= step and s.step in saved]
        return self.criterion.ranked(left)

    def _comparable(self, *more: Mapping[str, Any]) -> list[Score]:
        assert self.criterion is not None
        rows = [row for row in self.evaluations() if row["step"] >= self.comparable_since]
        return self.criterion.scores([*rows, *more])

    def refuse_missing(self, metrics: Mapping[str, float]) -> None:
        """Refuse to go on for a metric that does not come.

        Args:
            metrics: of an evaluation that did all that the run's evaluations do.

        Raises:
            UserError: the metric should be among them, and is not (78).
        """
        metric = None if self.criterion is None else self.criterion.metric
        if metric is None or metric in metrics or metric in SOMETIMES:
            return
        near = nearest_metric(metric, tuple(metrics))
        raise UserError(
            "C132",
            f"the evaluation gives no {metric}, which trainer.metric_for_best_model names",
            expected=f"one of {', '.join(sorted(metrics))}",
            hint=f"did you mean {near}?" if near else None,
        )


def _number(value: float | None) -> float:
    """NaN and infinities are null in the file."""
    return float(value) if value is not None and math.isfinite(value) else math.nan
