"""A process that has imported everything once and forks into the command line for each request.

Importing torch and transformers takes five seconds of every command, and the tests give dozens.
Run as a module: reads a JSON request a line; `start` is answered with a process id, `wait` for one
of these with its exit status, negative if a signal ended it.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import gc
import importlib
import io
import json
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STREAMS = ("stdout", "stderr")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def when(moment: Callable[[], bool], process_id: int) -> bool:
    """Wait for a moment in the life of a process; False if it ended before."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if moment():
            return True
        if not os.path.exists(f"/proc/{process_id}/stat") or is_zombie(process_id):
            return False
        time.sleep(0.001)
    raise AssertionError("the moment did not come")


def is_zombie(process_id: int) -> bool:
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def metrics_hold(run: Path, step: int) -> Callable[[], bool]:
    """Give what tells whether a run has logged a step."""
    path = run / "metrics.jsonl"
    return lambda: path.is_file() and f'"step": {step}, '.encode() in path.read_bytes()


class Zygote:
    """The other end, in the tests: commands in, `subprocess.CompletedProcess` out."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._process = self._begin()

    def _begin(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"], env=self._environment, text=True, cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(
        self,
        arguments: list[str],
        cwd: Path,
        scratch: Path,
        count: int = 1,
        environment: dict[str, str] | None = None,
    ) -> Any:
        """Run `cs336-sft` with these arguments in this folder, in so many processes as torchrun
        starts them; scratch takes what they print. A Python file in place of the verb is run as a
        script. The result has the first status that is not 0.
        """
        started = self.start_all(arguments, cwd, scratch, count, environment)
        codes = [self.wait(process_id) for process_id in started]
        out, err = (
            "".join((scratch / f"{name}{index or ''}").read_text() for index in range(count))
            for name in STREAMS
        )
        return subprocess.CompletedProcess(
            arguments, next((code for code in codes if code), 0), out, err
        )

    def start(
        self,
        arguments: list[str],
        cwd: Path,
        scratch: Path,
        index: int = 0,
        environment: dict[str, str] | None = None,
    ) -> int:
        """Start `cs336-sft`; returns its process id. What it prints goes to `stdout` and `stderr`
        in the scratch folder, with its index behind the name but for the first.
        """
        out, err = (str(scratch / f"{name}{index or ''}") for name in STREAMS)
        return self._ask({
            "arguments": arguments, "cwd": str(cwd), "out": out, "err": err,
            "environment": environment or {},
        })  # fmt: skip

    def start_all(
        self,
        arguments: list[str],
        cwd: Path,
        scratch: Path,
        count: int,
        environment: dict[str, str] | None = None,
    ) -> list[int]:
        """Start it in several processes that find each other; returns their process ids."""
        given = environment or {}
        if count == 1:
            return [self.start(arguments, cwd, scratch, 0, given)]
        port = free_port()
        return [
            self.start(arguments, cwd, scratch, index, {
                **given, "RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            })
            for index in range(count)
        ]  # fmt: skip

    def wait(self, process_id: int) -> int:
        """Wait for a process that was started; returns its exit status."""
        return self._ask({"wait": process_id})

    def _ask(self, request: dict[str, Any]) -> int:
        if self._process.poll() is not None:
            self._process = self._begin()
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())
        except BaseException:  # a test's time is over: no answer of this one is taken for another's
            self._process.kill()  # its children end with it
            self._process.wait()
            raise

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


def _child(request: dict[str, Any]) -> None:
    from cs336_alignment import cli

    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    for path, descriptor in ((request["out"], 1), (request["err"], 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    code = 70
    try:
        if (arguments := request["arguments"]) and arguments[0].endswith(".py"):
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
            code = 0
        else:
            cli.main(arguments)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


IMPORTED = (
    "cs336_alignment.evaluation.run", "cs336_alignment.training.run", "peft",
    "transformers.generation.utils", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip


def read_presets_once() -> None:
    """Let Hydra parse the files of `configs`, and its own, once: it parses them twice a command."""
    from hydra.core.plugins import Plugins
    from hydra.plugins.config_source import ConfigSource

    for source in Plugins.instance().discover(ConfigSource):  # type: ignore[type-abstract]
        if source.scheme() in ("file", "pkg"):
            source.load_config = _once(source.load_config)  # type: ignore[method-assign]


def _once(load: Callable[..., Any]) -> Callable[..., Any]:
    kept: dict[tuple[str, str], Any] = {}

    def load_config(source: Any, config_path: str) -> Any:
        if source.scheme() == "file" and not source.path.startswith(str(ROOT / "configs")):
            return load(source, config_path)
        key = (source.path, config_path)
        if key not in kept:
            kept[key] = load(source, config_path)
        return copy.deepcopy(kept[key])

    return load_config


def _warm_up() -> None:
    """Do once what every command would do again: import, parse Hydra's grammar and files, draw."""
    for name in IMPORTED:
        importlib.import_module(name)
    read_presets_once()
    import matplotlib.pyplot
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from cs336_alignment import cli

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        cli.run(["train", "--cfg", "job", "run_name=none", "data.train_path=none"])
    get_checkpoint_conversion_mapping("llama")  # keeps its table
    matplotlib.use("Agg")
    matplotlib.pyplot.figure().savefig(io.BytesIO())
    matplotlib.pyplot.close()
    gc.collect()
    gc.freeze()  # a child's collections need not look at what was here before


def _serve() -> None:
    _warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        elif (answer := os.fork()) == 0:
            _child(request)
        print(answer, flush=True)


if __name__ == "__main__":
    _serve()
