"""One small batch's loss and gradient by every way the framework has, and by plain transformers.

B rows, S positions, L tokens of one example.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from cs336_alignment.config import TrainerConfig
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.data.tokenize import TokenizedExample, TokenRow
from cs336_alignment.errors import first_few, first_line
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.attention import FLAT_ATTENTION
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.step import Cut, accumulate_gradients


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: what was compared.
        difference: the largest relative difference; None where nothing is measured.
        bound: what it may be.
        passed: None if the check does not apply.
        text: what a person should know about it.
    """

    name: str
    difference: float | None
    bound: float | None
    passed: bool | None
    text: str = ""

    @property
    def verdict(self) -> str:
        """The outcome in a word."""
        return {True: "pass", False: "FAIL", None: "does not apply"}[self.passed]


def guarded(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield what a check finds; one that breaks off has failed, and the others still run."""
    try:
        yield from check()
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:
        reason = first_line(failure)
        yield Finding(name, None, None, False, f"broke off: {type(failure).__name__}: {reason}")


@dataclass(frozen=True)
class Gradient:
    """What one way of computing the step gives.

    Attributes:
        nll: the summed negative log-prob of the trained tokens, in nats.
        tensors: parameter → gradient; one that got none is not there.
    """

    nll: float
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """What is examined, and the ways in which its step is computed.

    Attributes:
        policy: in eval mode, in which dropout, router noise and the like are off: with them two
            ways could not be compared.
        dataset: a few short examples.
        processes: this one alone.
        plain_attention: the attention the model was loaded with.
        not_flat: why training does not give the model flat rows; None: it does.
        chosen: the trainer section of the run, for its objective and noise.
        may_freeze: whether parameters are left out of training on purpose.
    """

    policy: Policy
    dataset: TokenizedDataset
    processes: Processes
    plain_attention: str
    not_flat: str | None
    chosen: TrainerConfig
    may_freeze: bool = False

    def step(
        self,
        microbatches: int,
        batching: Batching,
        normalization: str = "token",
        *,
        chosen: bool = False,
    ) -> Gradient:
        """Calls backward for one step over all examples, as training does; `chosen`: with the run's
        objective and noise.
        """
        trainer = replace(self.chosen, normalize_constant=1.0) if chosen else TrainerConfig()
        self.policy.zero_grad(set_to_none=True)
        result = accumulate_gradients(
            self.policy, self.dataset, range(len(self.dataset)),
            cut=Cut(None, microbatches, batching),
            trainer=replace(trainer, loss_normalization=normalization),
            processes=self.processes, seed=0, step=0,
        )  # fmt: skip
        return Gradient(float(result.nll), take_gradient(self.policy.model))

    def plain(
        self,
        normalization: str = "token",
        *,
        together: bool = False,
        scale: float = 1.0,
        chosen: bool = False,
    ) -> Gradient:
        """Calls backward for the same step with torch and transformers alone, nothing of this
        project between: example by example, or in one padded batch, the last example first.

        Args:
            normalization: of the loss.
            together: one padded batch.
            scale: the loss is multiplied and its gradient divided by it, which changes nothing but
                rounding.
            chosen: the run's objective, not its noise.
        """
        self.policy.zero_grad(set_to_none=True)
        examples = [self.dataset[i] for i in range(len(self.dataset))]
        shares = [share * scale for share in _shares(examples, normalization)]
        pairs = list(zip(examples, shares, strict=True))
        nll = 0.0
        with self.untouched():
            for group in [pairs[::-1]] if together else [[pair] for pair in pairs]:
                nll += self._plain_backward(group, self.chosen if chosen else TrainerConfig())
        found = take_gradient(self.policy.model)
        return Gradient(nll, {name: tensor / scale for name, tensor in found.items()})

    def _plain_backward(
        self, group: Sequence[tuple[TokenizedExample, Tensor]], trainer: TrainerConfig
    ) -> float:
        width = max(len(example.input_ids) for example, _ in group)
        ids = torch.zeros((len(group), width), dtype=torch.int64)
        real, weights = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.float64)
        for row, (example, share) in enumerate(group):
            length = len(example.input_ids)
            ids[row, :length], real[row, :length] = example.input_ids, 1
            weights[row, :length] = share
        ids, real, weights = (x.to(self.processes.device) for x in (ids, real, weights))
        logits = self.policy.model(ids[:, :-1], attention_mask=real[:, :-1], use_cache=False).logits
        trained = weights[:, 1:] > 0
        # In float64: torch's float32 softmax over a large vocabulary is off by 3e-5 on a CPU.
        scores, labels = logits[trained].double(), ids[:, 1:][trained]
        nll = nn.functional.cross_entropy(scores, labels, reduction="none")
        loss = nll * (-nll.detach()).exp() if trainer.loss == "dft" else nll
        if trainer.label_smoothing:
            loss = nn.functional.cross_entropy(
                scores, labels, reduction="none", label_smoothing=trainer.label_smoothing
            )
        if trainer.z_loss:
            loss = loss + trainer.z_loss * scores.logsumexp(-1).square()
        (loss * weights[:, 1:][trained]).sum().backward()
        return float(nll.detach().sum())

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Give the model back its own attention for a moment."""
        model = self.policy.model
        switched = model.config._attn_implementation == FLAT_ATTENTION
        if switched:
            model.set_attn_implementation(self.plain_attention)
        try:
            yield
        finally:
            if switched:
                model.set_attn_implementation(FLAT_ATTENTION)


def take_gradient(model: nn.Module) -> Mapping[str, Tensor]:
    """Move the gradients out of a model."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _shares(examples: Sequence[TokenizedExample], normalization: str) -> list[Tensor]:
    """Give what each token of each example weighs in the loss of the step, written out anew."""
    own = [(e.response_mask if e.weights is None else e.weights).double() for e in examples]
    weights = [e.example_weight for e in examples]
    if normalization == "sequence":
        return [w * o / o.sum() / sum(weights) for w, o in zip(weights, own, strict=True)]
    total = sum(w * float(o.sum()) for w, o in zip(weights, own, strict=True))
    return [w * o / total for w, o in zip(weights, own, strict=True)]


def plain_log_probs(model: nn.Module, dataset: TokenizedDataset, device: torch.device) -> Tensor:
    """Compute the log-probs of all trained tokens with transformers' logits and a float64 softmax,
    example by example, (R,).
    """
    parts = []
    with torch.no_grad():
        for number in range(len(dataset)):
            example = dataset[number]
            ids, trained = example.input_ids.to(device), example.response_mask[1:].to(device)
            logits = model(ids[None, :-1], use_cache=False).logits[0, trained].double()
            picked = logits.log_softmax(-1).gather(1, ids[1:][trained][:, None])
            parts.append(picked.squeeze(1))
    return torch.cat(parts)


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


def begin_alike(dataset: TokenizedDataset, num_tokens: int) -> TokenizedDataset:
    """Put the same tokens before every example, as context that is not trained."""
    start = np.resize(dataset[0].input_ids.int().numpy(), num_tokens)
    rows = []
    for number in range(len(dataset)):
        example = dataset[number]
        own = example.response_mask.float() if example.weights is None else example.weights
        rows.append(TokenRow.of_weights(
            np.concatenate([start, example.input_ids.int().numpy()]),
            np.concatenate([np.zeros(num_tokens, np.float32), own.numpy()]),
            example.example_weight,
        ))  # fmt: skip
    return TokenizedDataset.of(rows)


def relative_difference(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> tuple[float, str, float]:
    """Compute ‖a − b‖ / ‖b‖ over all parameters, and name the parameter that differs most.

    A parameter that only one side has counts with its whole norm.

    Returns:
        The number, the name, and what the number would be if only that parameter differed.
    """
    apart, norm, worst, name_of_worst = 0.0, 0.0, -1.0, ""
    for name in dict.fromkeys([*a, *b]):
        x, y = a.get(name), b.get(name)
        rest = y if x is None else x if y is None else x.double() - y.double()
        assert rest is not None
        own = float(rest.double().norm())
        apart += own**2
        norm += 0.0 if y is None else float(y.double().norm()) ** 2
        if not own <= worst:  # NaN is worst of all
            worst, name_of_worst = own, name
    if not norm:
        return float("inf"), name_of_worst, float("inf")
    return (apart / norm) ** 0.5, name_of_worst, worst / norm**0.5


def apart_by(got: Tensor, want: Tensor) -> float:
    """Compute max |got − want| / max |want|; infinite if there are not as many tokens."""
    if got.shape != want.shape:
        return float("inf")
    return float((got - want).abs().max() / want.abs().max())


def differing(got: nn.Module, want: nn.Module) -> str:
    """Name the tensors that are not the same to the last bit; the log-probs read not all of
    them.
    """
    a, b = got.state_dict(), want.state_dict()
    names = [n for n in {**a, **b} if n not in a or n not in b or not torch.equal(a[n], b[n])]
    return f"differs: {first_few(names)}" if names else ""


def has_nothing(gradient: Gradient, name: str) -> bool:
    """Tell whether a parameter got no gradient, or one of zeros alone."""
    return name not in gradient.tensors or not bool(gradient.tensors[name].any())


@contextlib.contextmanager
def in_training(layers: Sequence[nn.Module]) -> Iterator[list[None]]:
    """Put these modules, not what is inside them, into training mode, without which transformers
    does not checkpoint. Their own dropouts (numbers, not modules) are 0 for the moment.

    Yields:
        A list that grows by one whenever the last layer computes.
    """
    before = [(layer, name, value) for layer in layers for name, value in vars(layer).items()
              if "drop" in name and isinstance(value, float)]  # fmt: skip
    calls: list[None] = []
    inside = next(layers[-1].children())  # a hook of the layer itself would not see it recomputed
    handle = inside.register_forward_pre_hook(lambda *_: calls.append(None))
    for layer, name, _ in before:
        setattr(layer, name, 0.0)
    for layer in layers:
        layer.training = True
    try:
        yield calls
    finally:
        handle.remove()
        for layer in layers:
            layer.training = False
        for layer, name, value in before:
            setattr(layer, name, value)
