"""A trial: `cs336-sft train` in a process of its own, watched by its metrics while it runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cs336_alignment.errors import ExitStatus
from cs336_alignment.orphans import end_with
from cs336_alignment.tracking.metrics import read_metrics
from cs336_alignment.training.run_folder import METRICS

POLL_SECONDS = 0.2
ERROR_MARK = "error["


@dataclass(frozen=True)
class TrialEnd:
    """How a trial's process ended.

    Attributes:
        status: its exit status; a signal's number is 128 + it.
        pruned: its metric was no good, so it was asked to end; it may have come to its end before.
        error: what it printed as its error.
    """

    status: int
    pruned: bool
    error: str | None


def run_trial(
    arguments: Sequence[str],
    folder: Path,
    log: Path,
    metric: str,
    is_hopeless: Callable[[int, float], bool],
) -> TrialEnd:
    """Run `cs336-sft train` to its end, or until its metric says that it is hopeless.

    Args:
        arguments: after the verb.
        folder: of the run.
        log: takes what it prints.
        metric: of its `metrics.jsonl`.
        is_hopeless: called with (step, value) of every evaluation after step 0, in order.
    """
    command = [sys.executable, "-m", "cs336_alignment.cli", "train", *arguments]
    parent, seen, size, pruned = os.getpid(), 0, -1, False
    with log.open("wb") as out:
        # A trial that outlived a sweep that was killed would hold its run's lock.
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            preexec_fn=lambda: None if end_with(parent) else os._exit(ExitStatus.STOPPED),
        )  # fmt: skip
        try:
            while not pruned:
                over = child.poll() is not None
                if (now := _size(folder / METRICS)) != size:  # a long file is not read for nothing
                    size, points = now, _points(folder / METRICS, metric)
                    for step, value in points[seen:]:
                        pruned = pruned or (step > 0 and is_hopeless(step, value))
                    seen = len(points)
                if over:
                    break
                time.sleep(POLL_SECONDS)
        finally:  # hopeless, or this process was asked to stop: the trial saves and leaves
            if child.poll() is None:
                child.terminate()
            child.wait()
    status = child.returncode if child.returncode >= 0 else 128 - child.returncode
    return TrialEnd(status, pruned, _error_of(log))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _points(path: Path, metric: str) -> list[tuple[int, float]]:
    with suppress(OSError, ValueError):  # it may be replaced at this moment
        return [(r["step"], r[metric]) for r in read_metrics(path) if r.get(metric) is not None]
    return []


def _error_of(log: Path) -> str | None:
    text = log.read_text(encoding="utf-8", errors="replace")
    start = text.rfind(f"\n{ERROR_MARK}") + 1 if f"\n{ERROR_MARK}" in text else 0
    return text[start:].strip() if text[start:].startswith(ERROR_MARK) else None
