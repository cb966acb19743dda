"""A user's own reward function, in a process that can be killed and is started again after it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from cs336_alignment.errors import UserError

START_SECONDS = 120.0  # to import the function's module
CLOSE_SECONDS = 1.0
MOST_BYTES = 2**20  # of what it gives for one response
_PROGRAM = Path(__file__).with_name("reward_child.py")


class RewardFailure(Exception):
    """A response could not be graded; the message says what happened."""


class CustomReward:
    """Calls `package.module:function` in a process of its own, which `close` ends.

    Any process that calls it, a forked one too, has a process of its own for it. It starts with
    the first response.

    Args:
        path: import path; a module may lie in the working directory.
        seconds: for one response, by the clock on the wall.

    Attributes:
        source: the file of the function's module, and its sha256.

    Raises:
        UserError: the function cannot be imported (78).
    """

    def __init__(self, path: str, seconds: float) -> None:
        self.path = path
        self._seconds = seconds
        self._child: _Child | None = None
        try:
            self.source = _Child(path, seconds).close()
        except RewardFailure as failure:
            raise UserError(
                "C142",
                f"evaluation.reward={path} cannot be imported: {failure}",
                expected="package.module:function, of a package that is installed or a module in "
                f"{Path.cwd()}",
            ) from failure

    def __call__(self, response: str, ground_truth: str) -> Any:
        """Grade a response.

        Raises:
            RewardFailure: the function raised, took too long or died.
        """
        child = self._child
        if child is None or child.owner != os.getpid():
            child = self._child = _Child(self.path, self._seconds)
        try:
            question = {"response": response, "ground_truth": ground_truth}
            answer = child.ask(question, self._seconds, "it took longer than")
        except BaseException:
            self._child = None
            child.kill()
            raise
        if "error" in answer:
            raise RewardFailure(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """End the process, if there is one; a later call starts another."""
        child, self._child = self._child, None
        if child is not None and child.owner == os.getpid():
            child.close()


class _Child:
    """One process that has imported the function.

    Raises:
        RewardFailure: it could not.
    """

    def __init__(self, path: str, seconds: float) -> None:
        self.owner = os.getpid()
        self._unread = b""
        # -P: the folder of the program would shadow modules of the standard library. A session of
        # its own: Ctrl-C is for the run, and whatever the function starts is killed with it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)], bufsize=0, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._finalizer = weakref.finalize(self, _end, self._process, self.owner)
        os.set_blocking(self._stdin.fileno(), False)
        setup = {
            "function": path, "seconds": seconds, "parent": self.owner,
            "sys_path": [os.getcwd(), *(entry or os.getcwd() for entry in sys.path)],
        }  # fmt: skip
        try:
            answer = self.ask(setup, START_SECONDS, "its module took longer to import than")
            if "error" in answer:
                raise RewardFailure(answer["error"])
        except BaseException:
            self.kill()
            raise
        self._source: dict[str, Any] = answer["source"]

    def ask(self, question: dict[str, Any], seconds: float, slow: str) -> dict[str, Any]:
        """Send a line and wait for one.

        Raises:
            RewardFailure: none came in time, or the process died.
        """
        unsent = memoryview(json.dumps(question).encode() + b"\n")
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        poll.register(self._stdin, select.POLLOUT)
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0:
                raise RewardFailure(f"{slow} {seconds:g} seconds")
            ready = dict(poll.poll(1000 * left))
            if self._stdin.fileno() in ready:
                with suppress(BrokenPipeError, BlockingIOError):
                    unsent = unsent[os.write(self._stdin.fileno(), unsent[:65536]) :]
                if not unsent or ready[self._stdin.fileno()] & select.POLLERR:
                    poll.unregister(self._stdin)
                    unsent = unsent[:0]
            if self._stdout.fileno() in ready:
                part = os.read(self._stdout.fileno(), 65536)
                if not part:
                    raise RewardFailure(self._death())
                self._unread += part
                if len(self._unread) > MOST_BYTES:
                    raise RewardFailure(f"what it gives is larger than {MOST_BYTES:,} bytes")
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _death(self) -> str:
        """Say how the process ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        code = self._process.returncode
        if code is None:
            return "it closed what it answers through"
        if code < 0:
            return f"its process was ended by signal {-code} ({signal.strsignal(-code)})"
        return f"its process ended with status {code}"

    def kill(self) -> None:
        """End the process now, with all that it started."""
        self._finalizer()

    def close(self) -> dict[str, Any]:
        """Let the process end by itself, else kill it; returns what the function's file was."""
        self._stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        self.kill()
        return self._source


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a fork has a copy of the handle, not the child
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(CLOSE_SECONDS)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
