"""Which examples a step holds, who computes them, and the tensors of a microbatch; all pure
functions.

Everything is derived from (seed, step): a resumed run needs no stored position, and neither the
number of processes nor the cut into microbatches changes what a step trains on.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from cs336_alignment.data.mixture import Mixture
from cs336_alignment.data.tokenize import TokenizedExample
from cs336_alignment.microbatch import Batching, FlatLayout, Microbatch, TokenWeights

Lengths = Sequence[int] | NDArray[np.integer]
# A shared prefix costs copies of its keys: it must be this long and spare this share of the tokens.
MIN_SHARED_TOKENS = 16
MIN_SPARED = 0.05


@dataclass(frozen=True)
class StepPlan:
    """The order of training: step → example ids.

    An epoch has ceil(examples / global_batch_size) steps; its last step is smaller. Without a
    mixture no example is repeated or dropped.

    Attributes:
        num_examples: in the data set, at least 1.
        global_batch_size: examples per optimizer step over all processes.
        seed: of the epochs' permutations.
        shuffle: False keeps the order of the data in every epoch.
        mixture: how several sources are drawn; None: every example once an epoch.
    """

    num_examples: int
    global_batch_size: int
    seed: int
    shuffle: bool = True
    mixture: Mixture | None = None

    @property
    def epoch_size(self) -> int:
        """Examples drawn in an epoch."""
        return self.num_examples if self.mixture is None else sum(self.mixture.draws)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(self.epoch_size / self.global_batch_size)

    def total_steps(self, num_train_epochs: float, max_steps: int | None) -> int:
        """Count the steps of a run; whichever of the two limits comes first ends it."""
        steps = max(1, math.ceil(num_train_epochs * self.steps_per_epoch - 1e-9))
        return steps if max_steps is None else min(steps, max_steps)

    def example_ids(self, step: int) -> tuple[int, ...]:
        """Give the examples of a step, counted from 0, in the order in which they are drawn."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        return tuple(_epoch_order(self, epoch)[start : start + self.global_batch_size].tolist())


@lru_cache(maxsize=2)
def _epoch_order(plan: StepPlan, epoch: int) -> NDArray[np.int64]:
    permutation = _permutation if plan.shuffle else None
    if plan.mixture is not None:
        return plan.mixture.order(plan.seed, epoch, permutation)
    if permutation is None:
        return np.arange(plan.num_examples)
    return permutation(plan.num_examples, plan.seed, epoch)


def _permutation(size: int, seed: int, number: int) -> NDArray[np.int64]:
    generator = torch.Generator().manual_seed(mix_seed(seed, number))
    return torch.randperm(size, generator=generator).numpy()


def mix_seed(*parts: int) -> int:
    """Mix integers into one 63-bit seed, so that neighbouring parts give unrelated streams.

    The steps are those of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
    generators, OOPSLA 2014), folded over the parts.

    Example:
        >>> mix_seed(42, 0) != mix_seed(42, 1) != mix_seed(0, 42)
        True
    """
    mask = 2**64 - 1
    state = 0
    for part in parts:
        state = (state + (part & mask) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def balance(example_ids: Sequence[int], lengths: Lengths, num_bins: int) -> list[list[int]]:
    """Divide examples into bins of nearly equal tokens (longest first, into the emptiest bin).

    Args:
        example_ids: of one step or of one process's slice.
        lengths: tokens of every example of the data set, by id.
        num_bins: processes or microbatches; bins may stay empty if there are fewer examples.

    Returns:
        `num_bins` lists of ids, each in descending order of length; a pure function of the
        arguments.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    emptiest = [(0, 0, index) for index in range(num_bins)]  # a heap of (tokens, examples, bin)
    for example_id in sorted(example_ids, key=lambda i: (-lengths[i], i)):
        load, count, index = emptiest[0]
        bins[index].append(example_id)
        heapq.heapreplace(emptiest, (load + lengths[example_id], count + 1, index))
    return bins


def cut_by_tokens(
    example_ids: Sequence[int], lengths: Lengths, microbatch_tokens: int, *, batching: Batching
) -> list[list[int]]:
    """Cut a process's examples into microbatches of at most `microbatch_tokens` tokens.

    Flat microbatches are balanced by their tokens. Padded ones hold examples of similar length and
    count their padding. A prefix counts in every example, shared or not. An example longer than
    the budget gets a microbatch of its own.

    Args:
        example_ids: the process's examples of this step.
        lengths: tokens of every example, by id.
        microbatch_tokens: the budget.
        batching: of the microbatches.
    """
    if batching == "padded":
        rows: list[list[int]] = []
        for example_id in sorted(example_ids, key=lambda i: (-lengths[i], i)):
            # Longest first, so the first example of a microbatch sets its width.
            if rows and (len(rows[-1]) + 1) * lengths[rows[-1][0]] <= microbatch_tokens:
                rows[-1].append(example_id)
            else:
                rows.append([example_id])
        return rows
    alone = sorted(i for i in example_ids if lengths[i] > microbatch_tokens)
    rest = [i for i in example_ids if lengths[i] <= microbatch_tokens]
    bins = balance(rest, lengths, math.ceil(sum(lengths[i] for i in rest) / microbatch_tokens))
    while any(sum(lengths[i] for i in b) > microbatch_tokens for b in bins):
        bins = balance(rest, lengths, len(bins) + 1)
    return [[i] for i in alone] + bins


def plan_microbatches(
    example_ids: Sequence[int],
    lengths: Lengths,
    *,
    num_processes: int,
    process_index: int,
    microbatch_tokens: int | None,
    gradient_accumulation_steps: int | None,
    batching: Batching,
    in_step: bool = False,
) -> list[list[int]]:
    """Give the microbatches of one step on one process.

    Args:
        example_ids: all examples of the step.
        lengths: tokens of every example of the data set, by id.
        num_processes: how many share the step.
        process_index: which of them this is.
        microbatch_tokens: token budget, or None.
        gradient_accumulation_steps: number of microbatches, or None; exactly one of the two is
            given.
        batching: of the microbatches.
        in_step: give every process as many as the one that has most, the others' last ones empty.

    Returns:
        At least one list of example ids; a single empty one if the process has no example in this
        step.

    Raises:
        ValueError: both or neither of budget and number are given.
    """
    if (microbatch_tokens is None) == (gradient_accumulation_steps is None):
        raise ValueError("give one of microbatch_tokens and gradient_accumulation_steps")

    def cut(ids: list[int]) -> list[list[int]]:
        if microbatch_tokens is not None:
            microbatches = cut_by_tokens(ids, lengths, microbatch_tokens, batching=batching)
        else:
            assert gradient_accumulation_steps is not None
            microbatches = balance(ids, lengths, gradient_accumulation_steps)
        return [microbatch for microbatch in microbatches if microbatch] or [[]]

    shares = balance(example_ids, lengths, num_processes)
    mine = cut(shares[process_index])
    most = max(len(cut(share)) for share in shares) if in_step else len(mine)
    return mine + [[] for _ in range(most - len(mine))]


def shared_prefix(examples: Sequence[TokenizedExample]) -> int:
    """Count the tokens that all examples begin with and that may be computed once for all.

    None of them predicts a trained token. 0 if sharing would not pay.

    Args:
        examples: of a microbatch, at least 2 tokens each.
    """
    if len(examples) < 2:
        return 0
    # Position t predicts token t + 1.
    limit = min(int(example.response_mask[1:].int().argmax()) for example in examples)
    if limit < MIN_SHARED_TOKENS:
        return 0
    starts = torch.stack([example.input_ids[:limit] for example in examples])
    length = int((starts == starts[0]).all(0).int().cumprod(0).sum())
    spared = (len(examples) - 1) * length
    total = sum(len(example.input_ids) - 1 for example in examples)
    return length if length >= MIN_SHARED_TOKENS and spared >= MIN_SPARED * total else 0


def collate(examples: Sequence[TokenizedExample], *, batching: Batching) -> Microbatch:
    """Build the tensors of a microbatch, in the order of the examples.

    Args:
        examples: at least 2 tokens each; none at all gives a filler of one token with nothing
            trained, so that a process without work still takes part in the gradient's reduction.
        batching: one row without padding, its common prefix once or not, or right-padded rows
            (filled with id 0, which nothing reads).
    """
    filler = not examples
    if filler:
        examples = [
            TokenizedExample(torch.zeros(2, dtype=torch.int64), torch.tensor([False, True]), -1)
        ]
    prefix = shared_prefix(examples) if batching == "flat_shared_prefix" else 0
    widths = [len(example.input_ids) - 1 - prefix for example in examples]
    # The one shift: position t predicts token t + 1, so targets and mask move one to the left.
    targets = [example.input_ids[1 + prefix :] for example in examples]
    masks = [example.response_mask[1 + prefix :] for example in examples]
    if batching != "padded":
        row_starts = list(accumulate(widths[:-1], initial=prefix))
        parts = [examples[0].input_ids[:prefix], *(e.input_ids[prefix:-1] for e in examples)]
        positions = [torch.arange(prefix), *(torch.arange(prefix, prefix + n) for n in widths)]
        input_ids, position_ids = torch.cat(parts)[None], torch.cat(positions)[None]
        attention_mask = None
    else:
        stride = max(widths)
        row_starts = [row * stride for row in range(len(examples))]
        input_ids = pad_sequence([example.input_ids[:-1] for example in examples], True)
        position_ids = torch.arange(stride).expand(len(examples), -1)
        attention_mask = position_ids < torch.tensor(widths)[:, None]
    response_index = torch.cat(
        [mask.nonzero().squeeze(1) + start for mask, start in zip(masks, row_starts, strict=True)]
    )
    labels = torch.cat([ids[mask] for ids, mask in zip(targets, masks, strict=True)])
    response_tokens = torch.stack([mask.sum() for mask in masks])
    return Microbatch(
        input_ids=input_ids.long(),
        position_ids=position_ids,
        attention_mask=attention_mask,
        flat_layout=None if batching == "padded" else FlatLayout.of(widths, prefix),
        response_index=response_index,
        labels=labels.long(),
        response_mask=torch.full(labels.shape, not filler),
        example_response_tokens=response_tokens.repeat_interleave(response_tokens),
        num_response_tokens=0 if filler else len(labels),
        weights=_weights(examples),
    )


def _weights(examples: Sequence[TokenizedExample]) -> TokenWeights | None:
    if all(example.weights is None for example in examples):
        return None
    tokens, totals, owners = [], [], []
    for example in examples:
        mask = example.response_mask[1:]
        own = mask if example.weights is None else example.weights[1:]
        token = own[mask].double() * example.example_weight
        tokens.append(token)
        totals.append(token.sum().expand(len(token)))
        owners.append(torch.full_like(token, example.example_weight))
    weights = torch.cat(tokens)
    return TokenWeights(weights, torch.cat(totals), torch.cat(owners), float(weights.sum()))
