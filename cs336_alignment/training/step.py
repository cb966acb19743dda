"""One optimizer step's gradient: the microbatches of this process, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cs336_alignment.config import TrainerConfig
from cs336_alignment.data.batching import Lengths, collate, mix_seed, plan_microbatches
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.data.noise import with_noise
from cs336_alignment.microbatch import Batching, Microbatch
from cs336_alignment.model.objective import Objective
from cs336_alignment.training.loss import (
    StepCounts,
    loss_slopes,
    loss_weights,
    masked_normalize,
    microbatch_loss,
)
from cs336_alignment.training.parallel import Processes


@dataclass(frozen=True)
class Cut:
    """How a step is cut into microbatches; with `token`, `sequence` and `constant` it changes no
    result.

    Attributes:
        microbatch_tokens: token budget of a microbatch, or None.
        gradient_accumulation_steps: microbatches per step and process, or None; exactly one is
            given.
        batching: flat rows, with a shared prefix or not, or padded ones.
    """

    microbatch_tokens: int | None
    gradient_accumulation_steps: int | None
    batching: Batching

    def of_process(
        self, example_ids: Sequence[int], lengths: Lengths, count: int, index: int,
        in_step: bool = False,
    ) -> list[list[int]]:  # fmt: skip
        """Give the microbatches of one of `count` processes; see `plan_microbatches`."""
        return plan_microbatches(
            example_ids, lengths, **asdict(self), num_processes=count, process_index=index,
            in_step=in_step,
        )  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A step before it begins.

    Attributes:
        example_ids: those of the step, over all processes.
        microbatches: the example ids of each, on this process.
        first: the first microbatch, on the device.
    """

    example_ids: tuple[int, ...]
    microbatches: list[list[int]]
    first: Microbatch


def prepare(
    dataset: TokenizedDataset, example_ids: Sequence[int], cut: Cut, processes: Processes
) -> Prepared:
    """Cut a step and collate its first microbatch. The others are made while the one before them is
    computed; the first has none before it, so the trainer asks for it while the last step still
    runs.
    """
    microbatches = cut.of_process(
        example_ids, dataset.lengths, processes.count, processes.index, processes.shards
    )
    first = _collate(dataset, microbatches[0], cut, processes)
    return Prepared(tuple(example_ids), microbatches, first)


def _collate(
    dataset: TokenizedDataset, ids: Sequence[int], cut: Cut, processes: Processes
) -> Microbatch:
    return collate([dataset[i] for i in ids], batching=cut.batching).to(processes.device)


@dataclass(frozen=True)
class StepResult:
    """What a step's forward passes showed, on this process.

    Attributes:
        nll: scalar float64 tensor, the summed negative log-prob of the response tokens, in nats.
        entropy: scalar float64 tensor, the summed entropy at those positions; 0 if not asked for.
        objective: scalar float64 tensor, this process's share of what was minimized (see
            `loss_weights`); 0 if that is the negative log-probs themselves.
        not_finite: (microbatches,) bool tensor, True where a microbatch's loss is not finite.
        microbatches: the example ids of each.
        complete: whether all were done; if not, the gradient is to be thrown away.
    """

    nll: Tensor
    entropy: Tensor
    objective: Tensor
    not_finite: Tensor
    microbatches: list[list[int]]
    complete: bool


def objective_of(trainer: TrainerConfig) -> Objective | None:
    """Give what is trained instead of the log-probs; None: nothing is."""
    chosen = Objective(trainer.label_smoothing, trainer.z_loss, trainer.loss == "dft")
    return None if chosen == Objective() else chosen


def accumulate_gradients(
    policy: nn.Module,
    dataset: TokenizedDataset,
    example_ids: Sequence[int],
    *,
    cut: Cut,
    trainer: TrainerConfig,
    processes: Processes,
    seed: int,
    step: int,
    prepared: Prepared | None = None,
    with_entropy: bool = False,
    give_up: Callable[[], bool] = lambda: False,
) -> StepResult:
    """Calls backward for every microbatch of the step; the gradient of the whole step is then in
    `.grad`.

    Args:
        policy: the (wrapped) policy, with gradients cleared.
        dataset: all examples.
        example_ids: those of this step, over all processes.
        cut: into microbatches.
        trainer: its objective, the loss's normalization and the embeddings' noise are read.
        processes: who shares the step.
        seed: of the run.
        step: 0-based; with the seed it fixes dropout and noise.
        prepared: the step as `prepare` made it, of these examples; None: it is made now.
        with_entropy: also sum the token entropies.
        give_up: asked before each microbatch; once it says True, only the last one is still done,
            since the other processes wait for its reduction. Where each holds a part of the weights
            they wait for all of them: those that are left are then done empty.
    """
    prepared = prepared or prepare(dataset, example_ids, cut, processes)
    assert prepared.example_ids == tuple(example_ids)
    microbatches, ids = prepared.microbatches, list(example_ids)
    counts = StepCounts(
        num_examples=len(example_ids),
        example_weight=float(dataset.example_weights[ids].sum(dtype=np.float64)),
        token_weight=float(dataset.token_weights[ids].sum()),
        num_microbatches=len([ids for ids in microbatches if ids]) or 1,
        num_processes=processes.count,
    )
    nll = torch.zeros((), dtype=torch.float64, device=processes.device)
    entropy_sum, objective_sum = torch.zeros_like(nll), torch.zeros_like(nll)
    objective = objective_of(trainer)
    not_finite = torch.zeros(len(microbatches), dtype=torch.bool, device=processes.device)
    complete = True
    dtype = torch.promote_types(torch.float32, next(policy.parameters()).dtype)
    for index, members in enumerate(microbatches):
        last = index == len(microbatches) - 1
        batch = None if index else prepared.first
        if give_up() and not last:
            complete = False
            if not processes.shards:
                continue
            members, batch = [], None
        if batch is None:
            batch = _collate(dataset, members, cut, processes)
        if trainer.neftune_alpha is not None:
            batch = with_noise(
                batch, members, dataset.lengths, alpha=trainer.neftune_alpha, seed=seed, step=step
            )
        # Dropout is a function of where the run stands, so a resumed run draws the same.
        torch.manual_seed(mix_seed(seed, step, index, processes.index))
        mask, constant = loss_weights(
            trainer.loss_normalization, batch, counts, trainer.normalize_constant
        )
        with processes.no_sync(policy, active=not last):
            values, entropy, *seen = policy(
                batch, with_entropy, loss_slopes(mask, constant, dtype), objective
            )
            loss = microbatch_loss(values, mask, constant)
            # Not accelerator.backward, which would divide by an accumulation of its own.
            loss.backward()
        log_probs = seen[0] if seen else values
        nll -= masked_normalize(log_probs.detach().double(), batch.response_mask)
        if entropy is not None:
            entropy_sum += masked_normalize(entropy.double(), batch.response_mask)
        if objective is not None:
            objective_sum += loss.detach()
        not_finite[index] = ~loss.detach().isfinite()
    return StepResult(nll, entropy_sum, objective_sum, not_finite, microbatches, complete)
