"""A watchdog: a process that stands still writes down where, even if it holds Python's lock."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

STACKS = "stacks-process-{}.txt"


class Watchdog:
    """Expects a `beat` every so often; use as a context manager.

    The stacks of all threads go to a file, written by a thread that needs nothing of Python; a line
    that points there is printed if Python still runs at all. Processes that wait for a hung one
    stand still too, so each tells its own place. Nothing is ended: a slow disk may recover, and the
    process group has a time limit of its own.

    Args:
        folder: of the run.
        process_index: in the file's name.
        minutes: without a beat; None: never watch.
        warn: prints a line.
    """

    def __init__(
        self, folder: Path, process_index: int, minutes: float | None, warn: Callable[[str], None]
    ) -> None:
        self._path = folder / STACKS.format(process_index)
        self._seconds = 60 * (minutes or 0)
        self._warn = warn
        self._file: IO[str] | None = None
        self._last = 0.0
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._file = self._path.open("a", encoding="utf-8")  # an earlier hang's stacks stay
            self.beat()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is None:
            return
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        empty = not os.fstat(self._file.fileno()).st_size
        self._file.close()
        self._file = None
        if empty:
            self._path.unlink(missing_ok=True)

    def beat(self) -> None:
        """Say that the work goes on."""
        if self._file is not None:
            self._last = time.monotonic()
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=self._file)

    def _watch(self) -> None:
        told = 0.0
        while not self._over.wait(self._seconds / 8):
            if time.monotonic() - self._last > self._seconds and told != self._last:
                told = self._last  # once for each time it stands still
                self._warn(
                    f"no progress for {self._seconds / 60:g} minutes; where each process stands is "
                    f"in {self._path.with_name(STACKS.format('*'))}"
                )
