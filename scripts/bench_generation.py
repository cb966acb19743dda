"""How fast responses are generated, and whether they depend on what they are generated beside.

    python scripts/bench_generation.py MODEL test.jsonl [--prompts 256] [--new-tokens 128]
        [--only speed|equality] [--rounds 3]

MODEL is a model folder, the file holds GSM8K rows, asked with the `r1_zero` prompt; greedy, on this
machine's device. First the arms, which take turns (bf16 on a GPU, else fp32): transformers'
`generate` one prompt at a time (on every eighth of them), `generate` on left-padded batches in file
order, and this project's generator. Then, in fp32, the same prompts at batch sizes 1, 8 and 32, and
shared between two processes: a row counts as equal if it is, and as a near tie if at its first
different token the two best logits lie less than 1e-4 apart; exit status 1 if any is neither.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from bench_common import seconds_of
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from cs336_alignment.data.templates import load_template
from cs336_alignment.evaluation.generate import LocalGenerator, decode
from cs336_alignment.evaluation.sampling import Request, Sampling
from cs336_alignment.model.loading import eos_ids

STOP = "</answer>"
NEAR = 1e-4
Tokens = list[tuple[int, ...]]


class Bench:
    """A model, its prompts and the ways of answering them."""

    def __init__(
        self, model: str, data: str, prompts: int, new_tokens: int, dtype: torch.dtype
    ) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        model_class: Any = AutoModelForCausalLM  # its `to` is typed too narrowly
        self.model: Any = model_class.from_pretrained(model, dtype=dtype).to(device).eval()
        self.eos = eos_ids(self.model.generation_config, self.tokenizer)
        self.sampling = Sampling(max_new_tokens=new_tokens, stop=(STOP,))
        template = load_template("r1_zero")
        assert template is not None
        with Path(data).open() as file:
            rows = [json.loads(line) for line in islice(file, prompts)]
        self.prompts = [template.fill(row["question"]) for row in rows]
        self.ids: list[list[int]] = [self.tokenizer(p)["input_ids"] for p in self.prompts]

    def plain(self, batch_size: int, every: int = 1) -> Tokens:
        """Answer with transformers' `generate`, batches in file order."""
        tokenizer, found = self.tokenizer, []
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        prompts = self.prompts[::every]
        for start in range(0, len(prompts), batch_size):
            inputs = tokenizer(
                prompts[start : start + batch_size], return_tensors="pt", padding=True
            ).to(self.model.device)
            with torch.inference_mode():
                out = self.model.generate(
                    **inputs, max_new_tokens=self.sampling.max_new_tokens, do_sample=False,
                    eos_token_id=sorted(self.eos), pad_token_id=tokenizer.pad_token_id,
                    stop_strings=[STOP], tokenizer=tokenizer,
                )  # fmt: skip
            found += [self._cut(row) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]
        return found

    def ours(self, batch_size: int, share: slice = slice(None)) -> Tokens:
        """Answer with this project's generator."""
        generator = LocalGenerator(self.model, self.tokenizer, batch_size=batch_size)
        requests = [Request(ids, seed=0) for ids in self.ids[share]]
        return [each.token_ids for each in generator.generate(requests, self.sampling)]

    def _cut(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """A response as it was when it ended, without what filled its row up."""
        for end, token in enumerate(tokens, start=1):
            if token in self.eos or STOP in decode(self.tokenizer, tokens[max(0, end - 16) : end]):
                return tuple(tokens[:end])
        return tuple(tokens)

    @torch.inference_mode()
    def gap(self, prompt: int, a: Sequence[int], b: Sequence[int]) -> float:
        """How far apart the two best logits are where two responses part."""
        part = next(
            (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
        )
        row = torch.tensor([[*self.ids[prompt], *a[:part]]], device=self.model.device)
        first, second = self.model(row, logits_to_keep=1).logits[0, -1].float().topk(2).values
        return float(first - second)

    def compare(self, name: str, found: Tokens, expected: Tokens) -> int:
        """Print how many responses are equal, near ties and neither; returns the last."""
        gaps = [
            self.gap(i, a, b)
            for i, (a, b) in enumerate(zip(found, expected, strict=True))
            if a != b
        ]
        wrong = sum(gap >= NEAR for gap in gaps)
        print(f"| {name} | {len(found) - len(gaps)} | {len(gaps) - wrong} | {wrong} |", flush=True)
        return wrong


Chosen = tuple[str, str, int, int]


def half(options: Chosen, rank: int) -> Tokens:
    """What one of two processes answers: every second prompt."""
    torch.set_num_threads(1)
    return Bench(*options, torch.float32).ours(8, slice(rank, None, 2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("speed", "equality"))
    options = parser.parse_args()
    chosen = options.model, options.data, options.prompts, options.new_tokens
    if options.only != "equality":
        show_speed(chosen, options.rounds)
    if options.only != "speed":
        sys.exit(show_equality(chosen) > 0)


def show_speed(chosen: Chosen, rounds: int) -> None:
    """Time the arms, which take turns, and print their medians."""
    bench = Bench(*chosen, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    arms: dict[str, partial[Tokens]] = {"generate, one by one": partial(bench.plain, 1, every=8)}
    for size in (16, 64):
        arms[f"generate, padded batches of {size}"] = partial(bench.plain, size)
        arms[f"this project, {size} at once"] = partial(bench.ours, size)
    rates: dict[str, list[float]] = {name: [] for name in arms}
    answers: dict[str, Tokens] = {}
    for name in track([name for _ in range(rounds) for name in arms], "generating"):
        seconds = seconds_of(lambda: answers.update({name: arms[name]()}), bench.model.device)  # noqa: B023
        rates[name].append(sum(map(len, answers[name])) / seconds)
        print(f"{name}: {rates[name][-1]:.1f} tokens/s", file=sys.stderr, flush=True)
    tokens = sum(map(len, answers["this project, 64 at once"]))
    print(f"{len(bench.ids)} prompts, {tokens:,} tokens generated, {rounds} rounds; medians")
    print("| arm | tokens/s | × one by one | × padded batches of the same size |")
    print("|---|---|---|---|")
    median = {name: statistics.median(each) for name, each in rates.items()}
    for name, rate in median.items():
        same = ""
        if "this" in name:
            padded = median[f"generate, padded batches of {name.split()[2]}"]
            same = f"{rate / padded:.2f}"
        print(f"| {name} | {rate:.1f} | {rate / median['generate, one by one']:.2f} | {same} |")


def show_equality(chosen: Chosen) -> int:
    """Compare responses with those that were generated beside others; returns how many differ."""
    bench = Bench(*chosen, torch.float32)
    print("\n| greedy, against batches of 8 | equal | near ties | different |\n|---|---|---|---|")
    expected = bench.ours(8)
    wrong = sum(bench.compare(f"batch size {size}", bench.ours(size), expected) for size in (1, 32))
    with torch.multiprocessing.get_context("spawn").Pool(2) as pool:
        parts = pool.map(partial(half, chosen), range(2))
    shared = [parts[i % 2][i // 2] for i in range(len(expected))]
    wrong += bench.compare("two processes", shared, expected)
    return wrong + bench.compare("generate, padded batches of 16", bench.plain(16), expected)


if __name__ == "__main__":
    main()
