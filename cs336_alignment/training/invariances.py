"""Gradients of one small batch by several ways, and how far two of them are apart.

B rows, S positions, L tokens of one example.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cs336_alignment.config import TrainerConfig
from cs336_alignment.data.batching import collate
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.data.tokenize import TokenizedExample, TokenRow
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.step import Cut, accumulate_gradients

Gradient = Mapping[str, Tensor]


def cut_short(dataset: TokenizedDataset, count: int, length: int) -> TokenizedDataset:
    """Take the first examples, each cut to a length that still trains something.

    Args:
        dataset: of the run.
        count: examples, if there are so many.
        length: tokens of each at most.
    """
    rows = []
    for number in range(min(count, len(dataset))):
        example = dataset[number]
        first = int(example.response_mask.nonzero()[0])
        start = 0 if first < length else first - length // 2
        window = slice(start, start + length)
        own = example.response_mask.float() if example.weights is None else example.weights
        rows.append(TokenRow.of_weights(
            example.input_ids[window].int().numpy(), own[window].numpy(), example.example_weight
        ))  # fmt: skip
    return TokenizedDataset.of(rows)


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Set every dropout to 0 for a moment; the model stays in training mode, which some of
    transformers' paths (checkpointing) depend on.
    """
    before: list[tuple[Any, str, float]] = []
    for module in model.modules():
        names = [name for name in vars(module) if "drop" in name]
        names += ["p"] if isinstance(module, nn.Dropout) else []
        for name in names:
            value = getattr(module, name)
            if isinstance(value, float) and value > 0:
                before.append((module, name, value))
                setattr(module, name, 0.0)
    training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(training)
        for module, name, value in before:
            setattr(module, name, value)


def step_gradient(
    policy: Policy,
    dataset: TokenizedDataset,
    processes: Processes,
    *,
    microbatches: int,
    flat: bool,
    normalization: str = "token",
) -> Gradient:
    """Compute the gradient of one step over all examples as training does."""
    policy.zero_grad(set_to_none=True)
    accumulate_gradients(
        policy, dataset, range(len(dataset)), cut=Cut(None, microbatches, flat),
        trainer=TrainerConfig(loss_normalization=normalization), processes=processes, seed=0,
        step=0,
    )  # fmt: skip
    return take_gradient(policy.model)


def take_gradient(model: nn.Module) -> Gradient:
    """Move the gradients out of a model."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def plain_gradient(
    model: PreTrainedModel, dataset: TokenizedDataset, *, together: bool
) -> Gradient:
    """Compute the same gradient with transformers and torch alone, nothing of this project between.

    Args:
        model: with its own attention.
        dataset: the examples; their weights enter as with `token`.
        together: all rows in one padded batch, or one after another without padding.
    """
    model.zero_grad(set_to_none=True)
    examples = [dataset[i] for i in range(len(dataset))]
    total = sum(float(_weights(example).sum()) for example in examples)
    for group in [examples] if together else [[example] for example in examples]:
        width = max(len(example.input_ids) for example in group)
        ids = torch.zeros((len(group), width), dtype=torch.int64)
        real = torch.zeros_like(ids)
        weights = torch.zeros((len(group), width), dtype=torch.float64)
        for row, example in enumerate(group):
            length = len(example.input_ids)
            ids[row, :length], real[row, :length] = example.input_ids, 1
            weights[row, :length] = _weights(example)
        ids, real, weights = (x.to(model.device) for x in (ids, real, weights))
        output = model(ids[:, :-1], attention_mask=real[:, :-1], use_cache=False)
        # In float64: torch's float32 softmax over a large vocabulary is off by 3e-5 on a CPU.
        trained = weights[:, 1:] > 0
        nll = nn.functional.cross_entropy(
            output.logits[trained].double(), ids[:, 1:][trained], reduction="none"
        )
        (nll * weights[:, 1:][trained] / total).sum().backward()
    return take_gradient(model)


def _weights(example: TokenizedExample) -> Tensor:
    own = example.response_mask.double() if example.weights is None else example.weights.double()
    return own * example.example_weight


def log_probs(policy: Policy, dataset: TokenizedDataset, *, flat: bool) -> Tensor:
    """Compute the log-probs of all trained tokens as training does, (R,)."""
    batch = collate([dataset[i] for i in range(len(dataset))], flat=flat)
    with torch.no_grad():
        found: Tensor = policy(batch.to(next(policy.parameters()).device))[0]
    return found


def plain_log_probs(model: PreTrainedModel, dataset: TokenizedDataset) -> Tensor:
    """Compute the same with transformers' logits and a float64 softmax, row by row, (R,)."""
    parts = []
    with torch.no_grad():
        for number in range(len(dataset)):
            example = dataset[number]
            ids = example.input_ids.to(model.device)
            logits = model(ids[None, :-1], use_cache=False).logits[0].double()
            picked = logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
            parts.append(picked[example.response_mask[1:].to(model.device)])
    return torch.cat(parts)


def relative_difference(a: Gradient, b: Gradient) -> tuple[float, str]:
    """Compute ‖a − b‖ / ‖b‖ over all parameters, in float64, and name the one that differs most.

    A parameter that only one side has counts with its whole norm.
    """
    apart, norm, worst = 0.0, 0.0, (0.0, "")
    for name in dict.fromkeys([*a, *b]):
        x, y = a.get(name), b.get(name)
        reference = x if y is None else y
        assert reference is not None
        own = float(reference.double().norm()) if x is None or y is None else float(
            (x.double() - y.double()).norm()
        )  # fmt: skip
        apart += own**2
        norm += 0.0 if y is None else float(y.double().norm()) ** 2
        worst = max(worst, (own, name))
    return (apart / norm) ** 0.5 if norm else float("inf"), worst[1]
