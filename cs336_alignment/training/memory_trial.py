"""The worst microbatch, tried for real in a process of its own: its peak is its own, and if memory
does not suffice, nothing else ends with it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from cs336_alignment import quiet
from cs336_alignment.config import Config
from cs336_alignment.cores import keep_freed_memory
from cs336_alignment.data.batching import collate
from cs336_alignment.errors import UserError
from cs336_alignment.machine_memory import (
    forget_peak,
    peak_resident_memory,
    reserved_memory,
    resident_memory,
)
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.loading import open_model
from cs336_alignment.model.policy import Policy
from cs336_alignment.model.recompute import enable_checkpointing
from cs336_alignment.model.trainable import load_to_train
from cs336_alignment.orphans import end_with
from cs336_alignment.tracking.console import Console
from cs336_alignment.training.averaging import build_average
from cs336_alignment.training.batching_choice import choose_batching
from cs336_alignment.training.foresight import PASSES
from cs336_alignment.training.inputs import load_data, plan_of
from cs336_alignment.training.memory import average_bytes
from cs336_alignment.training.optimizer import allocate_state, build_optimizer
from cs336_alignment.training.parallel import set_threads
from cs336_alignment.training.preflight import choose_cut, choose_precision, warm_up_compiled
from cs336_alignment.training.rehearsal import (
    accumulates,
    is_out_of_memory,
    largest_microbatch,
    peak_memory,
    telling_out_of_memory,
    try_microbatch,
    wait_for,
)

LONG_SECONDS = 60.0  # then two passes are enough
LIMIT_SECONDS = 3600.0  # for loading a model and some passes


@dataclass(frozen=True)
class Trial:
    """What a microbatch took.

    Attributes:
        batching: the layout that a run would choose.
        base: bytes of the process before the model is loaded; 0 on a GPU.
        at_microbatch: bytes at the peak of the forward and backward pass.
        at_step: bytes at the peak of the optimizer's step.
        tokens: of the microbatch's examples.
        seconds: of forward and backward.
        step_seconds: of an optimizer's step, its first.
    """

    batching: Batching
    base: int
    at_microbatch: int
    at_step: int
    tokens: int
    seconds: float
    step_seconds: float

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.at_microbatch, self.at_step)


def measure(config: Config, processes: int, room: int) -> Trial | None:
    """Try the worst microbatch of a run in a new process.

    Args:
        config: of the run; data that it names are in the cache.
        processes: among which a step is divided; one of them is tried, alone.
        room: bytes that the new process may take.

    Returns:
        None if memory does not suffice.

    Raises:
        UserError: whatever else stops it.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    request = (__name__, "answer", theirs, config, processes, room, os.getpid())
    child = context.Process(target=quiet.call, args=request, daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(LIMIT_SECONDS):
            raise UserError(
                "R307", f"a microbatch took more than {LIMIT_SECONDS:.0f} s",
                hint="a lower trainer.microbatch_tokens or data.max_length"
            )  # fmt: skip
        result: Trial | UserError | None = ours.recv()
    except EOFError:
        child.join()
        if child.exitcode == -signal.SIGKILL:
            return None  # by the system, for want of memory
        raise UserError(
            "R307", "the process that tried a microbatch failed",
            got=f"exit status {child.exitcode}"
        ) from None  # fmt: skip
    finally:
        child.kill()
        child.join()
    if isinstance(result, UserError):
        raise result
    return result


def answer(link: Connection, config: Config, processes: int, room: int, parent: int) -> None:
    """Answer a request of `measure`, in the process that it started."""
    if not end_with(parent):
        return
    with contextlib.suppress(OSError):  # should memory run out all the same, this one is to go
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    try:
        result: Trial | UserError | None = try_worst(config, processes, room)
    except UserError as error:
        result = None if is_out_of_memory(error.__cause__) else error
    link.send(result)


def try_worst(config: Config, processes: int, room: int | None = None) -> Trial:
    """Do in this process what a run does up to its first step, with its worst microbatch.

    Args:
        config: of the run.
        processes: among which a step is divided.
        room: bytes that this process may take, from now on; None: no bound.

    Raises:
        UserError: memory does not suffice (70), or whatever stops a run.
    """
    trainer = config.trainer
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source, tokenizer = open_model(config.model)
    dtype = choose_precision(trainer.precision, device)
    data = load_data(config, tokenizer, Console(enabled=False))
    if device.type == "cuda":
        base = torch.cuda.memory_allocated(device)
    else:
        keep_freed_memory()
        base = resident_memory() or peak_resident_memory()
    with telling_out_of_memory(device):
        if room is not None:
            _limit(room, device)
        model = load_to_train(
            source, tokenizer, config, device, dtype,
            lambda model: set_threads(processes, model.num_parameters()),
        )  # fmt: skip
        if recompute := trainer.gradient_checkpointing:
            enable_checkpointing(model, selective=recompute == "selective")
        policy = Policy(model, dtype).to(device)
        dataset = data.train.dataset
        longest = int(dataset.lengths.max())
        choice = choose_batching(policy, trainer.batching, longest, trainer.neftune_alpha)
        if trainer.compile:
            warm_up_compiled(policy, choice.batching)
        cut, (plan, steps) = choose_cut(trainer, choice.batching), plan_of(config, data)
        ids = largest_microbatch(
            plan, cut, dataset, steps, num_processes=processes, process_index=0
        )
        optimizer = build_optimizer(model, config.optimizer)
        _forget_peak(device)
        start = time.perf_counter()
        allocate_state(optimizer)  # by a step, while no microbatch has made the process larger
        wait_for(device)
        step_seconds, at_step = time.perf_counter() - start, peak_memory(device)
        build_average(optimizer, trainer.ema_decay)  # of a known size, in the optimizer's state
        at_step += average_bytes(model, trainer.ema_decay)
        _forget_peak(device)
        policy.train()
        several = accumulates(plan, cut, dataset, steps, processes)
        batch = collate([dataset[i] for i in ids], batching=cut.batching).to(device)
        begin = time.perf_counter()
        for index in range(PASSES):  # the heap grows in the first ones
            if not several:
                policy.zero_grad(set_to_none=True)
            start = time.perf_counter()
            try_microbatch(policy, batch)
            wait_for(device)
            seconds = time.perf_counter() - start
            if index and start - begin > LONG_SECONDS:
                break
    tokens = int(dataset.lengths[ids].sum())
    return Trial(choice.batching, base, peak_memory(device), at_step, tokens, seconds, step_seconds)


def _limit(room: int, device: torch.device) -> None:
    """Have the system refuse what goes beyond: an error that can be told, and nobody is killed."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)
        return
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every platform
        import resource

        limit = max(0, room - resident_memory()) + reserved_memory()
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def _forget_peak(device: torch.device) -> None:
    """Let what `peak_memory` gives count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak()


def with_budget(config: Config, tokens: int) -> Config:
    """Give the config with another `trainer.microbatch_tokens`."""
    trainer = replace(config.trainer, microbatch_tokens=tokens, gradient_accumulation_steps=None)
    return replace(config, trainer=trainer)
