"""Stopping on request: SIGTERM, SIGINT, a closed terminal, or a time limit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from cs336_alignment.errors import ExitStatus
from cs336_alignment.orphans import end_with

REPEAT_SECONDS = 2.0
TOLD = b"\nstopping: what is trained is saved first; once more to leave at once\n"


def end_with_launcher() -> None:
    """Ask the system to kill this process when the launcher that started it dies.

    torchrun starts its workers in sessions of their own. If it is killed, they would stay, wait for
    each other and hold the run's lock, and the same command could not go on. Linux alone can do it.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    if not end_with(parent) or parent == 1:  # it died before
        os._exit(ExitStatus.STOPPED)


class StopNow(BaseException):
    """Raised where a request comes while nothing need be saved, or in an evaluation.

    Attributes:
        status: the exit status to leave with.
    """

    def __init__(self, status: ExitStatus) -> None:
        super().__init__(status.name)
        self.status = status


class StopRequest:
    """Turns signals and a time limit into one answer that the trainer reads between steps.

    Until `wait_for_steps` is called a signal raises `StopNow` on the spot; from then on it is
    remembered, and the trainer saves before it leaves. A second signal, two seconds later or more,
    leaves at once: launchers and schedulers send the first one twice. Use as a context manager: the
    handlers last as long as it does, and the time limit counts from its making.

    Args:
        max_hours: stop by itself after this long, None: never.
        on_leave: called with the exit status just before a second signal ends the process.
        tell: whether the first signal is answered with a line on standard error.
    """

    def __init__(
        self,
        max_hours: float | None = None,
        *,
        on_leave: Callable[[ExitStatus], None] = lambda _: None,
        tell: bool = False,
    ) -> None:
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._on_leave = on_leave
        self._tell = tell
        self._waits = False
        self._status: ExitStatus | None = None
        self.out_of_time = False
        self._received = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # `nohup` means it
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def wait_for_steps(self) -> None:
        """From here on there is something to save: requests wait until the trainer reads them."""
        self._waits = True

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._status is not None:
            if now - self._received > REPEAT_SECONDS:
                try:
                    self._on_leave(self._status)
                finally:  # a full disk must not keep it here
                    os._exit(self._status)
            return
        self._received = now
        self._status = ExitStatus.INTERRUPTED if number == signal.SIGINT else ExitStatus.STOPPED
        if not self._waits:
            raise StopNow(self._status)
        if self._tell:
            os.write(2, TOLD)  # print may be what the signal interrupted, and is not reentrant

    @property
    def status(self) -> ExitStatus | None:
        """The exit status to leave with, or None to go on."""
        if (
            self._status is None
            and self._deadline is not None
            and time.monotonic() > self._deadline
        ):
            self._status = ExitStatus.STOPPED
            self.out_of_time = True
        return self._status
