"""What each idea brings: padded rows with logits everywhere, then one thing more an arm.

    python scripts/bench_ablation.py MODEL train.jsonl [--rounds 5] [--compile]

MODEL is a model folder, the file holds GSM8K rows; microbatches of 8 in float32, forward and
backward. The arms of the ladder take turns in one process; compiled layers, which cannot be undone,
come after them (`--compile`, which takes a minute). Prints for each the seconds a step (median),
the gain over the arm before, what the matrix products alone predict, the share of what matrix
products reached beside it, and how far its gradient is from the first arm's; exit status 1 if that
is more than 1e-5.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from bench_common import (
    LADDER,
    SMOLLM2_PRODUCTS,
    Arm,
    Shape,
    product_rate,
    refuse_apart,
    seconds_of,
    sizes_of,
    take_step,
)
from rich.progress import track

from cs336_alignment.config import DataConfig
from cs336_alignment.cores import keep_freed_memory
from cs336_alignment.data.batching import collate
from cs336_alignment.data.splits import prepare_run
from cs336_alignment.data.tokenize import TokenizedExample
from cs336_alignment.model.loading import load_model, load_tokenizer
from cs336_alignment.model.policy import Policy
from cs336_alignment.model.source import resolve_model
from cs336_alignment.training.preflight import warm_up_compiled

EXAMPLES = 8


@dataclass
class Found:
    """What was measured of an arm; `rates`: of matrix products beside it, FLOP/s."""

    arm: Arm
    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    loss: float = 0.0
    gradient: torch.Tensor | None = None


def measure(
    policy: Policy, examples: Sequence[TokenizedExample], arms: Sequence[Arm], rounds: int
) -> list[Found]:
    """Let arms take turns; the first round warms up and leaves its gradients."""
    head, cpu = policy.head, torch.device("cpu")
    found = [Found(arm) for arm in arms]
    for turn in track(range(rounds + 1), arms[-1].name):
        for each in found:
            rate = product_rate(SMOLLM2_PRODUCTS, torch.float32, cpu)
            begin = time.perf_counter()
            each.loss = take_step(policy, head, [examples], each.arm)
            second = time.perf_counter() - begin
            if turn == 0:
                each.gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
                continue
            each.seconds.append(second)
            each.rates.append(rate)
    policy.head = head
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also with compiled layers")
    options = parser.parse_args()
    keep_freed_memory()  # as training does
    source = resolve_model(options.model, None, False)
    data = prepare_run(DataConfig(options.data), load_tokenizer(source), seed=0).train.dataset
    model = load_model(source, random_init=False, seed=0)
    policy, shape = Policy(model), Shape.of(model)
    every = len(data) // EXAMPLES
    examples = [data[i * every] for i in range(EXAMPLES)]
    best = LADDER[-1]
    found = measure(policy, examples, LADDER, options.rounds)
    if options.compile:
        warm_up_compiled(policy, best.batching)
        found += measure(
            policy, examples, [replace(best, name="+ compiled layers")], options.rounds
        )
    sizes = sizes_of(examples)
    tokens, useful = sum(n for n, _ in sizes), shape.useful(sizes)
    print("| arm | s | tokens/s | gain | predicted | share of GEMM rate | loss | gradient apart |")
    print("|---|---|---|---|---|---|---|---|")
    reference = found[0].gradient
    assert reference is not None
    before: tuple[float, float] | None = None
    gradients: dict[str, float] = {}
    for each in found:
        assert each.gradient is not None
        apart = float((each.gradient - reference).norm() / reference.norm())
        gradients[each.arm.name] = apart
        second, products = statistics.median(each.seconds), shape.products([examples], each.arm)
        gain, predicted = (before[0] / second, before[1] / products) if before else (1.0, 1.0)
        print(
            f"| {each.arm.name} | {second:.2f} | {tokens / second:.0f} | {gain:.2f} | "
            f"{predicted:.2f} | {useful / second / statistics.median(each.rates):.0%} | "
            f"{each.loss:.6f} | {apart:.0e} |"
        )
        before = second, products
    rate = statistics.median(rate for each in found for rate in each.rates)
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s; useful: {useful / 1e9:.0f} GFLOP a step")
    collating = statistics.median(
        seconds_of(lambda: collate(examples, batching=best.batching), torch.device("cpu"))
        for _ in range(50)
    )
    print(f"collating the microbatch takes {collating * 1e3:.2f} ms")
    refuse_apart(gradients, 1e-5)


if __name__ == "__main__":
    main()
