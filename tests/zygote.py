"""A process that has imported everything once and forks into the command line for each request.

Importing torch and transformers takes five seconds of every command, and the tests give dozens.
Run as a script: reads a JSON request a line, answers with the exit status a line.
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
        request = {"arguments": arguments, "cwd": str(cwd), "out": str(out), "err": str(err)}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())

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
        child = os.fork()
        if child == 0:
            _child(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
