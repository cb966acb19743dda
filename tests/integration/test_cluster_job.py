"""The runs of a multirun as jobs of their own, through Hydra's submitit launcher on this machine."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cs336_alignment.cluster_job import as_cluster_job
from cs336_alignment.config import Config
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.multirun import SweptRun, outcome_of, time_of_status
from cs336_alignment.training.stop import StopRequest
from tests.conftest import ROOT, TINY, Sft, without_times


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "hydra/launcher=slurm"], "add -m"),
        (["evaluate", "-m", "hydra/launcher=slurm", "seed=1,2"], "does not start `evaluate`"),
        (["train", "-m", "hydra/launcher=slurn", "seed=1,2"], "hydra/launcher=slurm"),
        (["train", "-m", "hydra/launcher=local_jobs", "hydra.launcher.task=2", "seed=1,2"], "hydra.launcher.task"),
        (["train", "-m", "hydra/launcher=local_jobs", "trainer.precision=fp8", "seed=1,2"], "trainer.precision"),
    ],
)  # fmt: skip
def test_what_cannot_be_handed_over_is_an_error(
    words: list[str], told: str, sft: Sft, rows: Path, tmp_path: Path
) -> None:
    done = sft(*words, *TINY, f"data.train_path={rows}", f"data.eval_path={rows}")
    assert done.returncode == 78 and told in done.stderr, done.stderr
    assert not (tmp_path / "outputs").exists()


def test_without_submitit_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cs336_alignment.cluster_job.find_spec", lambda _: None)
    with pytest.raises(UserError, match="submitit"):
        as_cluster_job(lambda _: ExitStatus.DONE, "local_jobs")


def test_without_slurm_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cs336_alignment.cluster_job.shutil.which", lambda _: None)
    with pytest.raises(UserError, match="no srun on this machine"):
        as_cluster_job(lambda _: ExitStatus.DONE, "slurm")


@pytest.fixture
def in_a_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """As in a job of one task; gives the signals that submitit would have requeued the job for."""
    module = ModuleType("submitit")
    module.__spec__ = ModuleSpec("submitit", None)
    module.JobEnvironment = lambda: SimpleNamespace(num_tasks=1)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "submitit", module)
    requeued: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: requeued.append(number))
    yield requeued
    signal.signal(signal.SIGUSR2, before)


def warned_while(work: Callable[[StopRequest], Any]) -> Callable[[Config], ExitStatus]:
    """A job that the cluster warns, and that goes on until it has saved."""

    def job(_: Config) -> ExitStatus:
        with StopRequest() as stop:  # as in a training run
            stop.wait_for_steps()
            os.kill(os.getpid(), signal.SIGUSR2)
            work(stop)
            return stop.status or ExitStatus.DONE

    return job


def test_a_warning_stops_the_run_first_and_requeues_it_then(in_a_job: list[int]) -> None:
    still_running: list[bool] = []
    job = as_cluster_job(warned_while(lambda _: still_running.append(not in_a_job)), "local_jobs")
    assert job(Config()) == ExitStatus.STOPPED
    assert still_running == [True] and in_a_job == [signal.SIGUSR2]


def test_a_warning_before_the_first_step_requeues_too(in_a_job: list[int]) -> None:
    def job(_: Config) -> ExitStatus:
        os.kill(os.getpid(), signal.SIGUSR2)
        raise AssertionError("it went on")

    assert as_cluster_job(job, "local_jobs")(Config()) == ExitStatus.STOPPED
    assert in_a_job == [signal.SIGUSR2]


def test_a_job_that_was_not_warned_is_not_requeued(in_a_job: list[int]) -> None:
    for status in (ExitStatus.DONE, ExitStatus.STOPPED, ExitStatus.BAD_DATA):
        assert as_cluster_job(lambda _, s=status: s, "local_jobs")(Config()) == status
    assert in_a_job == []


def test_what_a_job_left_says_how_it_ended(tmp_path: Path) -> None:
    config = Config(run_name="x", output_root=str(tmp_path))
    run = SweptRun(config, "x", {})
    assert outcome_of(run).status == ExitStatus.INTERNAL
    (tmp_path / "x").mkdir()
    for code, status in (
        ("75", ExitStatus.STOPPED),
        ("null", ExitStatus.INTERNAL),
        ("0", ExitStatus.DONE),
    ):
        (tmp_path / "x/status.json").write_text(f'{{"exit_code": {code}, "error": null}}')
        assert outcome_of(run).status == status
    for text in ("[]", "{}", '{"exit_code": 3}', "{"):  # not as this release writes it
        (tmp_path / "x/status.json").write_text(text)
        assert outcome_of(run).status == ExitStatus.INTERNAL


def test_what_an_earlier_attempt_left_is_not_a_jobs(tmp_path: Path) -> None:
    run = SweptRun(Config(run_name="x", output_root=str(tmp_path)), "x", {})
    assert time_of_status(run) is None
    path = tmp_path / "x/status.json"
    path.parent.mkdir()
    path.write_text('{"exit_code": 65, "error": "of then"}')
    earlier = time_of_status(run)
    left = outcome_of(run, earlier)  # the job never began
    assert left.status == ExitStatus.INTERNAL and left.error is not None
    assert "of then" not in left.error and "did not come to write" in left.error
    path.write_text('{"exit_code": 75, "error": null}')
    os.utime(path, ns=(0, 1))  # a clock that goes after counts, too
    assert outcome_of(run, earlier).status == ExitStatus.STOPPED
    path.write_text('{"exit_code": 0, "error": null}')
    assert outcome_of(run, time_of_status(run)).status == ExitStatus.DONE  # nothing was to do


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, 2])
def test_jobs_train_what_one_process_trains(
    tasks: int, sft: Sft, rows: Path, tmp_path: Path
) -> None:
    words = ["train", "-m", *TINY, f"data.train_path={rows}", "trainer.max_steps=3", "seed=1,2"]
    env = {"PYTHONPATH": str(ROOT)}
    here = sft(*words, "run_name=here")
    assert here.returncode == 0, here.stderr
    jobs = ["hydra/launcher=local_jobs", f"hydra.launcher.tasks_per_node={tasks}"]
    away = sft(*words, "run_name=away", *jobs, f"parallel.num_processes={tasks}", env=env)
    assert away.returncode == 0, away.stderr
    assert "away: 2 runs" in away.stdout and (tmp_path / "outputs/away/runs.md").is_file()
    for seed in (1, 2):
        one, two = (
            without_times(tmp_path / f"outputs/{name}-seed-{seed}/metrics.jsonl") for name in ("here", "away")
        )  # fmt: skip
        assert one == two if tasks == 1 else len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-5)


@pytest.mark.slow
def test_a_job_that_fails_is_told_and_a_launcher_in_a_preset_is_not_passed_over(
    sft: Sft, rows: Path, tmp_path: Path
) -> None:
    presets = tmp_path / "presets/experiment"
    presets.mkdir(parents=True)
    (presets / "by_itself.yaml").write_text(
        "# @package _global_\ndefaults: [{override /hydra/launcher: local_jobs}]\n"
    )
    words = ["train", "-m", *TINY, f"data.train_path={rows}", "trainer.max_steps=1"]
    env = {"PYTHONPATH": str(ROOT)}
    models = "model.name_or_path=builtin:arithmetic,nowhere"
    failed = sft(*words, "run_name=bad", "hydra/launcher=local_jobs", models, env=env)
    assert failed.returncode == 66 and failed.stdout.count("done") == 1, failed.stdout
    preset = sft(
        *words, "--config-dir", str(presets.parent), "experiment=by_itself", "seed=1", env=env
    )
    assert preset.returncode == 78 and "add hydra/launcher=local_jobs" in preset.stderr
