"""A launch that cannot be meant: processes without a GPU, alone, or that do not belong together."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from cs336_alignment.config import Config, ParallelConfig, flatten
from cs336_alignment.data.tokenize import tokenizer_fingerprint
from cs336_alignment.errors import UserError, first_few, first_line
from cs336_alignment.files import write_text
from cs336_alignment.training.inputs import Inputs
from cs336_alignment.training.manifest import git_commit, versions
from cs336_alignment.training.parallel import Processes, join, launched_processes
from cs336_alignment.training.preflight import choose_precision

MAY_DIFFER = frozenset({"data.cache_dir"})  # a disk of the node's own is a good place for it
MARKER = ".launch"
SECONDS_TO_APPEAR = 20.0  # a network file system may show a new file late
# What gloo and the store say when another process is gone or silent, in RuntimeErrors of any kind.
SIGNS_OF_LOSS = ("timed out", "by peer", "connectfullmesh", "broken pipe", "connection refused")


def refuse_lone_and_surplus_processes() -> None:
    """Read the launcher's environment before anything is done.

    Raises:
        UserError: tasks were started that know nothing of each other, or more processes on this
            machine than it has GPUs (78).
    """
    environment, host = os.environ, socket.gethostname()
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "WORLD_SIZE" not in environment:
        raise UserError(
            "C215",
            f"srun started {tasks} tasks that know nothing of each other: each would train alone",
            hint="one task a node that starts torchrun, as scripts/slurm/train.sbatch does",
        )
    local = int(environment.get("LOCAL_RANK", "0")) + 1
    local = max(local, int(environment.get("LOCAL_WORLD_SIZE", "1")))
    if torch.cuda.is_available() and local > (found := torch.cuda.device_count()):
        raise UserError(
            "C216",
            f"{host} was given more processes than it has GPUs",
            expected=f"at most {found} "
            f"(CUDA_VISIBLE_DEVICES {environment.get('CUDA_VISIBLE_DEVICES', 'is not set')})",
            got=f"{local}",
            hint=f"torchrun --nproc_per_node {found}; for accelerate, --num_processes counts the "
            "processes of all machines",
        )


def meet(config: ParallelConfig) -> Processes:
    """Join the processes that the launcher started.

    Raises:
        UserError: the others do not come within `timeout_minutes`, or as `start_processes` (78).
    """
    address = os.environ.get("MASTER_ADDR")
    try:
        if address and launched_processes() > 1:
            socket.getaddrinfo(address, None)  # torch would ask again until the time is over
        return join(config)
    except (RuntimeError, OSError, ValueError) as failure:
        where = f"{address or 'MASTER_ADDR'}:{os.environ.get('MASTER_PORT', 'MASTER_PORT')}"
        raise UserError(
            "C211",
            f"the processes did not find each other (parallel.timeout_minutes="
            f"{config.timeout_minutes:g})",
            expected=f"{launched_processes()} processes that meet at {where}",
            got=f"process {os.environ.get('RANK', '0')} on {socket.gethostname()}: "
            f"{first_line(failure)}",
            hint="the address (--rdzv_endpoint, --main_process_ip) is the first node's as every "
            "node reaches it, with an open port; start every node, with the same numbers",
        ) from failure


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Say in words what the loss or silence of another process raises in this block (70)."""
    try:
        yield
    except RuntimeError as failure:
        text = str(failure).strip()
        if launched_processes() == 1 or not any(sign in text.lower() for sign in SIGNS_OF_LOSS):
            raise
        raise UserError(
            "R311",
            "another process is gone, or was silent for parallel.timeout_minutes",
            got=f"on {socket.gethostname()}: {text.splitlines()[0]}",
            hint="what the others printed says why; the same command goes on from the checkpoint",
        ) from failure


def check_launch(
    processes: Processes,
    config: Config,
    folder: Path,
    inputs: Inputs,
    precision: str,
    warn: Callable[[str], None],
) -> None:
    """Find out whether the processes belong together: one agreement and one gathering.

    Args:
        processes: joined.
        config: of this process's own command.
        folder: of the run.
        inputs: as this process read them.
        precision: `trainer.precision`, or the launcher's.
        warn: prints a line.

    Raises:
        UserError: the same one on all of them: fewer examples a step than processes, another
            config, other software or data somewhere (78), a folder that not all see (73).
    """
    if processes.device.type == "cuda" and torch.cuda.device_count() > processes.local_count:
        warn(
            f"{torch.cuda.device_count()} GPUs are visible and {processes.local_count} are used: "
            "start as many processes (torchrun --nproc_per_node …)"
        )
    if processes.count == 1:
        return
    batch = config.trainer.global_batch_size
    if batch < processes.count:
        raise UserError(
            "C214",
            "a step has fewer examples than there are processes: some would never have work",
            expected=f"trainer.global_batch_size of at least {processes.count}",
            got=f"{batch}",
            hint=f"trainer.global_batch_size={processes.count}, or fewer processes",
        )
    if config.trainer.loss_normalization == "microbatch" and batch % processes.count:
        warn(
            f"trainer.loss_normalization=microbatch averages over processes, and {batch} examples "
            f"do not divide by {processes.count}: examples weigh differently"
        )
    software = {**versions(), "git commit": str(git_commit()), "CUDA": str(torch.version.cuda)}
    made_of = {
        **software,
        "precision": str(choose_precision(precision, processes.device)),
        "training data": inputs.data.train.fingerprint[:12],
        "tokenizer": tokenizer_fingerprint(inputs.tokenizer)[:12],
    }
    keys = {key: repr(v) for key, v in flatten(config) if key not in MAY_DIFFER}
    host, marker = socket.gethostname(), folder.absolute() / MARKER
    main = processes.agree((host, keys, made_of, marker, uuid.uuid4().hex))
    first, of_keys, of_made, shared, token = main
    processes.on_main(lambda: write_text(marker, token))
    seen = _appears(marker, token)
    found = processes.gather((host, _other(of_keys, keys), _other(of_made, made_of), seen))
    if processes.is_main:
        marker.unlink(missing_ok=True)
    _refuse_others(first, of_keys, [(host, other) for host, other, _, _ in found], "C212")
    _refuse_others(first, of_made, [(host, other) for host, _, other, _ in found], "C213")
    blind = [f"process {i} on {host}" for i, (host, _, _, seen) in enumerate(found) if not seen]
    if blind:
        raise UserError(
            "R107",
            f"not all processes see the run's folder {shared.parent}",
            expected=f"what process 0 on {first} writes there is there on every node",
            got=f"nothing for {first_few(blind, '; ')}",
            hint="output_root=… on a file system that all nodes share, by the same path",
        )


def _other(main: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Give what this process has otherwise than the main process."""
    names = [name for name in sorted({*main, *own}) if own.get(name) != main.get(name)]
    return {name: own.get(name, "missing") for name in names}


def _refuse_others(
    host: str, main: Mapping[str, str], others: list[tuple[str, dict[str, str]]], code: str
) -> None:
    """Refuse differences, with what the main process has and who has what instead."""
    names = sorted({name for _, other in others for name in other})
    if not names:
        return
    config = code == "C212"
    who = [
        f"process {index} on {where}: " + ", ".join(f"{k}={v}" for k, v in other.items())
        for index, (where, other) in enumerate(others)
        if other
    ]
    raise UserError(
        code,
        "the processes were given different "
        + ("configs" if config else "versions, data or precision"),
        expected=f"as process 0 on {host}: "
        + ", ".join(f"{name}={main.get(name, 'missing')}" for name in names),
        got=first_few(who, "; "),
        hint="type the same command on every node"
        if config
        else "one environment, checkout and data for all nodes, best on a file system they share",
    )


def _appears(marker: Path, token: str) -> bool:
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while True:
        with suppress(OSError):
            if marker.read_text(encoding="utf-8") == token:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
