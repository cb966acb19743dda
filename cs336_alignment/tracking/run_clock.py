"""How much of a run's time its evaluations take, over all parts of a run that was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

RUN_SECONDS = "perf/run_seconds"
EVALUATION_SECONDS = "perf/evaluation_seconds"
EVALUATION_SHARE = "perf/evaluation_share"


class RunClock:
    """Counts from its making on, after what the metrics say of the parts before.

    After the last evaluation of an earlier part its logged steps alone are known; what it did
    between them, and what was lost with a kill, is not counted.

    Args:
        rows: of `metrics.jsonl`.
        now: in seconds.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._now = now
        self._begin = now()
        self._run_seconds = self._evaluation_seconds = 0.0
        for row in rows:
            if RUN_SECONDS in row:
                self._run_seconds = row[RUN_SECONDS]
            else:
                self._run_seconds += row.get("perf/step_seconds") or 0.0
            self._evaluation_seconds += row.get(EVALUATION_SECONDS) or 0.0

    def evaluated(self, seconds: float) -> dict[str, float]:
        """Take notice of an evaluation; returns its seconds, those of the run so far, and the share
        of all evaluations in them (0 to 1).
        """
        self._evaluation_seconds += seconds
        total = self._run_seconds + self._now() - self._begin
        share = self._evaluation_seconds / total if total > 0 else 0.0
        return {EVALUATION_SECONDS: seconds, RUN_SECONDS: total, EVALUATION_SHARE: min(1.0, share)}
