"""When a run evaluates its held-out data, and what follows from the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from cs336_alignment.config import TrainerConfig
from cs336_alignment.evaluation.evaluator import Evaluator
from cs336_alignment.tracking.console import Console
from cs336_alignment.tracking.tracker import RunTracker
from cs336_alignment.training.best import Judge, Score, Verdict
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.trainer import is_due


@dataclass
class HeldOutEvaluation:
    """Called by the loop at every step; knows itself when it is due.

    Attributes:
        evaluator: of the policy in training.
        trainer: the trainer section.
        generation_steps: responses are generated every so many steps; 0: at start and end; None:
            never.
        first_step: where this part of the run begins.
        total_steps: where the run ends.
        tracker: takes the results; on the main process it knows those of earlier parts.
        judge: of the results.
        processes: who shares the work.
        console: of this process.
        shown: makes a context in which the model has the weights to evaluate.
    """

    evaluator: Evaluator
    trainer: TrainerConfig
    generation_steps: int | None
    first_step: int
    total_steps: int
    tracker: RunTracker
    judge: Judge
    processes: Processes
    console: Console
    shown: Callable[[], AbstractContextManager[None]]
    _told_lost: Score | None = None

    def __post_init__(self) -> None:
        # A stop came before or in the evaluation of the last step, or the run begins here.
        self._pending = self.processes.agree(not self.tracker.has_evaluated(self.first_step))

    def __call__(self, step: int) -> Verdict:
        """Evaluate if that is due; every process gets the same verdict.

        Raises:
            StopNow: some process was asked to stop.
            UserError: the metric to choose by does not come (78).
        """
        generates = self.generation_steps is not None
        generate = self._is_due(self.generation_steps, step)
        due = generate or self._is_due(self.trainer.eval_steps, step)
        if step == self.first_step and not (self._pending and due):
            # The best step of the parts before is kept from the first save on.
            return self._told(self._verdict(step), step)
        if not due:
            return Verdict()
        begin = time.perf_counter()
        with self.shown():
            result = self.evaluator.run(generate=generate)
            if generates and not generate and self._verdict(step, result.metrics).stop:
                generate, result = True, self.evaluator.run(generate=True)  # this step is the last
        if generate or not generates:
            self.judge.refuse_missing(result.metrics)
        seconds = time.perf_counter() - begin
        self.tracker.evaluation(step, result.metrics, result.rows, seconds)
        return self._told(self._verdict(step), step)

    def _is_due(self, every: int | None, step: int) -> bool:
        return every is not None and (step in (0, self.total_steps) or is_due(every, step))

    def _verdict(self, step: int, metrics: Mapping[str, float] | None = None) -> Verdict:
        # The metrics are the main process's.
        return self.processes.agree(self.judge.verdict(step, metrics))

    def _told(self, verdict: Verdict, step: int) -> Verdict:
        """Say what a verdict means for people."""
        metric, lost = self.trainer.metric_for_best_model, verdict.lost
        if lost is not None and lost != self._told_lost:
            self._told_lost = lost
            self.console.warn(
                f"step {lost.step} has the best {metric} ({lost.value:.4f}), and its checkpoint is "
                "gone: the best of those that are there is kept instead"
            )
        if verdict.stop and step < self.total_steps:
            patience = self.trainer.early_stopping_patience
            self.console.note(
                f"stopped early at step {step} of {self.total_steps}: {patience} evaluation(s) "
                f"without a better {metric}"
            )
        return verdict
