"""T19, T21, T31 and what else surrounds a run: folders, changed options, secrets, hangs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cs336_alignment.training.watchdog import Watchdog
from tests.conftest import ROOT, TINY, Sft, clean_environment
from tests.faults.tally import Tally

SECRETS = {
    "HF_TOKEN": "hf_" + "CANARY" * 5, "WANDB_API_KEY": "c0ffee" * 6 + "beef",
    "MY_PASSWORD": "correct-horse-battery",
}  # fmt: skip


def holding(folder: Path, words: list[bytes]) -> list[str]:
    return [
        f"{path}: {word!r}"
        for path in folder.rglob("*") if path.is_file()
        for word in words if word in path.read_bytes()
    ]  # fmt: skip


@pytest.mark.fault("T31 a secret in the environment or in the config")
def test_secrets_are_in_no_file_and_on_no_screen(
    sft: Sft, rows: Path, tmp_path: Path, tally: Tally
) -> None:
    words = [value.encode() for value in SECRETS.values()]
    command = ["train", *TINY, "logger=wandb", f"data.train_path={rows}", "trainer.max_steps=2"]
    environment = {**SECRETS, "WANDB_MODE": "offline"}
    done = sft(*command, "run_name=r", env=environment)
    with tally.point("environment"):
        assert done.returncode == 0, done.stderr
        assert list((tmp_path / "outputs/r/wandb").rglob("*.wandb"))
        assert not holding(tmp_path / "outputs", words)
        assert not any(word.decode() in done.stdout + done.stderr for word in words)
    for override in (
        "model.revision=${oc.env:HF_TOKEN}", f"logger.group={SECRETS['MY_PASSWORD']}",
        "logger.group=ghp_" + "a1" * 18, "data.eval_path=https://me:secretly@host/rows.jsonl",
    ):  # fmt: skip
        with tally.point(override.split("=")[0]):
            done = sft(*command, "run_name=s", override, env=environment)
            assert done.returncode == 78, done.stderr
            assert f"error[C116]: {override.split('=')[0]} holds a secret" in done.stderr
            value = override.split("=")[1]
            assert value not in done.stdout + done.stderr
            assert not (tmp_path / "outputs/s").exists()
            assert not any(word.decode() in done.stdout + done.stderr for word in words)


HANG = """
import sys, threading, time
from pathlib import Path
from cs336_alignment.training.watchdog import Watchdog

def stuck_here(seconds):
    if sys.argv[2] == "holding":  # Python's lock, as a hung library may
        import ctypes
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    else:
        time.sleep(seconds)

warned = []
with Watchdog(Path(sys.argv[1]), 3, 0.5 / 60, warned.append) as watchdog:
    for _ in range(4):
        time.sleep(0.2)
        watchdog.beat()
    assert not warned
    stuck_here(1.6)
print(warned)
"""


@pytest.mark.parametrize("how", ["waiting", "holding"])
@pytest.mark.fault("F16 a process that hangs says where")
def test_a_process_that_hangs_writes_down_where(how: str, tmp_path: Path, tally: Tally) -> None:
    with tally.point(how):
        done = subprocess.run(
            [sys.executable, "-c", HANG, str(tmp_path), how], text=True, capture_output=True,
            timeout=60, env={**clean_environment(), "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        stacks = (tmp_path / "stacks-process-3.txt").read_text()
        assert "in stuck_here" in stacks
        if how == "waiting":
            assert "no progress for" in done.stdout and "stacks-process-*.txt" in done.stdout


def test_stacks_of_an_earlier_hang_stay_and_a_deleted_file_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "stacks-process-0.txt"
    path.write_text("an earlier hang")
    with Watchdog(tmp_path, 0, 1.0, print):
        pass
    assert path.read_text() == "an earlier hang"
    path.unlink()
    with Watchdog(tmp_path, 0, 1.0, print):
        path.unlink()
    assert not path.exists()


@pytest.mark.fault("F16 a process that hangs says where")
def test_a_run_that_goes_on_leaves_no_stacks(
    sft: Sft, rows: Path, tmp_path: Path, tally: Tally
) -> None:
    with tally.point("a run"):
        done = sft("train", *TINY, f"data.train_path={rows}", "trainer.max_steps=2", "run_name=r")
        assert done.returncode == 0, done.stderr
        assert not list((tmp_path / "outputs/r").glob("stacks*"))


@pytest.mark.fault("T19 an output folder that cannot be used")
def test_output_folders(sft: Sft, rows: Path, tmp_path: Path, tally: Tally) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/link").symlink_to(tmp_path / "elsewhere")
    command = ["train", *TINY, f"data.train_path={rows}", "trainer.max_steps=1"]
    for override, status in {
        "output_root=file": 73, "output_root=/proc/nowhere": 73, "run_name=link": 73,
        "run_name=../escaped": 78, "run_name=a/b": 78,
        "output_root='with spaces and ümläute'": 0, "output_root=not/yet/there": 0,
    }.items():  # fmt: skip
        with tally.point(override):
            done = sft(*command, *(["run_name=r"] if "run_name" not in override else []), override)
            assert done.returncode == status, done.stderr
            assert "Traceback" not in done.stderr
            if status == 73:
                assert "loading" not in done.stdout  # before a model is loaded
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not (tmp_path / "escaped").exists()


@pytest.mark.slow
@pytest.mark.fault("T26 few examples, or numbers that do not divide")
def test_numbers_that_do_not_divide(sft: Sft, tmp_path: Path, tally: Tally) -> None:
    for count, batch, steps in ((1, 4, 1), (3, 4, 1), (5, 4, 2), (9, 4, 3), (4, 4, 1)):
        path = tmp_path / f"{count}.jsonl"
        path.write_text(
            "".join(
                json.dumps({"prompt": f"{i}", "response": "x " * i + "y"}) + "\n"
                for i in range(count)
            )
        )
        with tally.point(f"{count} examples, {batch} a step"):
            done = sft("train", *TINY, f"data.train_path={path}", f"run_name=n{count}",
                       f"trainer.global_batch_size={batch}", "trainer.num_train_epochs=1")  # fmt: skip
            assert done.returncode == 0, done.stderr
            rows = [
                json.loads(line)
                for line in (tmp_path / f"outputs/n{count}/metrics.jsonl").read_text().splitlines()
            ]
            assert len([row for row in rows if "train/loss" in row]) == steps
