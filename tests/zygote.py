"""A process that has imported everything once and forks into the command line for each request.

Importing torch and transformers takes five seconds of every command, and the tests give dozens.
Run as a script: reads a JSON request a line; `start` is answered with a process id, `wait` for one
of these with its exit status, negative if a signal ended it.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any


class Zygote:
    """The other end, in the tests: commands in, `subprocess.CompletedProcess` out."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, arguments: list[str], cwd: Path, scratch: Path) -> Any:
        """Run `cs336-sft` with these arguments in this folder; scratch takes what it prints."""
        out, err = scratch / "stdout", scratch / "stderr"
        code = self.wait(self.start(arguments, cwd, scratch))
        return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())

    def start(self, arguments: list[str], cwd: Path, scratch: Path) -> int:
        """Start `cs336-sft`; returns its process id. What it prints goes to `stdout` and `stderr`
        in the scratch folder.
        """
        out, err = str(scratch / "stdout"), str(scratch / "stderr")
        return self._ask({"arguments": arguments, "cwd": str(cwd), "out": out, "err": err})

    def wait(self, process_id: int) -> int:
        """Wait for a process that was started; returns its exit status."""
        return self._ask({"wait": process_id})

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


def _child(request: dict[str, Any]) -> None:
    from cs336_alignment import cli

    os.chdir(request["cwd"])
    for path, descriptor in ((request["out"], 1), (request["err"], 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    code = 70
    try:
        cli.main(request["arguments"])
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    import cs336_alignment.evaluation.run
    import cs336_alignment.training.run  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif (answer := os.fork()) == 0:
            _child(request)
        print(answer, flush=True)


if __name__ == "__main__":
    _serve()
