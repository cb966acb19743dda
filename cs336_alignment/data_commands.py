"""`cs336-sft prepare` and `cs336-sft inspect`: the data of a run, without the run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console as RichConsole
from transformers import PreTrainedTokenizerBase

from cs336_alignment.config import Config, InspectConfig
from cs336_alignment.data.batching import mix_seed
from cs336_alignment.data.ledger import LedgerEntry
from cs336_alignment.data.lint import CHECKS
from cs336_alignment.data.prepare import cache_folder
from cs336_alignment.data.row import Row
from cs336_alignment.data.sources import open_source
from cs336_alignment.data.splits import PreparedData, RunData, prepare_run
from cs336_alignment.data.token_page import write_page
from cs336_alignment.data.token_view import ViewedExample, print_examples, view_tokens
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.evaluation.verify import verifying
from cs336_alignment.model.loading import open_model
from cs336_alignment.tracking.console import Console

FIELD = ", field "  # as places name one
TEXT_FIELDS = ("content", "value", "reasoning_content", "text")  # of a message


def prepare(config: Config) -> ExitStatus:
    """Tokenize the data of a run into the cache, and show what became of every row.

    Raises:
        UserError: as `prepare_run` does.
    """
    console = Console()
    _, tokenizer = open_model(config.model)
    start = time.perf_counter()
    data = _prepare(config, tokenizer, console)
    seconds = time.perf_counter() - start
    for name, split in (("training data", data.train), ("evaluation data", data.held_out)):
        if split is not None and not (split is data.held_out and config.data.eval_fraction):
            for ledger in split.ledgers:
                _show(ledger, name, console)
    for line in data.warnings:
        console.warn(line)
    if data.held_out is not None and config.data.eval_fraction:
        count = len(data.held_out.dataset)
        console.note(f"{count:,} examples are split off for evaluation")
    console.note(f"prepared in {seconds:.2f} s, in {cache_folder(config.data)}")
    return ExitStatus.DONE


def inspect(config: Config, html: Path | None) -> ExitStatus:
    """Show examples token by token: what is trained, what is read, what is scaffolding.

    Args:
        config: its `inspect` section chooses the examples.
        html: write a page there instead of printing.

    Raises:
        UserError: there is no such example (78), and as `prepare_run` does.
    """
    console = Console()
    _, tokenizer = open_model(config.model)
    data = _prepare(config, tokenizer, console)
    for line in data.warnings:
        console.warn(line)
    chosen = _choose(data.train, config.inspect, config.seed)
    examples = view(data.train, chosen, tokenizer, config)
    if html is None:
        print_examples(examples, RichConsole(highlight=False, soft_wrap=True))
        for ledger in data.train.ledgers:
            if gone := {**ledger.dropped, **ledger.filtered}:
                reasons = ", ".join(f"{n:,} {why.replace('_', ' ')}" for why, n in gone.items())
                console.note(f"not among the examples: rows of {ledger.source} dropped ({reasons})")
        return ExitStatus.DONE
    rows = [row for ledger in data.train.ledgers for row in ledger.rows()]
    summary = [("model", config.model.name_or_path), ("train on", config.data.train_on), *rows]
    try:
        write_page(html, examples, heading=config.data.train_path, summary=summary)
    except OSError as failure:
        raise UserError(
            "R101",
            f"cannot write {html}: {failure.strerror or failure}",
            hint="choose another file after --html",
        ) from failure
    console.note(f"page     {html}")
    return ExitStatus.DONE


def _prepare(config: Config, tokenizer: PreTrainedTokenizerBase, console: Console) -> RunData:
    with verifying(config.evaluation) as verify:
        return prepare_run(
            config.data, tokenizer, seed=config.seed, progress=console.progress, note=console.note,
            verify=verify,
        )  # fmt: skip


def _show(ledger: LedgerEntry, title: str, console: Console) -> None:
    rows = [list(row) for row in ledger.rows()]
    console.table(f"{title}: {ledger.source}", ["", "count"], rows)


def _choose(data: PreparedData, config: InspectConfig, seed: int) -> list[int]:
    total = len(data.dataset)
    if config.rows:
        if max(config.rows) > total:
            raise UserError(
                "C121",
                f"there is no example {max(config.rows)}",
                expected=f"1 to {total}",
                hint="inspect.rows=[1,2]",
            )
        return [row - 1 for row in config.rows]
    count = min(config.num_examples, total)
    if config.select == "longest":
        return [int(i) for i in np.argsort(-data.dataset.lengths, kind="stable")[:count]]
    if config.select == "random":
        generator = np.random.Generator(np.random.PCG64(mix_seed(seed)))
        return sorted(int(i) for i in generator.choice(total, count, replace=False))
    if config.select == "findings":
        found = _findings(data)
        chosen = [i for i, place in enumerate(data.places) if place in found]
        if not chosen:
            raise UserError(
                "C121",
                "no example shows a finding of the linter",
                got=f"findings at {', '.join(found)}: rows that are dropped"
                if found
                else "no findings",
                hint="inspect.select=first, longest or random",
            )
        return chosen[:count]
    return list(range(count))


def _findings(data: PreparedData) -> dict[str, list[str]]:
    """Give what the linter found, by the place of the row; it keeps the first few of each kind."""
    found: dict[str, list[str]] = {}
    for source in data.sources:
        for check, places in source.findings.examples.items():
            for place in places:
                row = place.partition(FIELD)[0]  # some are found in one field of it
                found.setdefault(row, []).append(f"{CHECKS[check].code} {CHECKS[check].message}")
    return found


def view(
    data: PreparedData, chosen: Sequence[int], tokenizer: PreTrainedTokenizerBase, config: Config
) -> list[ViewedExample]:
    """Make examples ready to be looked at.

    Args:
        data: prepared.
        chosen: numbers of the examples.
        tokenizer: of the model.
        config: of the run.
    """
    all_places, found = data.places, _findings(data)
    places = [all_places[number] for number in chosen]
    rows = _find_rows(data, set(places), config)
    examples = []
    for number, place in zip(chosen, places, strict=True):
        example = data.dataset[number]
        ids = example.input_ids.numpy()
        mask = example.response_mask.float() if example.weights is None else example.weights
        texts = _texts(rows[place].fields) if place in rows else []
        scaffold = mark_scaffold(ids, tokenizer, texts)
        tokens = view_tokens(ids, mask.numpy(), tokenizer, scaffold)
        title = f"example {number + 1} · {place}"
        examples.append(ViewedExample(title, tokens, tuple(found.get(place, ()))))
    return examples


def _find_rows(data: PreparedData, places: set[str], config: Config) -> dict[str, Row]:
    """Read the rows at these places once more: their texts tell content from scaffolding."""
    found: dict[str, Row] = {}
    for source in data.sources:
        opened = open_source(source.ledger.source, seed=config.seed, default_split="train")
        for row in opened.rows():
            if len(found) == len(places):
                return found
            if isinstance(row, Row) and str(row.place) in places:
                found[str(row.place)] = row
    return found


def _texts(value: Any, *, is_message: bool = False) -> list[str]:
    """Give all texts of a row's fields in order, those within messages too, but no role names."""
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    if isinstance(value, dict):
        inner = [v for name, v in value.items() if not is_message or name in TEXT_FIELDS]
    elif isinstance(value, list) and not (value and isinstance(value[0], int)):
        inner, is_message = value, True
    else:
        inner = []
    return [text for part in inner for text in _texts(part, is_message=is_message)]


def mark_scaffold(
    ids: np.ndarray[Any, Any], tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[bool]:
    """Mark the tokens that come from no text of the row: what the template wrote.

    Args:
        ids: (L,) tokens of an example.
        tokenizer: of the model.
        texts: of the row; empty: unknown, and nothing is marked.
    """
    if not texts:
        return [False] * len(ids)
    pieces = [token.text for token in view_tokens(ids, np.zeros(len(ids)), tokenizer)]
    whole = "".join(pieces)
    inside = np.zeros(len(whole) + 1, dtype=bool)
    end = 0
    for text in texts:  # in the order of the row, so that a short one is not taken for another
        start = whole.find(text, end)
        if start < 0:
            start = whole.find(text)
        if start >= 0:
            end = start + len(text)
            inside[start:end] = True
    ends = np.cumsum([len(piece) for piece in pieces])
    return [
        not inside[end - len(piece) : end].any() if piece else False
        for piece, end in zip(pieces, ends.tolist(), strict=True)
    ]
