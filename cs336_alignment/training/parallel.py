"""Processes: started by accelerate or torchrun, joined here; sums over them; threads of each."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from cs336_alignment.config import Config, ParallelConfig
from cs336_alignment.cores import count_cores
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.files import system_error
from cs336_alignment.training.sharding import held_whole

TINY_MODEL = 1_000_000  # parameters
T = TypeVar("T")


def launched_processes() -> int:
    """Give the number of processes that the launcher set, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process_before_start() -> bool:
    """Tell whether this is the main process, from the launcher's environment alone."""
    return int(os.environ.get("RANK", "0")) == 0


def refuse_launcher_options(config: Config) -> str:
    """Read what `accelerate launch` was asked for and refuse what this trainer would ignore.

    Args:
        config: `trainer` and `parallel` are read.

    Returns:
        The precision to use: the launcher's, if `auto` left it open, else the config's.

    Raises:
        UserError: the launcher asks for sharding, accumulation or a precision that differs (78).
    """
    precision, strategy = config.trainer.precision, config.parallel.strategy
    if _is_set("ACCELERATE_USE_FSDP"):
        _refuse_other_sharding(config)
    for variable, name in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ):
        if _is_set(variable):
            raise UserError(
                "C201",
                f"`accelerate launch` was configured for {name}, and parallel={strategy} would "
                "ignore it",
                hint="launch with --config_file configs/accelerate/multi_gpu.yaml",
            )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise UserError(
            "C202",
            f"`accelerate launch` has gradient_accumulation_steps={steps}, which has no effect",
            hint=f"type trainer.gradient_accumulation_steps={steps} instead",
        )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched == "no" or launched == precision == "bf16":
        return precision
    if launched != "bf16" or precision != "auto":
        raise UserError(
            "C203",
            f"`accelerate launch` was given mixed_precision={launched} and trainer.precision is "
            f"{precision}",
            hint="use bf16 or fp32, in one of the two places",
        )
    return launched


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")


def _refuse_other_sharding(config: Config) -> None:
    """Take the launcher's FSDP for parallel=fsdp2 where it means the same, else refuse it (78)."""
    same = {
        "parallel.strategy": (config.parallel.strategy, "fsdp2"),
        "fsdp_version": (os.environ.get("FSDP_VERSION", "1"), "2"),
        "parallel.cpu_offload": (config.parallel.cpu_offload, _is_set("FSDP_OFFLOAD_PARAMS")),
        "parallel.reshard_after_forward": (
            config.parallel.reshard_after_forward,
            os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false",
        ),
        "trainer.gradient_checkpointing": (
            bool(config.trainer.gradient_checkpointing),
            bool(config.trainer.gradient_checkpointing) or _is_set("FSDP_ACTIVATION_CHECKPOINTING"),
        ),
    }
    for name, (found, wanted) in same.items():
        if found != wanted:
            raise UserError(
                "C201",
                "`accelerate launch` was configured for FSDP, and parallel="
                f"{config.parallel.strategy} would not do the same",
                expected=f"{name}: {str(wanted).lower()}",
                got=str(found).lower(),
                hint="launch with --config_file configs/accelerate/multi_gpu.yaml and type "
                "parallel=fsdp2, whose keys say all the rest",
            )


def start_processes(config: ParallelConfig) -> Accelerator:
    """Join the process group that the launcher set up.

    Returns:
        accelerate's handle. Its own accumulation and mixed precision stay off: the trainer owns
        both.

    Raises:
        UserError: accelerate and launcher disagree on the number of processes, or the number is not
            the one that `parallel.num_processes` asserts (78).
    """
    timeout = timedelta(minutes=config.timeout_minutes)
    if config.strategy == "fsdp2":
        # accelerate would shard by itself, and load by its own rules.
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        if not torch.distributed.is_initialized():
            _open_group(timeout)
    accelerator = Accelerator(
        # Without a GPU a plain Accelerator() would start no group: every process would train alone.
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout),
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    found, launched = accelerator.num_processes, launched_processes()
    if found != launched:
        raise UserError(
            "C204",
            "launcher and accelerate disagree on the number of processes",
            expected=f"{launched} (WORLD_SIZE)",
            got=f"{found}",
            hint="every process would train alone into the same folder; check the launcher's flags",
        )
    if config.strategy == "single" and found != 1:
        raise UserError(
            "C221",
            f"parallel=single, and the launcher started {found} processes",
            hint="type parallel=ddp, or parallel=fsdp2 for a model that is too large for one",
        )
    if config.num_processes is not None and found != config.num_processes:
        raise UserError(
            "C205",
            "the number of processes is not the one asked for",
            expected=f"parallel.num_processes={config.num_processes}",
            got=f"{found}",
            hint=f"torchrun --standalone --nproc_per_node {config.num_processes} scripts/train.py "
            "… (`accelerate launch --cpu` starts one process, whatever it is told)",
        )
    return accelerator


def _open_group(timeout: timedelta) -> None:
    """Open the group that `fully_shard` needs: accelerate opens none for a lone process, and on
    GPUs none that sums what lies in the machine's memory, too.
    """
    alone: dict[str, Any] = {"store": HashStore(), "rank": 0, "world_size": 1}
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        timeout=timeout, **(alone if launched_processes() == 1 else {}),
    )  # fmt: skip


def without_weights() -> contextlib.AbstractContextManager[Any]:
    """Build modules whose parameters have shapes alone; buffers are real."""
    return init_empty_weights(include_buffers=False)  # type: ignore[no-any-return]


def refuse_sharding(config: ParallelConfig, verb: str) -> None:
    """Refuse to shard what a verb holds whole.

    Raises:
        UserError: parallel=fsdp2 (78).
    """
    if config.strategy == "fsdp2":
        raise UserError(
            "C222",
            f"{verb} holds the whole model on every process, and parallel=fsdp2 would not",
            hint="parallel=ddp, and no parallel.num_processes but those that are started",
        )


def set_threads(local_processes: int, parameters: int) -> None:
    """Divide the machine's cores among its processes; a lone process keeps OMP_NUM_THREADS if that
    is set.

    Launchers set OMP_NUM_THREADS=1 for several processes whatever the machine, so there it is not
    read. A tiny model gets one thread: its operations are so short that threads mostly wait for
    each other, and for as long as another program takes a core, both stand still. The number
    follows from model and machine alone, since sums depend on it to the last bit.

    Args:
        local_processes: on this machine.
        parameters: of the model.
    """
    if parameters < TINY_MODEL:
        torch.set_num_threads(1)
    elif local_processes > 1 or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, count_cores() // local_processes))


def join(config: ParallelConfig) -> Processes:
    """Join the process group that the launcher set up; see `start_processes`."""
    return Processes(start_processes(config), config)


class Processes:
    """What the trainer needs of its fellow processes.

    Args:
        accelerator: from `start_processes`.
        config: of it; without one nothing is sharded.

    Attributes:
        count: how many there are.
        index: which this is; 0 is the main process.
        device: where this process computes.
        shards: whether each holds a part of the weights alone (FSDP2): whatever computes with them
            then takes all processes, at the same time.
    """

    def __init__(self, accelerator: Accelerator, config: ParallelConfig | None = None) -> None:
        self._accelerator = accelerator
        self._config = config or ParallelConfig()
        self._wrapped: list[nn.Module] = []
        self._group: torch.distributed.ProcessGroup | None = None
        self.shards = self._config.strategy == "fsdp2"
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
        """Put a module on the device and, with several processes, into DDP; one whose weights are
        sharded is as it must be.
        """
        if self.shards:
            return module
        wrapped: nn.Module = self._accelerator.prepare_model(module)
        self._wrapped.append(wrapped)
        return wrapped

    def no_sync(self, module: nn.Module, active: bool) -> contextlib.AbstractContextManager[Any]:
        """Skip the gradient's reduction, on every microbatch but the last; sharded gradients are
        reduced each time, since whole ones would be as large as the model, unless that is asked
        for.
        """
        if self.shards:
            root: Any = module
            root.set_is_last_backward(not active)
            root.set_requires_gradient_sync(self._config.shard_gradients or not active)
            return contextlib.nullcontext()
        return self._accelerator.no_sync(module) if active else contextlib.nullcontext()

    def held_whole(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Hold a module's weights whole for a while, on every process: each can then compute with
        them at its own pace. All enter, and leave.
        """
        if not self.shards:
            return contextlib.nullcontext()
        return held_whole(module, self._config.reshard_after_forward)

    def team(self) -> Processes | None:
        """Give the processes that must write a checkpoint together, with a group of their own, for
        a thread beside the training; None where the main process has all of it.
        """
        if not self.shards or self.count == 1:
            return None
        other = copy.copy(self)
        other._group = torch.distributed.new_group(
            backend="gloo", timeout=timedelta(minutes=self._config.timeout_minutes)
        )
        return other

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
        torch.distributed.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Give every process the values of all, in the order of their index."""
        if self.count == 1:
            return [value]
        box: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(box, value, group=self._group)
        return box

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Do something on the main process alone, and learn on all of them how it ended.

        Raises:
            UserError: what the main process raised; on the others one that says so (its status).
        """
        result, failure = _tried(work) if self.is_main else (None, None)
        told = self.agree(_told(failure))
        if failure is not None:
            raise failure
        if told is not None:
            raise UserError("R208", f"the main process failed: {told[0]}", status=told[1])
        return result

    def on_each(self, work: Callable[[], T]) -> T:
        """Do something on every process, and learn on all of them how it ended.

        Raises:
            UserError: what this process raised; else one that says what another did (its status).
        """
        result, failure = _tried(work)
        told = [what for what in self.gather(_told(failure)) if what is not None]
        if failure is not None:
            raise failure
        if told:
            raise UserError("R208", f"another process failed: {told[0][0]}", status=told[0][1])
        return cast(T, result)

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


def _tried(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as failure:  # raised again, once the others know
        return None, failure


def _told(failure: Exception | None) -> tuple[str, ExitStatus] | None:
    """Put a failure into what another process can be told."""
    if failure is None:
        return None
    if isinstance(failure, UserError):
        return failure.message, failure.status
    reason = system_error(failure)
    return reason or str(failure), ExitStatus.INTERNAL if reason is None else ExitStatus.IO
