"""Stopping on request: SIGTERM, SIGINT, a closed terminal, or a time limit."""

from __future__ import annotations

import math
import os
import signal
import threading
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
    leaves at once: launchers and schedulers send the first one twice. Use as a context manager, in
    the main thread: the handlers last as long as it does, and the time limit counts from its
    making.

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
        self._deadline = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours
        self._on_leave = on_leave
        self._tell = tell
        self._waits = False
        self._status: ExitStatus | None = None
        self.out_of_time = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # `nohup` means it
            self._before[number] = signal.signal(number, self._on_signal)
        # Python calls its handlers between two of its own instructions. Within a long one, a
        # backward pass, they wait, and two signals of a kind become one: so they are counted where
        # they arrive.
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._earlier_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._earlier_writer)
        os.close(self._writer)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def wait_for_steps(self) -> None:
        """From here on there is something to save: requests wait until the trainer reads them."""
        self._waits = True

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._status is None:
            self._status = _status_after(number)
            if not self._waits:
                raise StopNow(self._status)

    def _watch(self, reader: int) -> None:
        """Answer the first signal with a line and end the process at a second one."""
        first: tuple[float, ExitStatus] | None = None
        with open(reader, "rb", buffering=0) as arrivals:
            while numbers := arrivals.read(64):
                now = time.monotonic()
                for number in numbers:
                    if number not in self._before:
                        continue
                    if first is None:
                        first = now, _status_after(number)
                        if self._tell and self._waits:
                            os.write(2, TOLD)
                    elif now - first[0] > REPEAT_SECONDS:
                        try:
                            self._on_leave(first[1])
                        finally:  # a full disk must not keep it here
                            os._exit(first[1])

    @property
    def status(self) -> ExitStatus | None:
        """The exit status to leave with, or None to go on."""
        if self._status is None and time.monotonic() > self._deadline:
            self._status = ExitStatus.STOPPED
            self.out_of_time = True
        return self._status


def _status_after(number: int) -> ExitStatus:
    return ExitStatus.INTERRUPTED if number == signal.SIGINT else ExitStatus.STOPPED


# A signal to a forked child is none to its parent, whose pipe it would write into.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
