"""Launches that cannot be meant are named, on two processes that are told they are two nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from cs336_alignment.config import ParallelConfig
from cs336_alignment.errors import UserError
from cs336_alignment.training.launch_check import (
    meet,
    naming_lost_processes,
    refuse_lone_and_surplus_processes,
)
from tests.conftest import ROOT, TINY, clean_environment, free_port

pytestmark = pytest.mark.distributed
CONFIGS = ROOT / "configs/accelerate"


def start(index: int, port: str, words: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start one process of two, alone on its node."""
    node = {"RANK": str(index), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *words], cwd=folder, env={**clean_environment(), **node}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def both(of_first: list[str], of_second: list[str], folder: Path) -> list[tuple[int, str]]:
    """Run two processes; gives the status of each and what it said."""
    port = free_port()
    started = [start(i, port, words, folder) for i, words in enumerate((of_first, of_second))]
    said = ["".join(process.communicate(timeout=100)) for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def test_processes_that_do_not_belong_together_are_told_apart(tmp_path: Path) -> None:
    words = [str(ROOT / "tests/distributed/worker_launch.py"), str(tmp_path / "told")]
    ended = both(words, words, tmp_path)
    assert [status for status, _ in ended] == [0, 1], ended
    main, other = (json.loads((tmp_path / f"told{index}").read_text()) for index in (0, 1))
    lost, left = main.pop("lost"), main.pop("left")
    assert main == other, "all processes are told the same"
    assert main.pop("same") == main.pop("other_cache") == "" and left == []
    wanted = {
        "other_config": ("C212", "node-a: optimizer.learning_rate=2e-05", "1 on node-b: optimizer.learning_rate=0.5", "78"),
        "other_data": ("C213", "node-a: training data=ffff", "node-b: training data=eeee", "78"),
        "other_versions": ("C213", f"torch={torch.__version__}", "node-b: ", "torch=0.0.1", "78"),
        "other_folder": ("R107", "process 0 on node-a", "nothing for process 1 on node-b", "73"),
        "batch": ("C214", "at least 2", "78"),
        "uneven": ("3 examples", "do not divide by 2"),
    }  # fmt: skip
    assert main.keys() == wanted.keys()
    for case, words in wanted.items():
        for word in words:
            assert word in main[case], (case, main[case])
    assert lost.startswith("error[R311]: another process is gone") and "node-a" in lost


@pytest.mark.slow
def test_another_command_on_the_second_node_is_refused_on_both(rows: Path, tmp_path: Path) -> None:
    command = ["-m", "cs336_alignment.cli", "train", *TINY, f"data.train_path={rows}", "run_name=x"]
    ended = both(command, [*command, "optimizer.weight_decay=0.25"], tmp_path)
    for status, text in ended:
        assert status == 78 and "optimizer.weight_decay=0.25" in text, text
        assert "error[C212]" in text and "Traceback" not in text
    left = json.loads((tmp_path / "outputs/x/status.json").read_text())
    assert (left["state"], left["exit_code"]) == ("failed", 78) and "C212" in left["error"]


@pytest.mark.parametrize(
    "index", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["nobody comes", "nobody is there"]
)
def test_waiting_for_the_others_ends_with_an_error_that_says_where(
    index: int, tmp_path: Path
) -> None:
    code = (
        "import sys\n"
        "from cs336_alignment.config import ParallelConfig\n"
        "from cs336_alignment.training.launch_check import UserError, meet\n"
        "try:\n    meet(ParallelConfig(timeout_minutes=0.02))\n"
        "except UserError as error:\n    print(error)\n"
    )
    port = free_port()
    text = start(index, port, ["-c", code], tmp_path).communicate(timeout=100)[0]
    assert text.startswith("error[C211]: the processes did not find each other"), text
    assert "timeout_minutes=0.02" in text
    assert f"2 processes that meet at 127.0.0.1:{port}; got: process {index} on" in text


def test_an_address_that_no_name_server_knows_costs_no_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(UserError) as caught:
        meet(ParallelConfig())
    assert caught.value.code == "C211" and "no-such-host.invalid" in str(caught.value)


def test_tasks_and_gpus_are_counted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    refuse_lone_and_surplus_processes()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(UserError, match="8 tasks"):
        refuse_lone_and_surplus_processes()
    monkeypatch.setenv("WORLD_SIZE", "8")
    refuse_lone_and_surplus_processes()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local, refused in (("2", False), ("3", True)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        if not refused:
            refuse_lone_and_surplus_processes()
            continue
        with pytest.raises(UserError) as caught:
            refuse_lone_and_surplus_processes()
        assert caught.value.code == "C216" and "expected: at most 2" in str(caught.value)


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for text, wanted in (("shapes differ", RuntimeError), ("Timed out waiting 9ms", UserError)):
        with pytest.raises(wanted), naming_lost_processes():
            raise RuntimeError(text)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError), naming_lost_processes():
        raise RuntimeError("Timed out waiting 9ms")


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_launch_files_leave_everything_but_processes_to_the_framework(name: str) -> None:
    values = yaml.safe_load((CONFIGS / name).read_text())
    assert values["mixed_precision"] == "no" and values["distributed_type"] in ("NO", "MULTI_GPU")
    assert not {"fsdp_config", "deepspeed_config", "megatron_lm_config"} & values.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multi_gpu", "fsdp2", "multi_node"])
def test_launch_files_start_what_they_say(name: str, rows: Path, tmp_path: Path) -> None:
    nodes = 2 if name == "multi_node" else 1
    port = free_port()
    started = []
    for node in range(nodes):
        flags = [
            "--config_file",
            str(CONFIGS / f"{name}.yaml"),
            "--num_processes",
            "2",
            "--main_process_port",
            port,
        ]
        if nodes == 2:
            flags += [
                "--num_machines",
                "2",
                "--machine_rank",
                str(node),
                "--main_process_ip",
                "127.0.0.1",
            ]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", "cs336_alignment.cli",
                 "train", *TINY, f"data.train_path={rows}", "run_name=x", "trainer.max_steps=2",
                 "parallel.num_processes=2", f"parallel={'fsdp2' if name == 'fsdp2' else 'ddp'}"],
                cwd=tmp_path, env={**clean_environment(), "PYTHONPATH": str(ROOT)}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0] * nodes, said
    left = json.loads((tmp_path / "outputs/x/status.json").read_text())
    assert (left["state"], left["step"]) == ("completed", 2)
    assert ("--nnodes 2" in left["resume_command"]) == (nodes == 2)
