"""`status.json`: how a run stands or ended, since launchers flatten exit statuses to 1."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.files import write_json
from cs336_alignment.training.stop import StopNow

# Errors that say: this command does not go with the run that the folder holds.
REFUSALS = frozenset({"C301", "C302", "C303", "C304", "R103"})


class StatusFile:
    """Keeps `status.json` true from the first look into the folder to the end: `state` (`running`,
    `completed`, `preempted`, which can be resumed, or `failed`), `step` (that a checkpoint holds),
    `exit_code` and `error` (null while the run goes on), `resume_command`, and `reload_check` (the
    outcome of loading the export again; null where none was made).

    Args:
        path: of the file.
        resume_command: what continues this run.
        enabled: False on all but the main process; every method then does nothing.

    Attributes:
        reload_check: goes into the file from the next writing on.
        has_ended: whether this process wrote down an end; not where a command was refused.
    """

    def __init__(self, path: Path, resume_command: str, *, enabled: bool) -> None:
        self.command = resume_command
        self._path = path
        self._enabled = enabled
        self._step = int(self.read().get("step", 0))
        self.reload_check: str | None = None
        self.has_ended = False

    def read(self) -> dict[str, Any]:
        """Read the file; {} if there is none."""
        try:
            return dict(json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def running(self, step: int | None = None) -> None:
        """The run goes on, with this step saved; None: the step that an earlier part left."""
        self._step = self._step if step is None else step
        self._write("running", None, None)

    def ended(self, status: ExitStatus, error: str | None = None) -> None:
        """The run is over, or stopped, or failed."""
        state = {
            ExitStatus.DONE: "completed",
            ExitStatus.STOPPED: "preempted",
            ExitStatus.INTERRUPTED: "preempted",
        }.get(status, "failed")
        self._write(state, status, error)
        self.has_ended = self._enabled

    def _write(self, state: str, status: ExitStatus | None, error: str | None) -> None:
        if self._enabled:
            write_json(self._path, {
                "state": state, "step": self._step, "exit_code": status, "error": error,
                "resume_command": self.command, "reload_check": self.reload_check,
            })  # fmt: skip

    @contextmanager
    def covering(self) -> Iterator[None]:
        """Write down whatever raises in this block, and raise it on; a system's refusal to write
        becomes a UserError (74).

        A command that is refused because the folder holds a run that it cannot continue leaves that
        run's file as it was.
        """
        before = self.read()
        try:
            yield
        except StopNow as stop:
            self._failed(stop.status)
            raise
        except UserError as error:
            if error.code in REFUSALS and before and self._enabled:
                write_json(self._path, before)
            else:
                self._failed(error.status, str(error))
            raise
        except OSError as failure:
            refused = UserError(
                "R209",
                f"cannot write to {self._path.parent}: {failure.strerror or failure}",
                hint="make room and run the same command again",
            )
            self._failed(refused.status, str(refused))
            raise refused from failure
        except BaseException as failure:
            self._failed(ExitStatus.INTERNAL, f"{type(failure).__name__}: {failure}")
            raise

    def _failed(self, status: ExitStatus, error: str | None = None) -> None:
        with suppress(OSError):  # the disk may be what failed
            self.ended(status, error)
