"""Data preparation beside TRL's `SFTTrainer`, on the same rows and tokenizer, arm by arm in turns.

    python scripts/bench_prepare.py MODEL train.jsonl [ROUNDS]

MODEL is a folder with a tokenizer, the file holds GSM8K rows. TRL comes with the extra `bench`.
Prints seconds (medians of the rounds) and ratios; imports are not counted.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from cs336_alignment.config import DataConfig
from cs336_alignment.data.formats import to_example
from cs336_alignment.data.layout import detect
from cs336_alignment.data.sources import Row, open_source
from cs336_alignment.data.splits import prepare_run
from cs336_alignment.data.templates import load_template
from cs336_alignment.data.tokenize import TokenRow, tokenize_plain, tokenize_prompts


def texts_of(path: str) -> list[tuple[str, str]]:
    """Shape the rows once, outside of what is timed: both sides get the same texts."""
    rows = list(open_source(path, seed=0, default_split="train").rows())
    assert all(isinstance(row, Row) for row in rows)
    first = rows[0]
    layout = detect(list(first.fields), first.place, wanted="auto", columns={})
    template = load_template("r1_zero")
    return [to_example(row, layout, template).texts for row in rows]


def trl_seconds(texts: list[tuple[str, str]], tokenizer: Any, folder: str) -> float:
    """Time what SFTTrainer does with a data set of prompts and completions before training."""
    data = datasets.Dataset.from_list([{"prompt": p, "completion": c} for p, c in texts])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    seconds = []
    original = SFTTrainer._prepare_dataset

    def timed(self: Any, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = original(self, *arguments, **options)
        seconds.append(time.perf_counter() - start)
        return result

    SFTTrainer._prepare_dataset = timed
    try:
        SFTTrainer(
            model=LlamaForCausalLM(config), processing_class=tokenizer, train_dataset=data,
            args=SFTConfig(
                output_dir=folder, max_length=None, report_to=[], use_cpu=True, bf16=False
            ),
        )  # fmt: skip
    finally:
        SFTTrainer._prepare_dataset = original
    return seconds[0]


def main(model: str, path: str, rounds: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = texts_of(path)

    def cold(cache: str) -> None:
        prepare_run(DataConfig(path, cache_dir=cache), tokenizer, seed=0)

    def tokens_and_masks() -> None:
        prompts = tokenize_prompts([p for p, _ in texts], tokenizer)
        responses = tokenize_plain([r for _, r in texts], tokenizer)
        for prompt, response in zip(prompts, responses, strict=True):
            TokenRow.of_response([*prompt, *response, tokenizer.eos_token_id], len(prompt))

    def clock(work: Callable[..., None], *arguments: Any) -> float:
        start = time.perf_counter()
        work(*arguments)
        return time.perf_counter() - start

    arms: dict[str, list[float]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            arms.setdefault("TRL", []).append(trl_seconds(texts, tokenizer, folder))
            cache = str(Path(folder) / "cache")
            arms.setdefault("cold", []).append(clock(cold, cache))
            arms.setdefault("warm", []).append(clock(cold, cache))
            arms.setdefault("tokens and masks", []).append(clock(tokens_and_masks))
    for name, seconds in arms.items():
        ratios = [trl / own for trl, own in zip(arms["TRL"], seconds, strict=True)]
        print(
            json.dumps({
                "arm": name, "rows": len(texts), "seconds": round(statistics.median(seconds), 3),
                "times faster than TRL": round(statistics.median(ratios), 2),
                "rounds": [round(s, 3) for s in seconds], "threads": torch.get_num_threads(),
            })
        )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 3)
