"""The rows that a run trained on, as it saw them: token by token, each with the line it came from.

Written one after another: no more than a batch of them is ever in memory. L tokens of an example.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from cs336_alignment.data.batching import StepPlan
from cs336_alignment.data.splits import PreparedData, RunData
from cs336_alignment.errors import UserError

BATCH_ROWS = 1_000
SCHEMA = pa.schema([
    ("split", pa.string()), ("source", pa.string()), ("place", pa.string()),
    ("text", pa.string()), ("input_ids", pa.list_(pa.int32())),
    ("response_mask", pa.list_(pa.int8())), ("token_weights", pa.list_(pa.float32())),
    ("weight", pa.float32()), ("times_trained", pa.int32()),
])  # fmt: skip
CARD = """---
configs:
- config_name: default
  data_files:
{files}
---

# The rows of {run}

Every example that the run could train on or was evaluated on, as the model saw it: {counts}.

| column | content |
|---|---|
| `split` | `train` or `eval` |
| `source`, `place` | the data it comes from, and file and line of its row |
| `text` | all of it, decoded, special tokens too |
| `input_ids` | the tokens |
| `response_mask` | 1 on the tokens that are trained |
| `token_weights` | what each token weighs in the loss; null: 1 where the mask is 1 |
| `weight` | what the example weighs |
| `times_trained` | how many of the run's {steps} steps had it, steps left out for a spike too |

`datasets.load_dataset` reads this folder, and `data.format=tokens` trains on it again.
"""


def times_trained(plan: StepPlan, steps: int) -> NDArray[np.int32]:
    """Count how often each example was in one of the first steps of a run, (N,)."""
    times = np.zeros(plan.num_examples, np.int32)
    for step in range(steps):
        np.add.at(times, list(plan.example_ids(step)), 1)
    return times


def write_rows(
    folder: Path,
    data: RunData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: str,
    times: NDArray[np.int32],
    steps: int,
    run: str,
    advance: Callable[[int], None],
) -> dict[str, dict[str, int]]:
    """Write the rows of both splits, each into a file of its own, and a card.

    Args:
        folder: is there.
        data: of the run.
        tokenizer: of the model.
        kind: `jsonl` or `parquet`.
        times: see `times_trained`.
        steps: that these count.
        run: its name.
        advance: called with the number of rows that were written.

    Returns:
        split → its numbers of examples, tokens and response_tokens, counted while writing.
    """
    counts = {}
    splits = {"train": data.train, "eval": data.held_out}
    for name, split in splits.items():
        if split is None:
            continue
        counts[name] = dict.fromkeys(("examples", "tokens", "response_tokens"), 0)
        seen = times if name == "train" else np.zeros(len(split.dataset), np.int32)
        with _writer(folder / f"{name}.{kind}") as write:
            for row in _rows(name, split, tokenizer, seen):
                write(row)
                counts[name]["examples"] += 1
                counts[name]["tokens"] += len(row["input_ids"])
                counts[name]["response_tokens"] += sum(row["response_mask"])
                advance(1)
    files = "\n".join(f"  - split: {name}\n    path: {name}.{kind}" for name in counts)
    told = "; ".join(
        f"{n['examples']:,} examples, {n['tokens']:,} tokens, {n['response_tokens']:,} of them "
        f"trained ({name})"
        for name, n in counts.items()
    )
    text = CARD.format(files=files, run=run, counts=told, steps=f"{steps:,}")
    (folder / "README.md").write_text(text, encoding="utf-8")
    return counts


def compare_with_ledger(
    counts: Mapping[str, Mapping[str, int]], ledger: Mapping[str, Any], *, splits_off: bool
) -> None:
    """Hold what was written against what the run counted when it began.

    Args:
        counts: of `write_rows`.
        ledger: `data_ledger.json`.
        splits_off: whether the evaluation data are a part of the training data's sources, whose
            tokens the ledger counts together.

    Raises:
        UserError: they differ (70).
    """
    pairs = [
        (f"{name} {what}", found[what], ledger[name]["examples" if what == "examples" else what])
        for name, found in counts.items()
        for what in found
        if what == "examples" or not splits_off
    ]
    if splits_off:
        pairs += [
            (what, sum(found[what] for found in counts.values()), ledger["train"][what])
            for what in ("tokens", "response_tokens")
        ]
    wrong = [f"{what}: {mine:,} of {theirs:,}" for what, mine, theirs in pairs if mine != theirs]
    if wrong:
        raise UserError(
            "R381",
            "what was written is not what data_ledger.json counts",
            got="; ".join(wrong),
            hint="the ledger is of other data, or this is a mistake of this program: train again "
            "with another run_name, and report it with what `cs336-sft env` prints",
        )


def _rows(
    name: str, split: PreparedData, tokenizer: PreTrainedTokenizerBase, times: NDArray[np.int32]
) -> Iterator[dict[str, Any]]:
    for number, (source, place) in enumerate(split.iterate_origins()):
        example = split.dataset[number]
        ids, weights = example.input_ids.tolist(), example.weights
        yield {
            "split": name,
            "source": source,
            "place": place,
            "text": tokenizer.decode(ids, clean_up_tokenization_spaces=False),
            "input_ids": ids,
            "response_mask": example.response_mask.int().tolist(),
            "token_weights": None if weights is None else weights.tolist(),
            "weight": example.example_weight,
            "times_trained": int(times[number]),
        }


@contextmanager
def _writer(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            yield lambda row: print(json.dumps(row, ensure_ascii=False), file=file)
        return
    batch: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, SCHEMA) as parquet:

        def write(row: dict[str, Any]) -> None:
            batch.append(row)
            if len(batch) == BATCH_ROWS:
                flush()

        def flush() -> None:
            parquet.write_table(pa.Table.from_pylist(batch, SCHEMA))
            batch.clear()

        yield write
        if batch:
            flush()
