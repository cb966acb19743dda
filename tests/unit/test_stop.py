"""A first signal is remembered, a second one ends the process, and the handlers do not stay."""

from __future__ import annotations

import os
import signal

import pytest

from cs336_alignment.errors import ExitStatus
from cs336_alignment.training import stop as module
from cs336_alignment.training.stop import StopRequest


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, ExitStatus.STOPPED), (signal.SIGINT, ExitStatus.INTERRUPTED)],
)
def test_a_signal_is_remembered(number: signal.Signals, status: ExitStatus) -> None:
    with StopRequest() as stop:
        assert stop.status is None
        os.kill(os.getpid(), number)
        assert stop.status == status
        assert stop.status == status  # still


def test_the_handlers_are_those_of_before_afterwards() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(RuntimeError), StopRequest():
        assert [signal.getsignal(number) for number in numbers] != before
        raise RuntimeError
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(
    first: signal.Signals, second: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    child = os.fork()
    if child == 0:
        try:
            with StopRequest():
                os.kill(os.getpid(), first)
                now += 60.0
                os.kill(os.getpid(), second)
        finally:
            os._exit(99)  # the second signal did not end it
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + second


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
        os.kill(os.getpid(), signal.SIGINT)
        now += 3601
        assert stop.status == ExitStatus.INTERRUPTED
