"""Stopping on request: SIGTERM, SIGINT, or a time limit."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from cs336_alignment.errors import ExitStatus

REPEAT_SECONDS = 2.0


class StopRequest:
    """Remembers a request to stop; the trainer reads it between steps and saves before it leaves.

    A second signal, two seconds later or more, leaves at once: launchers and schedulers send the
    first one twice. Use as a context manager: the handlers last as long as it does.

    Args:
        max_hours: stop by itself after this long, None: never.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._status: ExitStatus | None = None
        self._received = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._status is not None:
            if now - self._received > REPEAT_SECONDS:
                os._exit(128 + number)
            return
        self._received = now
        self._status = ExitStatus.INTERRUPTED if number == signal.SIGINT else ExitStatus.STOPPED

    @property
    def status(self) -> ExitStatus | None:
        """The exit status to leave with, or None to go on."""
        if (
            self._status is None
            and self._deadline is not None
            and time.monotonic() > self._deadline
        ):
            self._status = ExitStatus.STOPPED
        return self._status
