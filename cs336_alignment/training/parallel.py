"""Processes: started by accelerate or torchrun, joined here; sums over them; threads of each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import Tensor, nn

from cs336_alignment.config import ParallelConfig
from cs336_alignment.cores import count_cores
from cs336_alignment.errors import ExitStatus, UserError

TINY_MODEL = 1_000_000  # parameters


def launched_processes() -> int:
    """Give the number of processes that the launcher set, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process_before_start() -> bool:
    """Tell whether this is the main process, from the launcher's environment alone."""
    return int(os.environ.get("RANK", "0")) == 0


def refuse_launcher_options(precision: str) -> str:
    """Read what `accelerate launch` was asked for and refuse what this trainer would ignore.

    Args:
        precision: `trainer.precision`.

    Returns:
        The precision to use: the launcher's, if `auto` left it open, else the config's.

    Raises:
        UserError: the launcher asks for sharding, accumulation or a precision that differs (78).
    """
    for variable, name in (
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ):
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise UserError(
                "C201",
                f"`accelerate launch` was configured for {name}, and parallel=ddp would ignore it",
                ExitStatus.BAD_CONFIG,
                hint="launch with --config_file configs/accelerate/multi_gpu.yaml",
            )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise UserError(
            "C202",
            f"`accelerate launch` has gradient_accumulation_steps={steps}, which has no effect",
            ExitStatus.BAD_CONFIG,
            hint=f"type trainer.gradient_accumulation_steps={steps} instead",
        )
    launcher = {"no": None, "bf16": "bf16"}.get(
        launched := os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), "other"
    )
    if launcher is None or launcher == precision:
        return precision
    if launcher == "other" or precision != "auto":
        raise UserError(
            "C203",
            f"`accelerate launch` was given mixed_precision={launched} and trainer.precision is "
            f"{precision}",
            ExitStatus.BAD_CONFIG,
            hint="use bf16 or fp32, in one of the two places",
        )
    return launcher


def start_processes(config: ParallelConfig) -> Accelerator:
    """Join the process group that the launcher set up.

    Returns:
        accelerate's handle. Its own accumulation and mixed precision stay off: the trainer owns
        both.

    Raises:
        UserError: accelerate and launcher disagree on the number of processes, or the number is not
            the one that `parallel.num_processes` asserts (78).
    """
    accelerator = Accelerator(
        # Without a GPU a plain Accelerator() would start no group: every process would train alone.
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(minutes=config.timeout_minutes)),
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    found, launched = accelerator.num_processes, launched_processes()
    if found != launched:
        raise UserError(
            "C204",
            "launcher and accelerate disagree on the number of processes",
            ExitStatus.BAD_CONFIG,
            expected=f"{launched} (WORLD_SIZE)",
            got=f"{found}",
            hint="every process would train alone into the same folder; check the launcher's flags",
        )
    if config.num_processes is not None and found != config.num_processes:
        raise UserError(
            "C205",
            "the number of processes is not the one asked for",
            ExitStatus.BAD_CONFIG,
            expected=f"parallel.num_processes={config.num_processes}",
            got=f"{found}",
            hint=f"torchrun --standalone --nproc_per_node {config.num_processes} scripts/train.py "
            "… (`accelerate launch --cpu` starts one process, whatever it is told)",
        )
    return accelerator


def set_threads(local_processes: int, parameters: int) -> int:
    """Divide the machine's cores among its processes; a lone process keeps OMP_NUM_THREADS if that
    is set.

    Launchers set OMP_NUM_THREADS=1 for several processes whatever the machine, so there it is not
    read. A tiny model gets one thread: its operations are so short that threads mostly wait for
    each other, and for as long as another program takes a core, both stand still. The number
    follows from model and machine alone, since sums depend on it to the last bit.

    Args:
        local_processes: on this machine.
        parameters: of the model.

    Returns:
        The number of threads of this process.
    """
    if parameters < TINY_MODEL:
        torch.set_num_threads(1)
    elif local_processes > 1 or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, count_cores() // local_processes))
    return torch.get_num_threads()


class Processes:
    """What the trainer needs of its fellow processes.

    Attributes:
        count: how many there are.
        index: which this is; 0 is the main process.
        device: where this process computes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._wrapped: list[nn.Module] = []
        self.count: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self.device: torch.device = accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.index == 0

    @property
    def local_count(self) -> int:
        """Processes on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", str(self.count)))

    def wrap(self, module: nn.Module) -> nn.Module:
        """Put a module on the device and, with several processes, into DDP."""
        wrapped: nn.Module = self._accelerator.prepare_model(module)
        self._wrapped.append(wrapped)
        return wrapped

    def no_sync(self, module: nn.Module, active: bool) -> contextlib.AbstractContextManager[Any]:
        """Skip the gradient's reduction, on every microbatch but the last."""
        return self._accelerator.no_sync(module) if active else contextlib.nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Add a tensor over all processes."""
        return self._accelerator.reduce(values, reduction="sum")  # type: ignore[no-any-return]

    def agree(self, value: Any) -> Any:
        """Give every process the main process's value (anything that pickles, from trusted
        peers).
        """
        if self.count == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Give every process the values of all, in the order of their index."""
        if self.count == 1:
            return [value]
        box: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(box, value)
        return box

    def on_main(self, work: Callable[[], None]) -> None:
        """Do something on the main process alone, and learn on all of them how it ended.

        Raises:
            UserError: what the main process raised; on the others one that says so (its status).
        """
        failure: UserError | None = None
        if self.is_main:
            try:
                work()
            except UserError as error:
                failure = error
        told = self.agree(None if failure is None else (failure.message, failure.status))
        if failure is not None:
            raise failure
        if told is not None:
            raise UserError("R208", f"the main process failed: {told[0]}", told[1])

    def wait(self) -> None:
        """Wait for the other processes."""
        self._accelerator.wait_for_everyone()

    def release(self) -> None:
        """Let go of what `wrap` gave: it can do no backward pass any more, and its memory is free
        for the next model.
        """
        # DDP's reducer holds the group. If the group dies with it, its destructor joins gloo's
        # threads under the interpreter's lock, and one of them may be waiting for that lock.
        for wrapped in self._wrapped:
            if isinstance(wrapped, nn.parallel.DistributedDataParallel):
                wrapped.reducer = wrapped.logger = None  # type: ignore[assignment]
        self._wrapped.clear()
        self._accelerator.free_memory()

    def close(self) -> None:
        """Leave the process group, and let go of what `wrap` gave."""
        self.release()
        self._accelerator.end_training()
