"""What each way of saving memory saves, and what it costs in time.

    python scripts/bench_memory.py MODEL train.jsonl [--rounds 3] [--allocator PATH.so …]

MODEL is a model folder, the file holds GSM8K rows; steps of 8 examples in one microbatch, float32.
Every arm is `cs336-sft train` in a fresh process, and the arms take turns. `--allocator` adds arms
that run with such a library in LD_PRELOAD (jemalloc, tcmalloc). Prints a table of medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench_peers import STEPS, WARMUP_STEPS, choose_rows, train_ours
from rich.progress import track

from cs336_alignment.cores import count_cores

Arm = tuple[list[str], dict[str, str]]  # overrides, environment
ARMS: dict[str, Arm] = {
    "this project as it comes": ([], {}),
    # Any variable of glibc's makes the project leave the allocator as it is; this is its default.
    "glibc as it comes": ([], {"MALLOC_ARENA_MAX": str(8 * count_cores())}),
    "padded rows": (["trainer.batching=padded"], {}),
    "flat rows, no shared prefix": (["trainer.batching=flat"], {}),
    "selective checkpointing": (["trainer.gradient_checkpointing=selective"], {}),
    "checkpointing": (["trainer.gradient_checkpointing=true"], {}),
    "optimizer in 8 bits": (["optimizer.state_bits=8"], {}),
    "checkpointing, optimizer in 8 bits": (
        ["trainer.gradient_checkpointing=true", "optimizer.state_bits=8"],
        {},
    ),
    "microbatches of 1,024 tokens": (
        ["trainer.gradient_accumulation_steps=null", "trainer.microbatch_tokens=1024"],
        {},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--allocator", nargs="+", type=Path, default=[])
    options = parser.parse_args()
    arms = ARMS | {path.name: ([], {"LD_PRELOAD": str(path)}) for path in options.allocator}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        folder = Path(temporary)
        data = choose_rows(options.data, folder / "rows.jsonl")
        turns = [(turn, name) for turn in range(options.rounds) for name in arms]
        for turn, name in track(turns, "training"):
            overrides, environment = arms[name]
            run = f"{turn}-{list(arms).index(name)}"
            found[name].append(train_ours(run, options.model, data, folder, overrides, environment))
    seconds = {
        name: statistics.median(
            sum(each["seconds"][WARMUP_STEPS:]) / (STEPS - WARMUP_STEPS) for each in rounds
        )
        for name, rounds in found.items()
    }
    memory = {
        name: statistics.median(each["memory_gib"] for each in rounds)
        for name, rounds in found.items()
    }
    base = next(iter(arms))
    print("| arm | peak memory, GiB | × | s a step | × | loss, step 1 |")
    print("|---|---|---|---|---|---|")
    for name, rounds in found.items():
        print(
            f"| {name} | {memory[name]:.2f} | {memory[name] / memory[base]:.2f} | "
            f"{seconds[name]:.2f} | {seconds[name] / seconds[base]:.2f} | "
            f"{rounds[0]['loss']:.6f} |"
        )


if __name__ == "__main__":
    main()
