"""wandb holds the run when it works, and costs a warning, never the run, when it does not."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cs336_alignment.tracking import wandb_logger as module
from cs336_alignment.tracking.wandb_logger import WandbLogger

ROOT = Path(__file__).resolve().parents[2]
CANARY = "hf_CANARYcanaryCANARYcanary"
KEY = "0123456789abcdef0123456789abcdef01234567"

# A run in a process of its own, as wandb's service, hooks and exit handlers belong to a process.
PROGRAM = """
import sys, urllib.request
from pathlib import Path
from cs336_alignment.tracking import wandb_logger as module
module.INIT_SECONDS, module.FINISH_SECONDS = 3.0, 2.0
logger = module.WandbLogger(
    project="p", entity=None, group="g", run_name="name", run_id="id7", folder=Path("run"),
    config={"trainer": {"seed": 7}}, note=lambda text: print("note", text),
    warn=lambda text: print("warn", text),
)
for step, loss in ((1, 1.0), (2, 0.5), (3, 1 / 3), (2, 0.5), (3, 0.1)):
    logger.log(step, {"train/loss": loss, "eval/loss": 2.0})
if sys.argv[1].startswith("http"):
    urllib.request.urlopen(sys.argv[1])  # ends the server
    logger.log(4, {"train/loss": 0.1})
else:
    rows = [{"prompt": "a", "reward": 1.0, "why": 7}, {"prompt": "b", "why": {"x": [1, "y"]}}]
    logger.log_table("eval/generations", 3, [*rows, {"prompt": "c", "why": "none"}])
    logger.log_histogram("eval/response_lengths", 3, [1, 2, 2, 9, float("nan")])
    logger.log_histogram("eval/response_entropies", 3, [float("nan")])
logger.finish(0)
print("the end")
"""


def run_program(
    folder: Path, argument: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run PROGRAM without the wandb settings and logins of whoever runs the tests."""
    (folder / "run").mkdir()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and k != "NETRC"}
    clean |= {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, argument], cwd=folder, env=clean | environment,
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def read_offline_run(folder: Path) -> dict[str, Any]:
    """Read what a run wrote for `wandb sync`: records of protobuf in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, position, parts = path.read_bytes(), 7, b""
    run: dict[str, Any] = {"config": {}, "axes": {}, "history": [], "types": set()}
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:  # a block ends in padding where no header fits
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind not in (1, 4):  # neither a whole record nor the last part of one
            continue
        record = wandb_internal_pb2.Record()
        record.ParseFromString(parts)
        parts = b""
        run["types"].add(record.WhichOneof("record_type"))
        if record.HasField("run"):
            run["id"], run["group"] = record.run.run_id, record.run.run_group
            run["config"] |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
            run["git"] = record.run.HasField("git")
        if record.HasField("metric"):
            run["axes"][record.metric.glob_name or record.metric.name] = record.metric.step_metric
        if record.HasField("history"):
            row: dict[str, Any] = {}
            for item in record.history.item:
                name, *inner = item.nested_key
                value = json.loads(item.value_json)
                row[name] = row.get(name, {}) | {inner[0]: value} if inner else value
            run["history"].append(row)
    return run


def assert_offline_run_is_whole(folder: Path) -> None:
    run = read_offline_run(folder)
    assert (run["id"], run["group"], run["git"]) == ("id7", "g", False)
    assert run["config"]["trainer"] == {"seed": 7}
    assert run["axes"] == {"step": "", "train/*": "step", "eval/*": "step", "perf/*": "step"}
    logged = [(row["step"], row["train/loss"]) for row in run["history"] if "train/loss" in row]
    assert logged == [(1, 1.0), (2, 0.5), (3, 1 / 3), (2, 0.5), (3, 0.1)]  # replayed steps too
    assert any("eval/generations" in row for row in run["history"])
    (lengths,) = [row for row in run["history"] if "eval/response_lengths" in row]
    histogram = lengths["eval/response_lengths"]
    assert lengths["step"] == 3 and histogram["_type"] == "histogram"
    assert sum(histogram["values"]) == 4
    assert (histogram["bins"][0], histogram["bins"][-1]) == (1, 9)
    assert not any("eval/response_entropies" in row for row in run["history"])
    assert "exit" in run["types"]


@pytest.mark.fault("T18 wandb without login, network or package")
def test_without_a_login_everything_is_kept_offline(tmp_path: Path) -> None:
    done = run_program(tmp_path, CANARY)
    assert done.returncode == 0, done.stderr
    note, end = done.stdout.splitlines()
    assert note.startswith("note wandb: no login, so it logs offline to run/wandb")
    assert end == "the end"
    assert done.stderr == ""  # wandb itself says nothing
    assert_offline_run_is_whole(tmp_path / "run")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    # The command line is not wandb's business: people put tokens there.
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


@pytest.mark.fault("T18 wandb without login, network or package")
def test_an_unreachable_server_costs_a_warning(tmp_path: Path) -> None:
    assert module.INIT_SECONDS <= 20
    begin = time.monotonic()
    done = run_program(tmp_path, "", WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=KEY)
    assert time.monotonic() - begin < 30
    assert done.returncode == 0, done.stderr
    warning, end = done.stdout.splitlines()
    assert warning.startswith("warn wandb cannot start (")
    assert warning.endswith("it logs offline to run/wandb")
    assert end == "the end"
    assert done.stderr == ""
    assert_offline_run_is_whole(tmp_path / "run")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


class _Server(BaseHTTPRequestHandler):
    """Answers just enough for a run to start online; any GET ends it."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._reply({})
        threading.Thread(target=self.server.shutdown).start()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        project = {"id": "1", "name": "p", "entity": {"id": "2", "name": "e"}}
        bucket = {"id": "3", "name": "id7", "displayName": "name", "config": "{}",
                  "project": project, "historyLineCount": 0}  # fmt: skip
        if b"UpsertBucket" in body:
            self._reply({"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}})
        else:
            self._reply({"data": {"model": project | {"bucket": None}}})

    def _reply(self, answer: dict[str, Any]) -> None:
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(text)


@pytest.mark.fault("T18 wandb without login, network or package")
def test_a_server_that_goes_away_delays_the_end_by_its_time_limit_only(tmp_path: Path) -> None:
    assert module.FINISH_SECONDS <= 30
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    server.daemon_threads = True
    address = f"http://127.0.0.1:{server.server_port}"

    def serve() -> None:
        server.serve_forever(poll_interval=0.05)
        server.server_close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        done = run_program(tmp_path, address, WANDB_BASE_URL=address, WANDB_API_KEY=KEY)
    finally:
        server.shutdown()
        thread.join()
    assert done.returncode == 0, done.stderr
    note, warning, end = done.stdout.splitlines()
    assert note == f"note wandb: {address}/e/p/runs/id7"
    assert warning.startswith("warn wandb failed to finish (")
    assert warning.endswith("`wandb sync` uploads what is left in run/wandb")
    assert end == "the end"


class _Stub:
    """Stands for the wandb module and its run; the calls named fail."""

    url = None

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.calls: list[str] = []
        self.options: list[dict[str, Any]] = []
        self.Table = self.Image = self.Histogram = lambda *args, **options: None

    def Settings(self, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(**options)

    def setup(self, settings: Any) -> SimpleNamespace:
        self._call("setup")
        return SimpleNamespace(settings=SimpleNamespace(mode="online"))

    def login(self, prompt: bool, verify: bool) -> bool:
        self._call("login")
        return True

    def init(self, **options: Any) -> _Stub:
        self.options.append(options)
        self._call("init")
        return self

    def teardown(self) -> None:
        self.calls.append("teardown")
        if "teardown" in self.failing:
            raise SystemExit(1)

    def define_metric(self, name: str, **options: Any) -> None:
        self._call("define_metric")

    def log(self, row: dict[str, Any]) -> None:
        self._call("log")

    def finish(self, exit_code: int) -> None:
        self._call("finish")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise OSError(f"{name} is broken\nsecond line")


def use(stub: _Stub | None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Log a short run with a stub in wandb's place (None: not installed); return the warnings."""
    monkeypatch.setitem(sys.modules, "wandb", stub)
    warnings: list[str] = []
    logger = WandbLogger(
        project="p", entity=None, group=None, run_name="n", run_id="i", folder=Path("f"),
        config={}, note=lambda text: None, warn=warnings.append,
    )  # fmt: skip
    for step in (1, 2):
        logger.log(step, {"train/loss": 1.0})
    logger.log_table("t", 2, [{"a": 1}])
    logger.log_histogram("h", 2, [1.0, 2.0])
    logger.log_image("loss", Path("loss.png"))
    logger.finish(0)
    return warnings


@pytest.mark.parametrize("call", ["log", "finish"])
@pytest.mark.fault("T18 wandb without login, network or package")
def test_a_call_that_fails_warns_once_and_ends_the_logging(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = _Stub(call)
    (warning,) = use(stub, monkeypatch)
    assert warning.startswith(f"wandb failed to {call} ({call} is broken); ")
    assert stub.calls.count(call) == 1
    assert stub.calls[-1] == call


@pytest.mark.parametrize("failing", [("setup",), ("login", "init"), ("define_metric",),
                                     ("init", "teardown")])  # fmt: skip
@pytest.mark.fault("T18 wandb without login, network or package")
def test_a_start_that_fails_twice_leaves_the_run_without_wandb(
    failing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = _Stub(*failing)
    offline, without = use(stub, monkeypatch)
    assert offline == f"wandb cannot start ({failing[0]} is broken); it logs offline to f/wandb"
    assert without.endswith("; the run goes on without it")
    assert "log" not in stub.calls


def test_the_second_start_is_offline_and_after_a_teardown(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = _Stub()
    first = [True]
    original = stub.init

    def init(**options: Any) -> _Stub:
        run = original(**options)
        if first:
            first.clear()
            raise TimeoutError
        return run

    stub.init = init  # type: ignore[method-assign]
    (warning,) = use(stub, monkeypatch)
    assert warning.startswith("wandb cannot start (TimeoutError); ")
    assert [options["mode"] for options in stub.options] == ["online", "offline"]
    assert stub.options[0]["id"] == stub.options[1]["id"] == "i"
    assert stub.calls.index("teardown") < len(stub.calls) - 1 - stub.calls[::-1].index("init")
    assert stub.calls.count("finish") == 1


@pytest.mark.fault("T31 a secret in the environment or in the config")
def test_nothing_but_metrics_is_uploaded(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = _Stub()
    assert use(stub, monkeypatch) == []
    (options,) = stub.options
    settings = options["settings"]
    assert options["save_code"] is False
    assert settings.console == "off"
    assert settings.disable_git and settings.disable_code and settings.x_disable_meta
    assert (settings.init_timeout, settings.finish_timeout) == (20, 30)


def test_an_interrupt_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = _Stub()

    def interrupted(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    stub.log = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        use(stub, monkeypatch)


@pytest.mark.fault("T18 wandb without login, network or package")
def test_without_wandb_installed_there_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    (warning,) = use(None, monkeypatch)
    assert "not installed" in warning


def test_importing_the_module_does_not_import_wandb() -> None:
    code = "import sys, cs336_alignment.tracking.wandb_logger; sys.exit('wandb' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
