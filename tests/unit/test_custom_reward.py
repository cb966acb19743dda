"""A user's reward function may do its worst: the process that calls it goes on, and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cs336_alignment.errors import UserError
from cs336_alignment.evaluation.custom_reward import CustomReward
from cs336_alignment.evaluation.grading import close_reward, grade

FUNCTIONS = """
import ctypes, math, os, re, subprocess, sys, time
import numpy

SCORE = {"reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0}

def good(response, ground_truth):
    print("printed")
    return {**SCORE, "answer_reward": response == ground_truth, "pid": os.getpid(), "said": sys.stdin.read()}

def numbers(response, ground_truth):
    return {**SCORE, "reward": numpy.float32(0.25), "steps": numpy.int64(3)}

def forever(response, ground_truth):
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            pass

def loop_in_c(response, ground_truth): return sum(iter(int, 1))
def regex(response, ground_truth): return re.match(r"(a+)+$", "a" * 60 + "b")
def leaves(response, ground_truth): os._exit(3)
def exits(response, ground_truth): sys.exit("over")
def faults(response, ground_truth): ctypes.string_at(0)
def raises(response, ground_truth): raise KeyError("steps\\nmore")
def not_finite(response, ground_truth): return {**SCORE, "reward": math.nan}
def nothing(response, ground_truth): pass
def unwritable(response, ground_truth): return {**SCORE, "more": object()}
def huge(response, ground_truth): return {**SCORE, "more": "x" * 2**21}
def size(response, ground_truth): return {**SCORE, "reward": len(response)}

def sometimes(response, ground_truth):
    return forever(response, ground_truth) if response == "hang" else {**SCORE, "pid": os.getpid()}

def starts_another(response, ground_truth):
    child = subprocess.Popen(["sleep", "600"])
    open("another", "w").write(str(child.pid))
    return forever(response, ground_truth)

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # others come and go
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid():
                assert (
                    state != "Z" and b"reward_child" not in (stat.parent / "cmdline").read_bytes()
                )


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until_gone(process: int) -> bool:
    deadline = time.monotonic() + 20
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(process)


def test_a_function_is_called_as_it_is(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reward = CustomReward("mine:good", 30)
    assert Path(reward.source["file"]) == folder / "mine.py" and len(reward.source["sha256"]) == 64
    first, second = (grade(reward, "7", "7") for _ in range(2))
    assert first["answer_reward"] == 1.0 and first["said"] == "" and first == second
    assert first["pid"] != os.getpid()
    assert grade(reward, "7\ud800\n", "7")["answer_reward"] == 0.0
    captured = capfd.readouterr()
    assert "printed" in captured.err and not captured.out
    close_reward(reward)
    assert not is_alive(first["pid"])
    assert grade(reward, "7", "7")["pid"] != first["pid"]  # it starts again
    close_reward(reward)
    close_reward(reward)


def test_numbers_of_other_libraries_and_large_responses(folder: Path) -> None:
    reward = CustomReward("mine:numbers", 30)
    assert grade(reward, "", "") == {
        "reward": 0.25, "format_reward": 1.0, "answer_reward": 1.0, "steps": 3,
    }  # fmt: skip
    reward.close()
    reward = CustomReward("mine:size", 30)
    assert grade(reward, "x" * 3_000_000, "")["reward"] == 3_000_000
    reward.close()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("forever", "longer than 0.4 seconds"), ("loop_in_c", "longer than 0.4 seconds"),
        ("regex", "longer than 0.4 seconds"), ("leaves", "ended with status 3"),
        ("exits", "raised SystemExit: over"), ("faults", "signal 11"), ("raises", "raised KeyError"),
        ("not_finite", "no finite number"), ("nothing", "not a dict"), ("unwritable", "as JSON"),
        ("huge", "larger than 1,048,576 bytes"),
    ],
)  # fmt: skip
def test_whatever_it_does_is_survived(folder: Path, name: str, says: str) -> None:
    reward = CustomReward(f"mine:{name}", 0.4)
    for _ in range(2):  # the second time in a process that was started again
        row = grade(reward, "r", "t")
        assert says in row.pop("reward_error")
        assert row == {"reward": 0.0, "format_reward": 0.0, "answer_reward": 0.0}
    reward.close()


def test_one_that_hangs_costs_its_own_response_alone(folder: Path) -> None:
    reward = CustomReward("mine:sometimes", 0.5)
    rows = [grade(reward, text, "t") for text in ("a", "hang", "b", "c")]
    assert [row["reward"] for row in rows] == [1.0, 0.0, 1.0, 1.0]
    assert rows[2]["pid"] == rows[3]["pid"] != rows[0]["pid"]
    assert not is_alive(rows[0]["pid"])
    reward.close()


def test_what_it_starts_is_ended_with_it(folder: Path) -> None:
    reward = CustomReward("mine:starts_another", 1.0)
    assert "reward_error" in grade(reward, "r", "t")
    assert wait_until_gone(int(Path("another").read_text()))


def test_a_fork_has_a_process_of_its_own(folder: Path) -> None:
    """As under a zygote, and where a worker is forked while responses are graded."""
    reward = CustomReward("mine:sometimes", 30)
    mine = grade(reward, "a", "t")["pid"]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            theirs = [grade(reward, "a", "t")["pid"] for _ in range(2)]
            reward.close()
            os.write(writing, json.dumps(theirs).encode())
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    first, second = json.loads(os.read(reading, 1000))
    assert first == second != mine and not is_alive(first)
    assert grade(reward, "a", "t")["pid"] == mine
    reward.close()
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("end", ["exit", "SIGKILL", "SIGKILL in a call"])
def test_it_ends_with_the_process_that_started_it(folder: Path, end: str) -> None:
    script = folder / "run.py"
    script.write_text(
        "import os, sys, time\n"
        "from cs336_alignment.evaluation.custom_reward import CustomReward\n"
        "reward = CustomReward('mine:sometimes', 600)\n"
        "print(reward('a', 't')['pid'], flush=True)\n"
        "if sys.argv[1] == 'exit': sys.exit()\n"  # nobody closes it
        "reward('hang', 't') if 'call' in sys.argv[1] else time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script), end], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    if end != "exit":
        time.sleep(0.3)
        assert is_alive(child)
        process.send_signal(signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    assert wait_until_gone(child)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("nowhere:score", "No module named 'nowhere'"), ("mine:nothing_here", "no attribute"),
        ("mine:number", "no function"), ("broken:score", "SyntaxError"), ("leaving:score", "status 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_told_at_once(folder: Path, path: str, says: str) -> None:
    (folder / "broken.py").write_text("def score(:\n")
    (folder / "leaving.py").write_text("import os\nos._exit(0)\n")
    with pytest.raises(UserError) as caught:
        CustomReward(path, 10)
    assert (
        caught.value.code == "C142"
        and says in str(caught.value)
        and str(folder) in str(caught.value)
    )
