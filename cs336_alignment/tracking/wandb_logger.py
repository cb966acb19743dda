"""wandb as a view of the run: nothing that happens to it, or in it, stops the run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

INIT_SECONDS = 20.0
FINISH_SECONDS = 30.0
FAMILIES = ("train", "eval", "perf")


class Logger(Protocol):
    """Takes metrics beside the run's own files."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""

    def log_table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log rows as a table."""

    def log_histogram(self, name: str, step: int, values: Sequence[float]) -> None:
        """Log how some values are spread."""

    def log_image(self, name: str, path: Path) -> None:
        """Log a picture."""

    def finish(self, exit_code: int) -> None:
        """End the run there."""


class NullLogger:
    """A logger that does nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def log_table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing."""

    def log_histogram(self, name: str, step: int, values: Sequence[float]) -> None:
        """Do nothing."""

    def log_image(self, name: str, path: Path) -> None:
        """Do nothing."""

    def finish(self, exit_code: int) -> None:
        """Do nothing."""


class WandbLogger:
    """Logs to wandb; offline without a login or when the server does not answer.

    Args:
        project: in wandb.
        entity: in wandb; None: the user's default.
        group: in wandb.
        run_name: shown in wandb.
        run_id: kept by the run folder, so that a continued run continues there too.
        folder: of the run; files go to its `wandb/`.
        config: logged as it is; it must hold no secrets.
        note: prints a line.
        warn: prints a warning.
    """

    def __init__(
        self,
        *,
        project: str,
        entity: str | None,
        group: str | None,
        run_name: str,
        run_id: str,
        folder: Path,
        config: Mapping[str, Any],
        note: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._note = note
        self._folder = folder
        self._run: Any = None
        options = {
            "project": project,
            "entity": entity,
            "group": group,
            "name": run_name,
            "id": run_id,
            "resume": "allow",
            "dir": str(folder),
            "config": dict(config),
            "save_code": False,
        }
        try:
            import wandb
        except ImportError:
            warn("wandb is not installed; the run is in metrics.jsonl (or type logger=none)")
            return
        self._wandb = wandb
        for retry in (False, True):
            try:
                self._run = self._start(options, retry=retry)
                break
            except (Exception, SystemExit) as failure:  # wandb's teardown may call sys.exit
                if retry:
                    warn(f"wandb cannot start ({_reason(failure)}); the run goes on without it")
                    return
                warn(f"wandb cannot start ({_reason(failure)}); it logs offline to {folder}/wandb")
        if self._run.url:
            note(f"wandb: {self._run.url}")

    def _start(self, options: dict[str, Any], *, retry: bool) -> Any:
        if retry:
            # wandb's service still holds the run id of the start that failed and would refuse it.
            self._wandb.teardown()
        # For the process and first of all: the settings of a run do not silence wandb's own lines
        # about logins.
        setup = self._wandb.setup(settings=self._wandb.Settings(silent=True))
        mode: Any = "offline" if retry else setup.settings.mode
        if mode == "online" and not _logged_in(self._wandb):
            mode = "offline"
            place = f"{self._folder}/wandb"
            self._note(f"wandb: no login, so it logs offline to {place} (`wandb sync` uploads)")
        settings = self._wandb.Settings(
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,  # it holds the command line
        )
        run = self._wandb.init(mode=mode, settings=settings, **options)
        # wandb's own counter only rises, and would drop the steps that a resumed run repeats.
        run.define_metric("step")
        for family in FAMILIES:
            run.define_metric(f"{family}/*", step_metric="step")
        return run

    def _guarded(
        self, what: str, call: Callable[[], Any], then: str = "the run goes on without it"
    ) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as failure:
            self._run = None
            self._warn(f"wandb failed to {what} ({_reason(failure)}); {then}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self._guarded("log", lambda: self._run.log({"step": step, **metrics}))

    def log_table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log rows as a table."""
        if not rows:
            return
        columns = list(dict.fromkeys(name for row in rows for name in row))

        def call() -> None:
            table = self._wandb.Table(
                columns=columns, data=[[row.get(c) for c in columns] for row in rows],
                allow_mixed_types=True,  # what a reward of a user's own gives beside its numbers
            )  # fmt: skip
            self._run.log({"step": step, name: table})

        self._guarded("log a table", call)

    def log_histogram(self, name: str, step: int, values: Sequence[float]) -> None:
        """Log how some values are spread; wandb takes finite ones alone."""
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            self._guarded(
                "log a histogram",
                lambda: self._run.log({"step": step, name: self._wandb.Histogram(finite)}),
            )

    def log_image(self, name: str, path: Path) -> None:
        """Log a picture."""
        self._guarded("log a picture", lambda: self._run.log({name: self._wandb.Image(str(path))}))

    def finish(self, exit_code: int) -> None:
        """End the run there, in at most half a minute."""
        self._guarded(
            "finish",
            lambda: self._run.finish(exit_code=exit_code),
            then=f"`wandb sync` uploads what is left in {self._folder}/wandb",
        )


def _logged_in(wandb: Any) -> bool:
    """Whether wandb finds a key in the environment, its settings or netrc; asks nobody."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)  # releases before `prompt`; later ones warn about `api`


def _reason(failure: BaseException) -> str:
    lines = str(failure).strip().splitlines()
    return lines[0] if lines else type(failure).__name__
