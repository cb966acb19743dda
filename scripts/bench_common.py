"""What the benchmarks of this project share: the ladder of arms, a step as training takes it, and
the matrix products that each arm needs. Needs torch and transformers alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from cs336_alignment.data.batching import collate, shared_prefix
from cs336_alignment.data.tokenize import TokenizedExample
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.lm_head import Head
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.loss import StepCounts, loss_slopes, loss_weights, microbatch_loss

Microbatches = Sequence[Sequence[TokenizedExample]]


@dataclass(frozen=True)
class Arm:
    """One way of computing a step; each of the ladder adds one thing to the arm before.

    Attributes:
        name: in tables.
        batching: layout of the rows.
        own_head: False: the model's own forward with logits at every position.
        known_slopes: three matrix products in the head, not four.
    """

    name: str
    batching: Batching
    own_head: bool = True
    known_slopes: bool = True


LADDER = (
    Arm("padded rows, logits everywhere", "padded", own_head=False, known_slopes=False),
    Arm("+ flat rows", "flat", own_head=False, known_slopes=False),
    Arm("+ head on response tokens, in chunks", "flat", known_slopes=False),
    Arm("+ three products in the head", "flat"),
    Arm("+ shared prefix once", "flat_shared_prefix"),
)


def take_step(policy: Policy, head: Head | None, microbatches: Microbatches, arm: Arm) -> float:
    """Run forward and backward over the microbatches; the gradient of the step is then in `.grad`.

    Returns:
        The mean negative log-prob of the response tokens, in nats.
    """
    device = next(policy.parameters()).device
    policy.head = head if arm.own_head else None
    policy.zero_grad(set_to_none=True)
    examples = [example for members in microbatches for example in members]
    tokens = sum(int(example.response_mask.sum()) for example in examples)
    counts = StepCounts(
        num_examples=len(examples), example_weight=float(len(examples)),
        token_weight=float(tokens), num_microbatches=len(microbatches), num_processes=1,
    )  # fmt: skip
    dtype = torch.promote_types(torch.float32, next(policy.parameters()).dtype)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for members in microbatches:
        batch = collate(members, batching=arm.batching).to(device)
        mask, constant = loss_weights("token", batch, counts, 1.0)
        slopes = loss_slopes(mask, constant, dtype) if arm.known_slopes else None
        log_probs, _ = policy(batch, False, slopes)
        microbatch_loss(log_probs, mask, constant).backward()
        total -= log_probs.detach().double().sum()
    return float(total) / tokens


@dataclass(frozen=True)
class Shape:
    """What the cost of a step depends on.

    Attributes:
        body: parameters of the layers, without embeddings.
        vocabulary: rows of the head.
        hidden: width of the head's input.
        layers: number of them.
        attention: heads times head size.
    """

    body: int
    vocabulary: int
    hidden: int
    layers: int
    attention: int

    @staticmethod
    def of(model: PreTrainedModel) -> Shape:
        """Read it from a model."""
        config = model.config.get_text_config()
        ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
        head_size = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        return Shape(
            body=model.num_parameters() - sum(p.numel() for p in ends),
            vocabulary=model.get_output_embeddings().weight.shape[0],
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            attention=config.num_attention_heads * head_size,
        )

    def useful(self, sizes: Iterable[tuple[int, int]]) -> float:
        """Count the FLOPs that examples need, forward and backward, if nothing is shared: each
        layer on every token, attention on what lies before it, the head on response tokens.

        Args:
            sizes: (tokens, response tokens) of each example.
        """
        return sum(
            6.0 * self.body * n
            + 6.0 * self.vocabulary * self.hidden * r
            + 6.0 * self.layers * self.attention * n * n
            for n, r in sizes
        )

    def products(self, microbatches: Microbatches, arm: Arm) -> float:
        """Count the FLOPs of the matrix products that an arm takes, padding and all."""
        total = 0.0
        for members in microbatches:
            lengths = [len(example.input_ids) - 1 for example in members]
            responses = sum(int(example.response_mask.sum()) for example in members)
            prefix = shared_prefix(members) if arm.batching == "flat_shared_prefix" else 0
            longest = max(lengths)
            padded = arm.batching == "padded"
            positions = (
                len(members) * longest if padded else sum(lengths) - prefix * (len(members) - 1)
            )
            seen = [longest**2] * len(members) if padded else [n * n for n in lengths]
            if prefix:
                seen = [prefix**2, *(n * n - prefix**2 for n in lengths)]
            rows = responses if arm.own_head else positions
            passes = 8.0 if arm.own_head and not arm.known_slopes else 6.0
            total += 6.0 * self.body * positions + 6.0 * self.layers * self.attention * sum(seen)
            total += passes * self.vocabulary * self.hidden * rows
        return total


def refuse_apart(apart: Mapping[str, float], bound: float) -> None:
    """End with an error if an arm computes something else: its speed would be no comparison.

    Args:
        apart: arm → how far its loss or gradient is from the reference, relatively.
        bound: what that may be.
    """
    wrong = {name: error for name, error in apart.items() if not error <= bound}
    if wrong:
        named = ", ".join(f"{name} ({error:.0e})" for name, error in wrong.items())
        raise SystemExit(f"not the same work within {bound:.0e}: {named}")


def sizes_of(examples: Iterable[TokenizedExample]) -> list[tuple[int, int]]:
    """Give (tokens, response tokens) of each example."""
    return [(len(e.input_ids), int(e.response_mask.sum())) for e in examples]


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Time a piece of work, on a GPU until it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def product_rate(
    shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, device: torch.device
) -> float:
    """Measure what matrix products (m, k) · (k, n) reach: the median over shapes, in FLOP/s."""
    rates = []
    for m, k, n in shapes:
        a, b = (torch.randn(size, dtype=dtype, device=device) for size in ((m, k), (n, k)))
        out = torch.empty(m, n, dtype=dtype, device=device)
        work = partial(torch.mm, a, b.T, out=out)
        seconds = [seconds_of(work, device) for _ in range(12)]
        rates.append(2 * m * k * n / statistics.median(seconds[2:]))
    return statistics.median(rates)


SMOLLM2_PRODUCTS = ((2048, 576, 1536), (512, 576, 49152))
