"""A first signal is remembered, a second one ends the process, and the handlers do not stay."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path

import pytest

from cs336_alignment.errors import ExitStatus
from cs336_alignment.training import stop as module
from cs336_alignment.training.stop import StopNow, StopRequest


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, ExitStatus.STOPPED), (signal.SIGINT, ExitStatus.INTERRUPTED)],
)
def test_a_signal_is_remembered(number: signal.Signals, status: ExitStatus) -> None:
    with StopRequest() as stop:
        stop.wait_for_steps()
        assert stop.status is None
        os.kill(os.getpid(), number)
        assert stop.status == status
        assert stop.status == status  # still


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, ExitStatus.STOPPED), (signal.SIGINT, ExitStatus.INTERRUPTED)],
)
def test_a_signal_before_the_first_step_stops_on_the_spot(
    number: signal.Signals, status: ExitStatus
) -> None:
    with pytest.raises(StopNow) as stopped, StopRequest():
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert stopped.value.status == status


def test_the_handlers_are_those_of_before_afterwards() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(RuntimeError), StopRequest():
        assert [signal.getsignal(number) for number in numbers] != before
        raise RuntimeError
    assert [signal.getsignal(number) for number in numbers] == before


def signal_until_it_ends(child: int, first: signal.Signals, second: signal.Signals) -> int:
    """Send a signal and then another one, again where the machine was too busy to part them;
    returns how the process ended.
    """
    os.kill(child, first)
    while True:
        time.sleep(0.3)
        os.kill(child, second)
        time.sleep(0.3)
        ended, code = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(code)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("busy", ["between instructions", "within one"])
def test_a_second_signal_ends_the_process_at_once(
    first: signal.Signals, second: signal.Signals, busy: str, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "REPEAT_SECONDS", 0.1)
    told, ready = tmp_path / "told", tmp_path / "ready"
    want = 130 if first == signal.SIGINT else 75
    child = os.fork()
    if child == 0:
        try:
            with StopRequest(on_leave=lambda status: told.write_text(str(int(status)))) as stop:
                stop.wait_for_steps()
                ready.touch()
                if busy == "within one":  # as long as a backward pass can be: no handler runs
                    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**27)
                else:
                    while True:
                        time.sleep(0.01)
        finally:
            os._exit(99)  # the second signal did not end it
    while not ready.exists():
        time.sleep(0.01)
    assert signal_until_it_ends(child, first, second) == want
    assert told.read_text() == str(want)


def test_a_child_keeps_its_signals_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPEAT_SECONDS", 0.1)
    left: list[int] = []
    monkeypatch.setattr(module.os, "_exit", left.append)
    with StopRequest() as stop:
        stop.wait_for_steps()
        children = []
        for _ in range(2):
            if (child := os.fork()) == 0:
                signal.pause()
                os.kill(os.getpid(), signal.SIGKILL)
            children.append(child)
        time.sleep(0.1)
        for child in children:
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)
            time.sleep(0.2)
        assert stop.status is None and not left


def test_the_time_limit_is_a_request_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    stop, endless = StopRequest(max_hours=0.5), StopRequest()
    now += 1799
    assert stop.status is None
    now += 2
    assert stop.status == ExitStatus.STOPPED
    now += 1e9
    assert endless.status is None


def test_a_signal_before_the_time_limit_keeps_its_own_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with StopRequest(max_hours=1.0) as stop:
        stop.wait_for_steps()
        os.kill(os.getpid(), signal.SIGINT)
        now += 3601
        assert stop.status == ExitStatus.INTERRUPTED


def test_a_second_signal_leaves_even_if_nothing_can_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "REPEAT_SECONDS", 0.1)
    ready = tmp_path / "ready"

    def full(_: ExitStatus) -> None:
        raise OSError("No space left on device")

    child = os.fork()
    if child == 0:
        try:
            with StopRequest(on_leave=full) as stop:
                stop.wait_for_steps()
                ready.touch()
                while True:
                    time.sleep(0.01)
        finally:
            os._exit(99)
    while not ready.exists():
        time.sleep(0.01)
    assert signal_until_it_ends(child, signal.SIGTERM, signal.SIGTERM) == ExitStatus.STOPPED
