"""The loop: steps, and once in a while a log line, an evaluation, a checkpoint."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cs336_alignment.config import OptimizerConfig, TrainerConfig
from cs336_alignment.data.batching import StepPlan
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.checkpoint import TrainState, save_checkpoint
from cs336_alignment.training.optimizer import set_learning_rate
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.schedule import learning_rate
from cs336_alignment.training.step import Cut, StepResult, accumulate_gradients
from cs336_alignment.training.stop import StopNow, StopRequest


class Tracker(Protocol):
    """Where the trainer reports; a silent one stands in on all but the main process."""

    def step(self, step: int, metrics: Mapping[str, float], *, log: bool) -> None:
        """Take one step's metrics; `log`: they go into the files, else only to the progress bar."""

    def sync(self) -> None:
        """Bring what was reported to the disk, before a checkpoint claims those steps."""

    def saved(self, step: int, seconds: float) -> None:
        """Take notice of a checkpoint."""


@dataclass(frozen=True)
class SaveOptions:
    """What a checkpoint needs beside the trainer's own state.

    Attributes:
        checkpoints: the run's folder of checkpoints.
        extra: goes into `trainer_state.json`.
        save_sidecars: writes config and tokenizer into a checkpoint.
    """

    checkpoints: Path
    extra: Mapping[str, Any]
    save_sidecars: Callable[[Path], None]


class Trainer:
    """Trains a policy from its state to the end, or until it is asked to stop.

    Args:
        policy: the module that is saved; its weights and the optimizer's state are already those of
            `state`.
        wrapped: the same module as the processes train it (under DDP, say).
        optimizer: of the policy.
        dataset: the training examples.
        plan: step → example ids.
        cut: of a step into microbatches.
        total_steps: where the run ends.
        state: where it stands.
        trainer: the trainer section.
        optimizer_config: the optimizer section.
        seed: of the run.
        processes: who shares the work.
        tracker: takes metrics.
        evaluate: called with the state's step at the start and with every step done; it knows
            itself when it is due, and raises StopNow, on all processes, if one is asked to stop.
        saving: where checkpoints go.
        stop: a request to stop.
    """

    def __init__(
        self,
        policy: Policy,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: TokenizedDataset,
        *,
        plan: StepPlan,
        cut: Cut,
        total_steps: int,
        state: TrainState,
        trainer: TrainerConfig,
        optimizer_config: OptimizerConfig,
        seed: int,
        processes: Processes,
        tracker: Tracker,
        evaluate: Callable[[int], None],
        saving: SaveOptions,
        stop: StopRequest,
    ) -> None:
        self.policy = policy
        self.wrapped = wrapped
        self.optimizer = optimizer
        self.dataset = dataset
        self.plan = plan
        self.cut = cut
        self.total_steps = total_steps
        self.state = state
        self.config = trainer
        self.optimizer_config = optimizer_config
        self.seed = seed
        self.processes = processes
        self.tracker = tracker
        self.evaluate = evaluate
        self.saving = saving
        self.stop = stop

    def fit(self) -> ExitStatus:
        """Train to the last step; returns DONE, or the status of the request that stopped the run.

        Raises:
            UserError: a loss or gradient that is not finite (70), before it reaches the weights; a
                checkpoint that cannot be written (74).
        """
        self.wrapped.train()
        self.stop.wait_for_steps()
        saved = self.state.step
        try:
            self.evaluate(self.state.step)
            while self.state.step < self.total_steps:
                metrics, asked = self.train_step()
                step, last = self.state.step, self.state.step == self.total_steps
                self.tracker.step(step, metrics, log=is_due(self.config.logging_steps, step))
                # Before the evaluation, which can take long: what is trained is safe.
                if last or asked is not None or is_due(self.config.save_steps, step):
                    self.save()
                    saved = step
                if asked is not None and not last:
                    return asked
                self.evaluate(step)
        except StopNow as request:
            if saved != self.state.step:
                self.save()
            return request.status
        return ExitStatus.DONE

    def train_step(self) -> tuple[dict[str, float], ExitStatus | None]:
        """Take one optimizer step; returns its metrics and a request to stop that any process
        received.
        """
        start, step = time.perf_counter(), self.state.step
        example_ids = self.plan.example_ids(step)
        rate = learning_rate(self.optimizer_config, step, self.total_steps)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        log = is_due(self.config.logging_steps, step + 1)
        result = accumulate_gradients(
            self.wrapped,
            self.dataset,
            example_ids,
            cut=self.cut,
            trainer=self.config,
            processes=self.processes,
            seed=self.seed,
            step=step,
            with_entropy=log,
        )
        grad_norm = nn.utils.clip_grad_norm_(
            self.policy.parameters(), self.optimizer_config.max_grad_norm
        )
        nll, entropy, bad, stopped, interrupted = self._sum(result, grad_norm)
        if bad:
            self._refuse(result, grad_norm)
        self.optimizer.step()
        ids = list(example_ids)
        num_response_tokens = int(self.dataset.response_lengths[ids].sum())
        num_tokens = int(self.dataset.lengths[ids].sum())
        self.state.step += 1
        self.state.tokens_seen += num_tokens
        self.state.response_tokens_seen += num_response_tokens
        seconds = time.perf_counter() - start
        metrics = {
            "train/loss": nll / num_response_tokens,
            "train/grad_norm": float(grad_norm),
            "train/learning_rate": rate,
            "train/epoch": self.state.step / self.plan.steps_per_epoch,
            "train/num_tokens": num_tokens,
            "train/num_response_tokens": num_response_tokens,
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": num_tokens / seconds,
            "perf/peak_memory_gib": peak_memory_gib(self.processes.device),
        }
        if log:
            metrics["train/token_entropy"] = entropy / num_response_tokens
        if interrupted:
            return metrics, ExitStatus.INTERRUPTED
        return metrics, ExitStatus.STOPPED if stopped else None

    def _sum(self, result: StepResult, grad_norm: Tensor) -> list[float]:
        """One reduction a step: loss, entropy, and whether any process met trouble or was asked to
        stop.
        """
        asked = self.stop.status
        bad = result.not_finite.any() | ~grad_norm.isfinite()
        flags = [asked == ExitStatus.STOPPED, asked == ExitStatus.INTERRUPTED]
        sums = torch.stack([result.nll, result.entropy, bad.to(result.nll)])
        sums = torch.cat([sums, torch.tensor(flags, dtype=sums.dtype, device=sums.device)])
        return self.processes.sum(sums).tolist()  # type: ignore[no-any-return]

    def _refuse(self, result: StepResult, grad_norm: Tensor) -> None:
        bad = [
            ids
            for ids, not_finite in zip(result.microbatches, result.not_finite.tolist(), strict=True)
            if not_finite
        ]
        blamed = sorted({i for part in self.processes.gather(bad) for ids in part for i in ids})
        what = "loss" if blamed else "gradient"
        shown = blamed or sorted(self.plan.example_ids(self.state.step))
        raise UserError(
            "R301",
            f"the {what} of step {self.state.step + 1} is not finite; the weights are those of "
            f"step {self.state.step}",
            ExitStatus.INTERNAL,
            got=f"gradient norm {float(grad_norm)}; examples (counted from 0 in the data) "
            f"{', '.join(map(str, shown[:32]))}{' …' if len(shown) > 32 else ''}",
            hint="lower optimizer.learning_rate, or look at these examples",
        )

    def save(self) -> None:
        """Write a checkpoint; what goes wrong on the main process is raised on all of them."""
        start = time.perf_counter()
        failure: UserError | None = None
        if self.processes.is_main:
            self.tracker.sync()
            try:
                save_checkpoint(
                    self.saving.checkpoints,
                    self.state,
                    self.policy.model,
                    self.optimizer,
                    extra=self.saving.extra,
                    save_sidecars=self.saving.save_sidecars,
                    keep=self.config.save_total_limit,
                )
            except UserError as error:
                failure = error
        text = self.processes.agree(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        if text is not None:
            raise UserError(
                "R208", "the main process could not write the checkpoint", ExitStatus.IO
            )
        self.tracker.saved(self.state.step, time.perf_counter() - start)


def is_due(every: int, step: int) -> bool:
    """Tell whether something that comes every so many steps (0: never) comes at this step."""
    return every > 0 and step % every == 0


def peak_memory_gib(device: torch.device) -> float:
    """Give this process's peak memory in GiB: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on every platform

    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
