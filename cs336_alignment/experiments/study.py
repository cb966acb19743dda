"""Optuna, and only here: what to try next, what to give up, what came of it, kept in a file.

What a trial is given follows from the sweep's seed, the trial's number and the trials before it, so
that a sweep which was killed goes on as it would have.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cs336_alignment.data.batching import mix_seed
from cs336_alignment.errors import UserError
from cs336_alignment.experiments.search_space import Choice, Range, to_text

FILE = "study.db"
NAME = "sweep"
SAMPLER_STREAM = 13  # of the seeds mixed from the run's
ERROR = "error"  # attribute of a trial
RANKED_FROM = 4  # trials, below which no importance can be told


@dataclass(frozen=True)
class Trial:
    """A trial as it stands.

    Attributes:
        number: from 0.
        values: key → value as typed.
        state: `running`, `complete`, `pruned` or `fail`.
        value: of the metric, where it is complete.
        error: why it failed.
    """

    number: int
    values: dict[str, str]
    state: str
    value: float | None
    error: str | None


class Study:
    """The trials of a sweep.

    Args:
        folder: of the sweep; the trials are in a file there.
        space: what is tried.
        maximize: whether a greater metric is better.
        seed: of the sweep.

    Raises:
        UserError: Optuna is not installed (78), or the file cannot be read (74).
    """

    def __init__(
        self, folder: Path, space: Sequence[Range | Choice], *, maximize: bool, seed: int
    ) -> None:
        try:
            import optuna
        except ImportError as failure:
            raise UserError(
                "C146",
                "cs336-sft sweep needs Optuna",
                hint="pip install 'optuna>=4.5,<5'",
            ) from failure
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._space = list(space)
        self._seed = seed
        self._path = folder / FILE
        try:
            self._storage = optuna.storages.RDBStorage(f"sqlite:///{self._path.resolve()}")
            self._study: Any = optuna.create_study(
                storage=self._storage, study_name=NAME, load_if_exists=True,
                direction="maximize" if maximize else "minimize",
                pruner=optuna.pruners.MedianPruner(n_startup_trials=3),
            )  # fmt: skip
        except Exception as failure:  # SQLAlchemy's, of many kinds
            raise UserError(
                "R204",
                f"cannot read {self._path}: {str(failure).splitlines()[0]}",
                hint="restore it from a copy, or start anew with another run_name=…",
            ) from failure

    @property
    def trials(self) -> list[Trial]:
        """All trials, in order."""
        return [
            Trial(
                found.number,
                {key: _text(value) for key, value in found.params.items()},
                found.state.name.lower(),
                found.value if found.state.name == "COMPLETE" else None,
                found.user_attrs.get(ERROR),
            )
            for found in self._study.get_trials(deepcopy=False)
        ]

    def begin(self, number: int) -> dict[str, str]:
        """Begin the trial of this number, or go on with it; returns its values as typed."""
        known = self._study.get_trials(deepcopy=False)
        if number == len(known):
            self._study.ask()
        trial = self._trial(number)
        values = {}
        for index, part in enumerate(self._space):
            # For each value a sampler of its own, so that a kill between two changes none.
            seed = mix_seed(self._seed, SAMPLER_STREAM, number, index) % 2**32
            self._study.sampler = self._optuna.samplers.TPESampler(seed=seed)
            if isinstance(part, Choice):
                values[part.key] = trial.suggest_categorical(part.key, part.choices)
            elif part.whole:
                step = int(part.step or 1)
                values[part.key] = to_text(
                    trial.suggest_int(
                        part.key, int(part.low), int(part.high), log=part.log, step=step
                    )
                )
            else:
                values[part.key] = to_text(
                    trial.suggest_float(part.key, part.low, part.high, log=part.log, step=part.step)
                )
        return values

    def report(self, number: int, step: int, value: float) -> None:
        """Note the metric of a running trial; what is noted already stays."""
        trial = self._trial(number)
        if step not in self._study.trials[number].intermediate_values:
            trial.report(value, step)

    def should_prune(self, number: int) -> bool:
        """Tell whether a running trial is worse than the median of the others at its last step."""
        known = self._study.trials[number].intermediate_values
        return bool(known) and bool(self._trial(number).should_prune())

    def complete(self, number: int, value: float) -> None:
        """End a trial with its metric."""
        self._study.tell(number, value)

    def prune(self, number: int) -> None:
        """End a trial that is given up."""
        self._study.tell(number, state=self._optuna.trial.TrialState.PRUNED)

    def fail(self, number: int, error: str) -> None:
        """End a trial that failed."""
        self._trial(number).set_user_attr(ERROR, error)
        self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)

    def forget(self) -> None:
        """Remove the trials, of which none came to anything."""
        self._storage.remove_session()
        self._path.unlink(missing_ok=True)

    def importances(self) -> dict[str, float]:
        """Give the share of each key in how much the metric varies; {} where too few trials or
        values are known.
        """
        complete = [trial for trial in self.trials if trial.state == "complete"]
        if len(complete) < RANKED_FROM or len({trial.value for trial in complete}) < 2:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the evaluator calls itself experimental
            evaluator = self._optuna.importance.PedAnovaImportanceEvaluator()
            found = self._optuna.importance.get_param_importances(self._study, evaluator=evaluator)
        return {str(key): float(share) for key, share in found.items()}

    def _trial(self, number: int) -> Any:
        found = self._study.get_trials(deepcopy=False)[number]
        return self._optuna.trial.Trial(self._study, found._trial_id)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else to_text(value)
