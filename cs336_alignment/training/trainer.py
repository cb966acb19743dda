"""The loop: steps, and once in a while a log line, an evaluation, a checkpoint."""

from __future__ import annotations

import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import compress

import torch
from torch import Tensor, nn

from cs336_alignment.config import OptimizerConfig, TrainerConfig
from cs336_alignment.data.batching import StepPlan
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.model.compile import compiled_graphs
from cs336_alignment.model.policy import Policy
from cs336_alignment.tracking.tracker import RunTracker
from cs336_alignment.training.averaging import Average, NoAverage
from cs336_alignment.training.best import Verdict
from cs336_alignment.training.checkpoint_writer import CheckpointWriter
from cs336_alignment.training.optimizer import clip_gradients, set_learning_rate
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.rehearsal import peak_memory
from cs336_alignment.training.schedule import learning_rate
from cs336_alignment.training.snapshot import TrainState
from cs336_alignment.training.spike import SPIKE_WINDOW, is_spike
from cs336_alignment.training.step import (
    Cut,
    Prepared,
    StepResult,
    accumulate_gradients,
    objective_of,
    prepare,
)
from cs336_alignment.training.stop import StopNow

IDS_SHOWN = 32


# What is added over the processes at each step; the flags count processes.
_Sums = namedtuple("_Sums", "nll entropy objective not_finite asked interrupted incomplete written")


@dataclass
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
        tracker: takes metrics; silent on all but the main process.
        evaluate: called with the state's step at the start and with every step done; it knows
            itself when it is due, gives the same verdict on all processes, and raises StopNow, on
            all of them, if one is asked to stop.
        writer: of checkpoints.
        poll: called at every microbatch; gives the exit status of a request to stop, or None.
        average: of the weights, which checkpoints show; None: there is none.
    """

    policy: Policy
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    dataset: TokenizedDataset
    _: KW_ONLY
    plan: StepPlan
    cut: Cut
    total_steps: int
    state: TrainState
    trainer: TrainerConfig
    optimizer_config: OptimizerConfig
    seed: int
    processes: Processes
    tracker: RunTracker
    evaluate: Callable[[int], Verdict]
    writer: CheckpointWriter
    poll: Callable[[], ExitStatus | None]
    average: Average = field(default_factory=NoAverage)

    def __post_init__(self) -> None:
        self._next: Prepared | None = None  # the step that comes, made while one is computed
        self._best: int | None = None
        self._writing: int | None = None  # the step whose checkpoint is being written

    def fit(self) -> ExitStatus:
        """Train to the last step, or until no evaluation finds a better one; returns DONE, or the
        status of the request that stopped the run.

        Raises:
            UserError: a loss or gradient that is not finite (70), before it reaches the weights; a
                checkpoint that cannot be written (74).
        """
        self.wrapped.train()
        self._saved = self.state.step
        outcome = ExitStatus.DONE
        try:
            try:
                self._take_steps()
            except StopNow as request:
                outcome = request.status
            if self._saved != self.state.step:
                self.save()
            self.settle()
        except BaseException:
            self._settle_alone()
            raise
        return outcome

    def _settle_alone(self) -> None:
        """Wait for what is being written while another error is on its way, and tell of it."""
        if self._writing is None or not (self.processes.is_main or self.writer.team):
            return
        try:
            self.tracker.saved(self._writing, self.writer.finish())
        except Exception as failure:
            self.tracker.warn(f"the checkpoint of step {self._writing} failed, too: {failure}")

    def _take_steps(self) -> None:
        enough = self._evaluate()
        while self.state.step < self.total_steps and not enough:
            metrics, asked = self.train_step()
            step, last = self.state.step, self.state.step == self.total_steps
            self.tracker.step(step, metrics, log=is_due(self.trainer.logging_steps, step))
            if asked is not None and not last:
                raise StopNow(asked)
            # Before the evaluation, which can take long: what is trained is safe.
            if last or is_due(self.trainer.save_steps, step):
                self.save()
            enough = self._evaluate()

    def _evaluate(self) -> bool:
        """Evaluate if that is due, and keep the best step; True: no better one is waited for.

        A kill at any place costs nothing: without a checkpoint the step is done and evaluated
        again, and with one the best step follows from the metrics alone.
        """
        verdict, step = self.evaluate(self.state.step), self.state.step
        best = verdict.best
        if best is not None and best.step != self._best:
            if best.step == step and not verdict.saved and self._writing != step:
                self.save()
            self.settle()
            self._best, latest = best.step, self._saved
            self.processes.on_main(lambda: self.writer.mark_best(best.step, latest))
        return verdict.stop

    def train_step(self) -> tuple[dict[str, float], ExitStatus | None]:
        """Take one optimizer step; returns its metrics and a request to stop that any process
        received.

        Raises:
            StopNow: on all processes, if the request came while one of them still had microbatches
                to do: the step is given up.
        """
        start, step = time.perf_counter(), self.state.step
        example_ids = self.plan.example_ids(step)
        rate = learning_rate(self.optimizer_config, step, self.total_steps)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        log = is_due(self.trainer.logging_steps, step + 1)
        result = accumulate_gradients(
            self.wrapped,
            self.dataset,
            example_ids,
            cut=self.cut,
            trainer=self.trainer,
            processes=self.processes,
            seed=self.seed,
            step=step,
            prepared=self._next,
            with_entropy=log,
            give_up=lambda: self.poll() is not None,
        )
        grad_norm = clip_gradients(self.policy, self.optimizer_config.max_grad_norm)
        self._next = None
        if step + 1 < self.total_steps:  # on a GPU, before the host waits for this step's end
            following = self.plan.example_ids(step + 1)
            self._next = prepare(self.dataset, following, self.cut, self.processes)
        sums = self._sum(result, grad_norm)
        asked = None
        if sums.asked:
            asked = ExitStatus.INTERRUPTED if sums.interrupted else ExitStatus.STOPPED
            if sums.incomplete:
                raise StopNow(asked)
        if sums.written:
            self.settle()
        if sums.not_finite:
            self._refuse(result, grad_norm)
        ids = list(example_ids)
        num_response_tokens = int(self.dataset.response_lengths[ids].sum())
        num_tokens = int(self.dataset.lengths[ids].sum())
        loss = sums.nll / num_response_tokens
        if self._is_sound(loss, ids):
            self.optimizer.step()
            self.average.update()
        self.state.step += 1
        self.state.tokens_seen += num_tokens
        self.state.response_tokens_seen += num_response_tokens
        seconds = time.perf_counter() - start
        metrics = {
            "train/loss": loss,
            "train/grad_norm": float(grad_norm),
            "train/learning_rate": rate,
            "train/epoch": self.state.step / self.plan.steps_per_epoch,
            "train/num_tokens": num_tokens,
            "train/num_response_tokens": num_response_tokens,
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": num_tokens / seconds,
            "perf/peak_memory_gib": peak_memory(self.processes.device) / 2**30,
        }
        if objective_of(self.trainer) is not None:
            metrics["train/objective"] = sums.objective / self.processes.count
        if self.trainer.compile:
            metrics["perf/compiled_graphs"] = compiled_graphs()
        if log:
            metrics["train/token_entropy"] = sums.entropy / num_response_tokens
        if self.trainer.loss_spike == "skip":
            metrics["train/skipped_steps"] = self.state.skipped_steps
        return metrics, asked

    def _sum(self, result: StepResult, grad_norm: Tensor) -> _Sums:
        """One reduction a step, of all that the processes must know of each other."""
        asked = self.poll()
        own = _Sums(
            nll=result.nll,
            entropy=result.entropy,
            objective=result.objective,
            not_finite=result.not_finite.any() | ~grad_norm.isfinite(),
            asked=asked is not None,
            interrupted=asked == ExitStatus.INTERRUPTED,
            incomplete=not result.complete,
            written=self._writing is not None and self.writer.has_ended,
        )
        device = self.processes.device
        values = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in own]
        return _Sums(*self.processes.sum(torch.stack(values)).tolist())

    def _is_sound(self, loss: float, example_ids: Sequence[int]) -> bool:
        """Compare a step's loss with those before it; False: the step is to be left out."""
        recent, policy = self.state.recent_losses, self.trainer.loss_spike
        spiked = policy != "off" and is_spike(loss, recent, self.trainer.loss_spike_nats)
        recent.append(loss)
        del recent[:-SPIKE_WINDOW]
        if not spiked:
            return True
        step = self.state.step + 1
        text = (
            f"loss spike at step {step}: {loss:.4f} nats a token, more than "
            f"{self.trainer.loss_spike_nats:g} above the median of the steps before; examples "
            f"(counted from 0 in the data) {show_ids(sorted(example_ids))}"
        )
        if policy == "stop":
            raise UserError(
                "R302",
                text,
                hint=f"the weights are those of step {step - 1}. Look at these examples, lower "
                "optimizer.learning_rate, or leave such steps out: trainer.loss_spike=skip",
            )
        if policy == "skip":
            self.state.skipped_steps += 1
            text += "; the step is left out"
        self.tracker.warn(text)
        return policy != "skip"

    def _refuse(self, result: StepResult, grad_norm: Tensor) -> None:
        bad = list(compress(result.microbatches, result.not_finite.tolist()))
        blamed = sorted({i for part in self.processes.gather(bad) for ids in part for i in ids})
        what = "loss" if blamed else "gradient"
        shown = blamed or sorted(self.plan.example_ids(self.state.step))
        raise UserError(
            "R301",
            f"the {what} of step {self.state.step + 1} is not finite; the weights are those of "
            f"step {self.state.step}",
            got=f"gradient norm {float(grad_norm)}; examples (counted from 0 in the data) "
            f"{show_ids(shown)}",
            hint="lower optimizer.learning_rate, or look at these examples",
        )

    def save(self) -> None:
        """Write a checkpoint, or begin to, once the one before is written."""
        self.settle()
        self._writing = self._saved = self.state.step
        self.tracker.sync()
        if self.processes.is_main or self.writer.team:
            with self.average.shown():
                self.writer.begin(self.state, self.policy.model, self.optimizer)
        if not self.writer.asynchronous:
            self.settle()

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, if one is; what goes wrong on the main
        process is raised on all of them.
        """
        if self._writing is None:
            return
        step, self._writing = self._writing, None
        if self.writer.team is None:
            self.processes.on_main(lambda: self.tracker.saved(step, self.writer.finish()))
        else:  # all of them know how it ended
            self.tracker.saved(step, self.writer.finish())


def show_ids(example_ids: Sequence[int]) -> str:
    """Write the first of some example ids down."""
    more = " …" if len(example_ids) > IDS_SHOWN else ""
    return ", ".join(map(str, example_ids[:IDS_SHOWN])) + more


def is_due(every: int, step: int) -> bool:
    """Tell whether something that comes every so many steps (0: never) comes at this step."""
    return every > 0 and step % every == 0
