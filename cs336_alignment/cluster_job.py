"""A run as a job of its own, started by Hydra's submitit launcher: its processes, its stops."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from importlib.util import find_spec

from cs336_alignment.config import Config
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.training.stop import StopNow, StopRequest

Job = Callable[[Config], ExitStatus]
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # that the time is nearly over; which, submitit decides


def as_cluster_job(job: Job, launcher: str) -> Job:
    """Wrap what runs one config, so that a submitit job can run it.

    Several tasks of a job become processes of one run. On a warning submitit would put the job
    back into the queue at once and end the process amid a step; here the run first stops as on
    SIGTERM, with a checkpoint, and submitit has its turn after that.

    Args:
        job: runs one config.
        launcher: of Hydra, that starts the jobs.

    Returns:
        What does the same inside a job.

    Raises:
        UserError: submitit is not installed, or this machine has no SLURM (78).
    """
    if find_spec("submitit") is None:
        raise UserError(
            "C128",
            "hydra/launcher starts jobs through submitit, which is not installed",
            hint="pip install hydra-submitit-launcher",
        )
    if "slurm" in launcher and shutil.which("srun") is None:
        raise UserError(
            "C128",
            f"hydra/launcher={launcher} hands runs to SLURM, and there is no srun on this machine",
            hint="type the command on a node of the cluster; here: hydra/launcher=local_jobs",
        )

    def run(config: Config) -> ExitStatus:
        import submitit

        if submitit.JobEnvironment().num_tasks > 1:
            processes = submitit.helpers.TorchDistributedEnvironment()
            processes.export(set_cuda_visible_devices=False)
        requeue = {n: signal.getsignal(n) for n in WARNINGS if callable(signal.getsignal(n))}
        warned: list[int] = []

        def stop(number: int, _: object) -> None:
            warned.append(number)
            os.kill(os.getpid(), signal.SIGTERM)

        with StopRequest():  # of a training run's own in its time
            for number in requeue:
                signal.signal(number, stop)
            try:
                status = job(config)
            except StopNow as request:
                status = request.status
        if warned and status == ExitStatus.STOPPED:
            requeue[signal.Signals(warned[0])](warned[0], None)  # type: ignore[operator, misc]
        return status

    return run
