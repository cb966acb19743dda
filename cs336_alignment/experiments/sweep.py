"""`cs336-sft sweep`: a search over keys, each trial a run of its own that stops and resumes."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cs336_alignment.compose import run_with_config
from cs336_alignment.config import Config
from cs336_alignment.errors import ExitStatus, UserError, UserErrors
from cs336_alignment.experiments.results import read_result
from cs336_alignment.experiments.search_space import Choice, Range, read_space, to_text
from cs336_alignment.experiments.study import FILE, Study
from cs336_alignment.experiments.sweep_summary import show_sweep
from cs336_alignment.experiments.trial_process import TrialEnd, run_trial
from cs336_alignment.metric_names import GENERATED, greater_is_better, nearest_metric
from cs336_alignment.tracking.console import Console
from cs336_alignment.training.earlier_config import refuse_changes
from cs336_alignment.training.parallel import launched_processes
from cs336_alignment.training.report import resume_command
from cs336_alignment.training.run import NO_TIME
from cs336_alignment.training.run_folder import CONFIG, MANIFEST, STATUS, RunFolder
from cs336_alignment.training.status import StatusFile
from cs336_alignment.training.stop import StopNow

VERB = "sweep"
SINGLE = "hydra.mode=RUN"  # whatever a preset says for `train`
# Errors of the command or its surroundings: the first trial has them, and every other would.
COMMON = (
    ExitStatus.BAD_DATA, ExitStatus.NOT_FOUND, ExitStatus.CANNOT_CREATE, ExitStatus.BAD_CONFIG,
)  # fmt: skip
STOPS = (ExitStatus.STOPPED, ExitStatus.INTERRUPTED)
FREE = frozenset({
    "run_name", "output_root", "sweep.num_trials", "data.num_workers", "data.cache_dir",
    "trainer.async_save", "trainer.max_hours", "trainer.save_total_limit",
    "trainer.watchdog_minutes",
})  # fmt: skip
FREE_SECTIONS = ("logger.", "inspect.", "expert_iteration.")


def sweep(config: Config, arguments: Sequence[str]) -> ExitStatus:
    """Search, or go on searching, in `<output_root>/<run_name>/`.

    Args:
        config: checked; its `sweep` section says what is tried.
        arguments: as typed after the verb.

    Returns:
        DONE, even if some trials failed; or STOPPED or INTERRUPTED after a request to stop.

    Raises:
        UserError: the space or the metric is wrong, the first trial's config is (78), or no trial
            came to its end (70).
    """
    begin = time.monotonic()
    space = read_space(config.sweep.space)
    maximize = _direction(config)
    fixed = fixed_arguments(arguments, config)
    _check_values(fixed, space)
    if launched_processes() > 1:
        raise UserError(
            "C113",
            "a sweep works in one process, and the launcher started several",
            hint="start it without a launcher: each trial is a process of its own",
        )
    folder, console = RunFolder(config), Console()
    folder.claim("a sweep")
    status = StatusFile(folder.path / STATUS, resume_command(arguments, VERB), enabled=True)
    try:
        with status.covering():
            if (folder.path / FILE).is_file() and (folder.path / CONFIG).is_file():
                refuse_changes(folder.path / CONFIG, config, _may_change, "a sweep")
            folder.write_config(config)
            study = Study(folder.path, space, maximize=maximize, seed=config.seed)
            status.running()
            search = _Search(config, fixed, folder.path, study, console, status, begin)
            outcome = search.to_the_end()
            if outcome == ExitStatus.DONE:
                typed = [*fixed, *(word for word in arguments if word.startswith("output_root="))]
                show_sweep(folder.path, study, config.sweep.metric, maximize, typed, console)
                _refuse_nothing(study)
            if outcome in (ExitStatus.DONE, *STOPS):
                status.ended(outcome)
    except StopNow as request:
        console.note(f"stopped; the trials are in {folder.path}: the same command goes on")
        return request.status
    return outcome


@dataclass
class _Search:
    config: Config
    fixed: Sequence[str]
    folder: Path
    study: Study
    console: Console
    status: StatusFile
    begin: float

    def to_the_end(self) -> ExitStatus:
        """Take the trials one after another; one that an earlier command left goes on."""
        count = self.config.sweep.num_trials
        first = None
        for number in range(count):
            known = self.study.trials
            if number < len(known) and known[number].state != "running":
                continue
            first = number if first is None else first
            values = self.study.begin(number)
            name = f"trial-{number:03d}"
            shown = "  ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in values.items())
            self.console.note(f"[{number + 1}/{count}] {name}  {shown}")
            if self.config.sweep.prune and self.study.should_prune(number):  # but was killed
                self._told(number, TrialEnd(ExitStatus.STOPPED, True, None))
                continue
            words = [f"{key}={value}" for key, value in values.items()]
            place = [f"output_root={to_text(str(self.folder))}", f"run_name={name}", SINGLE]
            if (left := self._hours_left()) is not None:
                if left <= 0:
                    self.console.note("  the time is over: the same command goes on with it")
                    return ExitStatus.STOPPED
                place.append(f"trainer.max_hours={left}")
            end = run_trial(
                [*self.fixed, *words, *place], self.folder / name, self.folder / f"{name}.log",
                self.config.sweep.metric, partial(self._is_hopeless, number),
            )  # fmt: skip
            if end.status in STOPS and not end.pruned:  # trainer.max_hours, or a signal of its own
                self.console.note(f"  {name} stopped: the same command goes on with it")
                return ExitStatus(end.status)
            no_time = (end.error or "").startswith(f"error[{NO_TIME}]")
            if no_time and number != first:
                self.console.note(f"  no time for {name}: the same command goes on with it")
                return ExitStatus.STOPPED
            if no_time or (number == 0 and end.status in COMMON):
                if number == 0:
                    self.study.forget()
                error = end.error or f"see {self.folder / f'{name}.log'}"
                print(error, file=sys.stderr, flush=True)
                self.status.ended(ExitStatus(end.status), error)
                return ExitStatus(end.status)
            self._told(number, end)
            self.status.running(number + 1)
        return ExitStatus.DONE

    def _hours_left(self) -> float | None:
        """Give what is left of `trainer.max_hours`, which is the whole sweep's."""
        hours = self.config.trainer.max_hours
        return None if hours is None else hours - (time.monotonic() - self.begin) / 3600

    def _is_hopeless(self, number: int, step: int, value: float) -> bool:
        # At the last step it would depend on whether the request comes before the trial is over.
        if step >= _last_step(self.folder / f"trial-{number:03d}"):
            return False
        self.study.report(number, step, value)
        return self.config.sweep.prune and self.study.should_prune(number)

    def _told(self, number: int, end: TrialEnd) -> None:
        """Note how a trial ended, and say it."""
        metric, name = self.config.sweep.metric, f"trial-{number:03d}"
        if end.pruned:
            self.study.prune(number)
            self.console.note("  ended early: worse than the median of the others")
            return
        if end.status != ExitStatus.DONE:
            error = end.error or f"exit status {end.status}: see {self.folder / f'{name}.log'}"
            self.study.fail(number, error)
            self.console.warn(f"{name} failed: {error.splitlines()[0]}")
            return
        metrics = read_result(self.folder / name).metrics()
        if metric not in metrics:
            near = nearest_metric(metric, tuple(metrics))
            error = f"{metric} is not in its metrics.jsonl" + (f": {near} is" if near else "")
            self.study.fail(number, error)
            self.console.warn(f"{name} failed: {error}")
            return
        self.study.complete(number, metrics[metric])
        self.console.note(f"  {metric} {metrics[metric]:.4f}")


def _last_step(trial: Path) -> float:
    """Give the step where a trial ends; infinity while it has not written that down."""
    try:
        return int(json.loads((trial / MANIFEST).read_text(encoding="utf-8"))["total_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf


def fixed_arguments(arguments: Sequence[str], config: Config) -> list[str]:
    """Give what is typed for every trial: the command's own words but for those of the sweep.

    Args:
        arguments: as typed after the verb.
        config: of the command.

    Example:
        >>> fixed_arguments(["experiment=quickstart", "sweep.num_trials=3"], Config())
        ['experiment=quickstart']
    """
    own = ("sweep.", "sweep=", "run_name=", "output_root=", "++sweep.", "+sweep.")
    fixed = [word for word in arguments if not word.startswith(own)]
    if config.logger.backend == "wandb" and config.logger.group is None and config.run_name:
        fixed.append(f"logger.group={config.run_name}")
    return fixed


def _check_values(fixed: Sequence[str], space: Sequence[Range | Choice]) -> None:
    """Compose with the ends of every range and with every choice, before anything is trained."""
    errors: dict[str, UserError] = {}
    for part in space:
        for value in part.extremes:
            try:
                words = [*fixed, f"{part.key}={value}", SINGLE]
                run_with_config("train", words, lambda _: ExitStatus.DONE)
            except UserError as error:
                for one in error.errors if isinstance(error, UserErrors) else [error]:
                    errors.setdefault(str(one), one)
    if errors:
        found = list(errors.values())
        raise found[0] if len(found) == 1 else UserErrors(found)


def _direction(config: Config) -> bool:
    """Whether a greater metric is better, once it is clear that trials will have one."""
    metric, options = config.sweep.metric, config.sweep
    near = nearest_metric(metric)
    better = options.greater_is_better
    if better is None:
        better = greater_is_better(metric)
    if better is None:
        raise UserError(
            "C133",
            f"sweep.metric={metric} does not say by its name whether greater is better",
            hint="sweep.greater_is_better=true or false"
            + (f"; or did you mean {near}?" if near else ""),
        )
    lacking = None
    has_data = config.data.eval_path is not None or config.data.eval_fraction
    if metric.startswith("eval/") and not has_data:
        lacking = "there is no evaluation data: data.eval_path=…, or sweep.metric=train/loss"
    if metric in GENERATED and config.evaluation.generation_steps is None:
        lacking = "nothing is generated: evaluation.generation_steps=0, say"
    if lacking is not None:
        raise UserError("C143", f"no trial would have a {metric}", hint=lacking)
    return better


def _may_change(key: str) -> bool:
    return key in FREE or key.startswith(FREE_SECTIONS)


def _refuse_nothing(study: Study) -> None:
    trials = study.trials
    if not any(trial.state == "complete" for trial in trials):
        raise UserError(
            "R323",
            f"none of {len(trials)} trials came to its end",
            got=(trials[0].error or "").splitlines()[0] if trials else None,
            hint="try one of them by hand with cs336-sft train",
        )
