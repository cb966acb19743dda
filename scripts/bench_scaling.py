"""Whether cost grows no faster than work: forward and backward time a real token, one thing varied.

    python scripts/bench_scaling.py [tokens length vocabulary rows processes] [--rounds 5]

A model of SmolLM2-135M's shape with drawn weights and 6 of its 30 layers (the head then weighs
five times as much as it does there); float32 on a CPU, bfloat16 on a GPU. Every number is a median
of the rounds, in which the sizes take turns; 1.00 is the smallest size.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from bench_common import LADDER, seconds_of, take_step
from rich.progress import track
from transformers import LlamaConfig, LlamaForCausalLM

from cs336_alignment.cores import keep_freed_memory
from cs336_alignment.data.batching import StepPlan, plan_microbatches
from cs336_alignment.data.tokenize import TokenizedExample
from cs336_alignment.model.policy import Policy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLAT = LADDER[3]
LENGTH = 256
VOCABULARY = 49152
ON_GPU = DEVICE.type == "cuda"


def build(vocabulary: int = VOCABULARY) -> Policy:
    if not ON_GPU:
        keep_freed_memory()  # as training does
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=6,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        max_position_embeddings=8192,
    )  # fmt: skip
    return Policy(LlamaForCausalLM(config), torch.bfloat16 if ON_GPU else None).to(DEVICE)


def examples_of(tokens: int, length: int, vocabulary: int) -> list[TokenizedExample]:
    """Draw examples of one length, half of each a response."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(length) >= length // 2
    return [
        TokenizedExample(torch.randint(vocabulary, (length,), generator=generator), mask, i)
        for i in range(tokens // length)
    ]


def compare(title: str, work: dict[str, Callable[[], float]], unit: str, rounds: int) -> None:
    """Time each size in turns and print a table; `work` returns seconds a token, or a step."""
    for measure in work.values():
        measure()
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in track(range(rounds), title):
        for name, measure in work.items():
            found[name].append(measure())
    base = statistics.median(next(iter(found.values())))
    print(f"\n| {title} | {unit} | relative |\n|---|---|---|")
    for name, values in found.items():
        middle = statistics.median(values)
        print(f"| {name} | {middle * 1e6:,.1f} | {middle / base:.2f} |")


def step_of(policy: Policy, examples: list[TokenizedExample]) -> Callable[[], float]:
    head, tokens = policy.head, sum(len(e.input_ids) for e in examples)
    return lambda: seconds_of(lambda: take_step(policy, head, [examples], FLAT), DEVICE) / tokens


def by_tokens(rounds: int) -> None:
    policy = build()
    sizes = [2**k for k in range(14, 19)] if ON_GPU else [2**k for k in range(9, 14)]
    work = {f"{n:,}": step_of(policy, examples_of(n, LENGTH, VOCABULARY)) for n in sizes}
    compare(f"tokens a microbatch (examples of {LENGTH})", work, "µs a token", rounds)


def by_length(rounds: int) -> None:
    policy, total = build(), 65536 if ON_GPU else 4096
    lengths = [2**k for k in range(6, 13)]
    work = {f"{n:,}": step_of(policy, examples_of(total, n, VOCABULARY)) for n in lengths}
    compare(f"length of an example ({total:,} tokens)", work, "µs a token", rounds)


def by_vocabulary(rounds: int) -> None:
    total = 65536 if ON_GPU else 2048
    work = {
        f"{size:,}": step_of(build(size), examples_of(total, LENGTH, size))
        for size in (8192, 32768, 49152, 151936)
    }
    compare(f"vocabulary ({total:,} tokens)", work, "µs a token", rounds)


def by_rows(rounds: int) -> None:
    """What choosing and cutting a step costs, by the examples of the data set."""

    def plan(rows: int) -> Callable[[], float]:
        steps = StepPlan(rows, 64, seed=0)
        lengths = torch.randint(50, 500, (rows,)).numpy()

        def work() -> float:
            steps.example_ids(0)  # an epoch's order is drawn once
            begin = time.perf_counter()
            for step in range(20):
                plan_microbatches(
                    steps.example_ids(step), lengths, num_processes=1, process_index=0,
                    microbatch_tokens=4096, gradient_accumulation_steps=None, batching="flat",
                )  # fmt: skip
            return (time.perf_counter() - begin) / 20

        return work

    work = {f"{rows:,}": plan(rows) for rows in (1_000, 100_000, 10_000_000)}
    compare("examples in the data set", work, "µs a step of 64", rounds)


def by_processes(rounds: int) -> None:
    """The same step by one process and by two, each with one thread; tokens of all together."""

    def launch(count: int) -> Callable[[], float]:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
            str(count), __file__, "--worker",
        ]  # fmt: skip

        def work() -> float:
            done = subprocess.run(
                command, capture_output=True, text=True, check=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            return float(done.stdout.splitlines()[-1])

        return work

    work = {str(count): launch(count) for count in (1, 2)}
    compare("processes (one thread each)", work, "µs a token", rounds)


def worker() -> None:
    from cs336_alignment.config import ParallelConfig, TrainerConfig
    from cs336_alignment.data.dataset import TokenizedDataset
    from cs336_alignment.data.tokenize import TokenRow
    from cs336_alignment.training.parallel import Processes, start_processes
    from cs336_alignment.training.step import Cut, accumulate_gradients

    processes = Processes(start_processes(ParallelConfig()))
    if not ON_GPU:
        torch.set_num_threads(1)
    examples = examples_of(4096, LENGTH, VOCABULARY)
    dataset = TokenizedDataset.of(
        [TokenRow.of_response(e.input_ids.tolist(), LENGTH // 2) for e in examples]
    )
    policy = build()
    wrapped = processes.wrap(policy)

    def step() -> None:
        policy.zero_grad(set_to_none=True)
        accumulate_gradients(
            wrapped, dataset, range(len(dataset)), cut=Cut(1024, None, "flat"),
            trainer=TrainerConfig(), processes=processes, seed=0, step=0,
        )  # fmt: skip

    step()
    seconds = statistics.median(seconds_of(step, DEVICE) for _ in range(2))
    if processes.is_main:
        print(seconds / (len(dataset) * LENGTH))
    processes.wait()
    processes.close()


AXES = {
    "tokens": by_tokens, "length": by_length, "vocabulary": by_vocabulary, "rows": by_rows,
    "processes": by_processes,
}  # fmt: skip

if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        worker()
        sys.exit()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("axes", nargs="*", help=f"of {', '.join(AXES)}; none: all")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if unknown := set(options.axes) - set(AXES):
        parser.error(f"there is no {', '.join(unknown)}")
    for axis in options.axes or AXES:
        AXES[axis](options.rounds)
