"""`status.json` is true from the first look into the folder to the end, and always whole."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.training.status import StatusFile
from cs336_alignment.training.stop import StopNow

COMMAND = "cs336-sft train run_name=r"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "status.json"


def start(path: Path, *, enabled: bool = True) -> StatusFile:
    return StatusFile(path, COMMAND, enabled=enabled)


def content(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_the_life_of_a_run(path: Path) -> None:
    status = start(path)
    status.running()
    want = {
        "state": "running", "step": 0, "exit_code": None, "error": None,
        "resume_command": COMMAND, "reload_check": None,
    }  # fmt: skip
    assert content(path) == want
    status.running(10)
    assert content(path) == want | {"step": 10}
    status.ended(ExitStatus.STOPPED)
    assert content(path) == want | {"step": 10, "state": "preempted", "exit_code": 75}
    again = start(path)
    again.running()
    assert content(path) == want | {"step": 10}
    again.running(20)
    again.ended(ExitStatus.DONE)
    assert content(path) == want | {"step": 20, "state": "completed", "exit_code": 0}


def test_other_processes_write_nothing(path: Path) -> None:
    status = start(path, enabled=False)
    with pytest.raises(UserError), status.covering():
        status.running(3)
        raise UserError("R001", "trouble")
    assert not path.exists()


@pytest.mark.parametrize(
    ("failure", "state", "code", "text"),
    [
        (UserError("D301", "nothing left"), "failed", 65, "error[D301]"),
        (StopNow(ExitStatus.STOPPED), "preempted", 75, None),
        (StopNow(ExitStatus.INTERRUPTED), "preempted", 130, None),
        (ZeroDivisionError("division"), "failed", 70, "ZeroDivisionError: division"),
        (OSError(28, "No space left on device"), "failed", 74, "error[R209]"),
    ],
)
@pytest.mark.parametrize("began", [False, True])
def test_whatever_ends_it_is_written_down_and_raised_on(
    failure: BaseException, state: str, code: int, text: str | None, began: bool, path: Path
) -> None:
    start(path).running(7)
    status = start(path)
    raised = UserError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(raised), status.covering():
        if began:
            status.running(8)
        raise failure
    found = content(path)
    assert (found["state"], found["step"], found["exit_code"]) == (state, 8 if began else 7, code)
    assert found["error"] is None if text is None else found["error"].startswith(text)


@pytest.mark.parametrize("outcome", [ExitStatus.DONE, ExitStatus.STOPPED])
@pytest.mark.parametrize("code", ["C301", "C302", "C303", "C304", "R103"])
def test_a_command_that_does_not_go_with_the_run_leaves_it_alone(
    code: str, outcome: ExitStatus, path: Path
) -> None:
    first = start(path)
    first.running(7)
    first.ended(outcome)
    before = path.read_bytes()
    second = start(path)
    with pytest.raises(UserError), second.covering():
        if code == "C303":
            second.running()
        raise UserError(code, "another config")
    assert path.read_bytes() == before


def test_it_is_always_whole_for_a_reader(path: Path) -> None:
    status, done, seen = start(path), threading.Event(), set()
    status.running()

    def read() -> None:
        while not done.is_set():
            seen.add(len(content(path)["error"] or ""))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for size in range(100):
            status.ended(ExitStatus.INTERNAL, "x" * 500 * size)
    finally:
        done.set()
        reader.join()
    assert len(seen) > 1
    assert content(path)["error"] == "x" * 500 * 99
    assert [p.name for p in path.parent.iterdir()] == ["status.json"]


def test_one_that_cannot_be_replaced_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = start(path)
    status.running()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            status.ended(ExitStatus.DONE)
    assert content(path)["state"] == "running"
    assert [p.name for p in path.parent.iterdir()] == ["status.json"]


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", '"completed"'])
def test_an_unreadable_one_counts_as_none(path: Path, text: str) -> None:
    path.write_text(text)
    assert start(path).read() == {}
