"""Several runs from one command line: one after another, in one process, none hiding another."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cs336_alignment.config import Config
from cs336_alignment.errors import ExitStatus, UserError

STOPS = (ExitStatus.STOPPED, ExitStatus.INTERRUPTED)


@dataclass(frozen=True)
class SweptRun:
    """One run of several.

    Attributes:
        config: of the run; its name says what differs.
        base_name: the name that all of them have in common.
        swept: key → value as typed, of the keys that differ between the runs.
    """

    config: Config
    base_name: str
    swept: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """How one run of several ended.

    Attributes:
        run: which.
        status: its exit status.
        error: as printed, if it failed.
    """

    run: SweptRun
    status: ExitStatus
    error: str | None = None


def refuse_equal_names(runs: Sequence[SweptRun]) -> None:
    """Refuse runs that would share a folder, or a place on the hub.

    Raises:
        UserError: two have the same name (78).
    """
    pushed = [run.config.hub.hub_model_id for run in runs if run.config.hub.hub_model_id]
    if len(set(pushed)) < len(pushed):
        raise UserError(
            "C172",
            f"several runs of this multirun would be pushed to {pushed[0]}",
            hint="hub.hub_model_id=null pushes each under its own name",
        )
    seen: dict[tuple[str, str | None], SweptRun] = {}
    for run in runs:
        other = seen.setdefault((run.config.output_root, run.config.run_name), run)
        if other is not run:
            raise UserError(
                "C140",
                f"two runs of this multirun would be called {run.config.run_name}",
                got=f"{_describe(other)} and {_describe(run)}",
                hint="sweep values whose letters and digits differ",
            )


def run_all(runs: Sequence[SweptRun], job: Callable[[Config], ExitStatus]) -> list[Outcome]:
    """Run one after another. One that fails is told, and the next begins; a request to stop ends
    them all, and so does `trainer.max_hours`, which counts from the first one's beginning.

    Args:
        runs: their configs are checked.
        job: runs one.

    Returns:
        What became of those that began, in order.
    """
    outcomes: list[Outcome] = []
    begin = time.monotonic()
    for number, run in enumerate(runs, start=1):
        print(f"\n[{number}/{len(runs)}] {run.config.run_name}", flush=True)
        hours = run.config.trainer.max_hours
        if hours is not None:
            left = hours - (time.monotonic() - begin) / 3600
            if left <= 0:
                print("the time is over: the same command goes on with it", flush=True)
                outcomes.append(Outcome(run, ExitStatus.STOPPED))
                break
            run.config.trainer.max_hours = left
        try:
            outcomes.append(Outcome(run, job(run.config)))
        except UserError as error:
            print(error, file=sys.stderr, flush=True)
            outcomes.append(Outcome(run, error.status, str(error)))
        except Exception as failure:
            traceback.print_exc()
            text = f"error[X001]: internal error: {failure}"
            print(text, file=sys.stderr, flush=True)
            outcomes.append(Outcome(run, ExitStatus.INTERNAL, text))
        if outcomes[-1].status in STOPS:
            break
    return outcomes


def time_of_status(run: SweptRun) -> int | None:
    """Give when a run's state was last written down, before another process runs it; None: never.

    It is compared with itself alone, so clocks of other machines may differ.
    """
    try:
        return _status_file(run).stat().st_mtime_ns
    except OSError:
        return None


def outcome_of(run: SweptRun, earlier: int | None = None) -> Outcome:
    """Read from a run's folder how it ended, where another process ran it.

    Args:
        run: which.
        earlier: of `time_of_status`, before. A file that is as it was is of an earlier attempt: it
            counts where the run was complete and there was nothing to do.
    """
    path = _status_file(run)
    try:
        written, left = time_of_status(run), json.loads(path.read_text(encoding="utf-8"))
        code, error = left.get("exit_code"), left.get("error")
        status = None if code is None else ExitStatus(code)
    except (OSError, ValueError, AttributeError):
        return Outcome(run, ExitStatus.INTERNAL, f"the job left no {path} that can be read")
    if written == earlier and status != ExitStatus.DONE:
        return Outcome(run, ExitStatus.INTERNAL, f"the job did not come to write {path} anew")
    if status is None:
        return Outcome(run, ExitStatus.INTERNAL, "it still runs, or its job was ended")
    return Outcome(run, status, error)


def _status_file(run: SweptRun) -> Path:
    assert run.config.run_name is not None
    return Path(run.config.output_root).expanduser() / run.config.run_name / "status.json"


def status_of(outcomes: Sequence[Outcome]) -> ExitStatus:
    """Give the exit status of the whole: a request to stop, else the first failure's, else DONE."""
    failed = [outcome.status for outcome in outcomes if outcome.status != ExitStatus.DONE]
    stops = [status for status in failed if status in STOPS]
    return next(iter(stops + failed), ExitStatus.DONE)


def _describe(run: SweptRun) -> str:
    return " ".join(f"{key}={value}" for key, value in run.swept.items())
