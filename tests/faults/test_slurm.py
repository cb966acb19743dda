"""The batch script for SLURM: what it starts, what it requeues, what it does not; the scheduler and, in most, Python are
stand-ins.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY, clean_environment, free_port, without_times
from tests.faults.tally import Tally
from tests.faults.test_kills import metrics_hold, when

SCRIPT = ROOT / "scripts/slurm/train.sbatch"
BESIDE = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the environment may not be active
SHELLCHECK = shutil.which("shellcheck", path=BESIDE)
# As srun does, one task a node; with no scheduler here, every "node" is this machine.
SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=0 && $SRUN_CPUS_PER_TASK == 3 ]] || exit 99
shift
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node SLURM_STEP_NUM_TASKS=$SLURM_JOB_NUM_NODES "$@" &
  tasks+=($!)
done
echo "${tasks[@]}" >TMP/tasks.new && mv TMP/tasks.new TMP/tasks
code=0
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo 127.0.0.1; echo another; else echo "$@" >>TMP/asked; fi
"""
# Composes a config, or trains and leaves this status and step.
PYTHON = """#!/usr/bin/env bash
if [[ $* == *--cfg* ]]; then echo "output_root: 'my runs'"; exit "${COMPOSES:-0}"; fi
echo "$@" >>TMP/started
words="$*"; name=${words##*run_name=}; name=${name%% *}
mkdir -p "my runs/$name"
printf '{\\n  "state": "x",\\n  "step": %s,\\n  "exit_code": %s,\\n  "error": null\\n}\\n' "$STEP" "$ENDS" >"my runs/$name/status.json"
[[ $ENDS == 0 ]]
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job, with stand-ins for the scheduler's commands."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("fake-python", PYTHON)):
        (tools / name).write_text(text.replace("TMP", str(tmp_path)))
        (tools / name).chmod(0o755)
    environment = clean_environment()
    return {
        **environment, "PATH": f"{tools}:{environment['PATH']}", "PYTHON": "fake-python",
        "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "3", "STEP": "5",
    }  # fmt: skip


def submit(tmp_path: Path, environment: dict[str, str], *words: str) -> tuple[int, str]:
    """Run the script; gives its status and what was asked of the scheduler by then."""
    done = subprocess.run(
        [str(SCRIPT), *words], cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=100
    )  # fmt: skip
    print(done.stdout, done.stderr)
    asked = tmp_path / "asked"
    return done.returncode, asked.read_text() if asked.exists() else ""


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_the_script_is_clean() -> None:
    found = subprocess.run([str(SHELLCHECK), str(SCRIPT)], text=True, capture_output=True)
    assert found.returncode == 0, found.stdout


def test_a_job_starts_one_launcher_a_node(cluster: dict[str, str], tmp_path: Path) -> None:
    code, asked = submit(tmp_path, {**cluster, "ENDS": "0"}, "mine", "seed=1")
    assert (code, asked) == (0, "")
    started = (tmp_path / "started").read_text().splitlines()
    assert len(started) == 2 and len(set(started)) == 1
    assert "--nnodes 2 --nproc_per_node 4 " in started[0]
    assert "--rdzv_id 77 --rdzv_endpoint 127.0.0.1:20077 " in started[0]
    assert started[0].endswith("train run_name=mine parallel.num_processes=8 seed=1")


def test_a_task_of_an_array_takes_its_line(cluster: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "runs.txt").write_text("a seed=1\nb seed=2 trainer.max_steps=3\n")
    task = {**cluster, "ENDS": "0", "SLURM_ARRAY_TASK_ID": "2"}
    assert submit(tmp_path, task, "runs.txt", "seed=7")[0] == 0
    started = (tmp_path / "started").read_text().splitlines()
    assert started[0].endswith(
        "run_name=b parallel.num_processes=8 seed=7 seed=2 trainer.max_steps=3"
    )
    assert submit(tmp_path, {**task, "SLURM_ARRAY_TASK_ID": "3"}, "runs.txt")[0] != 0
    assert len((tmp_path / "started").read_text().splitlines()) == 2


def test_only_a_stopped_run_goes_back_into_the_queue(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    for ends in ("70", "78", "130", "null"):
        code, asked = submit(tmp_path, {**cluster, "ENDS": ends}, "mine")
        assert code != 0 and not asked, ends
    code, asked = submit(tmp_path, {**cluster, "ENDS": "75"}, "mine")
    assert code != 0 and asked == "requeue 77\n"
    assert submit(tmp_path, {**cluster, "COMPOSES": "78", "ENDS": "75"}, "mine")[0] == 78
    assert (tmp_path / "asked").read_text() == asked


def test_stops_that_come_no_further_end_the_round(cluster: dict[str, str], tmp_path: Path) -> None:
    stopped = {**cluster, "ENDS": "75"}
    for step, requeues in (("5", 1), ("9", 2), ("9", 3), ("9", 3), ("10", 4)):
        _, asked = submit(tmp_path, {**stopped, "STEP": step}, "mine")
        assert asked.count("requeue 77") == requeues, step


def test_a_typing_error_starts_nothing(cluster: dict[str, str], tmp_path: Path) -> None:
    real = {**cluster, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    code, asked = submit(tmp_path, real, "mine", "experiment=quickstart", "trainer.max_step=3")
    assert code == 78 and not asked and not (tmp_path / "tasks").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.fault("T4 a cluster's time limit")
def test_a_time_limit_costs_nothing(
    nodes: int, cluster: dict[str, str], rows: Path, tmp_path: Path, tally: Tally
) -> None:
    presets = tmp_path / "presets" / "experiment"
    presets.mkdir(parents=True)
    (presets / "mine.yaml").write_text("# @package _global_\noutput_root: shared runs\n")
    real = {
        **cluster, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "MASTER_PORT": free_port(),
        "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_GPUS_ON_NODE": "1",
    }  # fmt: skip
    words = ["--config-dir", str(presets.parent), "experiment=mine", *TINY, f"data.train_path={rows}",
             "trainer.max_steps=60", "trainer.num_train_epochs=99"]  # fmt: skip
    whole, cut = tmp_path / "shared runs/whole", tmp_path / "shared runs/cut"
    assert submit(tmp_path, real, "whole", *words) == (0, "")
    with tally.point(f"{nodes} node(s)"):
        job = subprocess.Popen(
            [str(SCRIPT), "cut", *words], cwd=tmp_path, env=real, start_new_session=True,
            stderr=(tmp_path / "stderr").open("w"),
        )  # fmt: skip
        assert when(metrics_hold(cut, 10), job.pid), (tmp_path / "stderr").read_text()
        tasks = [int(task) for task in (tmp_path / "tasks").read_text().split()]
        assert len(tasks) == nodes
        for task in tasks:
            os.kill(task, signal.SIGTERM)
        assert job.wait(60) != 0
        status = json.loads((cut / "status.json").read_text())
        assert status["exit_code"] == 75 and 0 < status["step"] < 60
        assert (tmp_path / "asked").read_text() == "requeue 77\n"
        code, asked = submit(tmp_path, real, "cut", *words)
        assert (code, asked) == (0, "requeue 77\n")
        assert without_times(cut / "metrics.jsonl") == without_times(whole / "metrics.jsonl")
        weights = "model/model.safetensors"
        assert (cut / weights).read_bytes() == (whole / weights).read_bytes()
        assert json.loads((cut / "manifest.json").read_text())["num_processes"] == nodes
