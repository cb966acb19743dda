"""What each idea brings: padded rows with logits everywhere, then one thing more an arm.

    python scripts/bench_ablation.py MODEL train.jsonl [ROUNDS]

MODEL is a model folder, the file holds GSM8K rows; microbatches of 8 in float32, forward and
backward. The arms take turns in one process. Prints for each the seconds a step (median), the gain
over the arm before, what the matrix products alone predict, and how far its gradient is from the
first arm's.
"""

from __future__ import annotations

import statistics
import sys

import torch
from bench_common import (
    LADDER,
    SMOLLM2_PRODUCTS,
    Shape,
    product_rate,
    seconds_of,
    sizes_of,
    take_step,
)  # fmt: skip
from rich.progress import track

from cs336_alignment.config import DataConfig
from cs336_alignment.data.splits import prepare_run
from cs336_alignment.model.loading import load_model, load_tokenizer, resolve_model
from cs336_alignment.model.policy import Policy

EXAMPLES = 8


def main(model_path: str, data_path: str, rounds: int) -> None:
    source = resolve_model(model_path, None, False)
    data = prepare_run(DataConfig(data_path), load_tokenizer(source), seed=0).train.dataset
    model = load_model(source, random_init=False, seed=0)
    policy, shape, cpu = Policy(model), Shape.of(model), torch.device("cpu")
    head = policy.head
    every = len(data) // EXAMPLES
    examples = [data[i * every] for i in range(EXAMPLES)]
    found: dict[str, list[float]] = {arm.name: [] for arm in LADDER}
    losses, errors, rates = {}, {}, []
    reference = None
    for turn in track(range(rounds + 1), "training"):
        rates.append(product_rate(SMOLLM2_PRODUCTS, torch.float32, cpu))
        for arm in LADDER:
            seconds = seconds_of(
                lambda arm=arm: losses.update(
                    {arm.name: take_step(policy, head, [examples], arm)}
                ),
                cpu,
            )  # fmt: skip
            if turn:  # the first round warms up
                found[arm.name].append(seconds)
                continue
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            reference = gradient if reference is None else reference
            errors[arm.name] = float((gradient - reference).norm() / reference.norm())
    rate = statistics.median(rates)
    tokens = sum(n for n, _ in sizes_of(examples))
    useful = shape.useful(sizes_of(examples))
    print("| arm | s | tokens/s | gain | predicted | share of GEMM rate | loss | gradient apart |")
    print("|---|---|---|---|---|---|---|---|")
    before: tuple[float, float] | None = None
    for arm in LADDER:
        second, products = statistics.median(found[arm.name]), shape.products([examples], arm)
        gain, predicted = (before[0] / second, before[1] / products) if before else (1.0, 1.0)
        print(
            f"| {arm.name} | {second:.2f} | {tokens / second:.0f} | {gain:.2f} | {predicted:.2f} | "
            f"{useful / second / rate:.0%} | {losses[arm.name]:.6f} | {errors[arm.name]:.0e} |"
        )
        before = second, products
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s; useful: {useful / 1e9:.0f} GFLOP a step")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], int((sys.argv[3:] or ["5"])[0]))
