"""All data of a run: training sources mixed, evaluation data beside or split off, both checked."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from cs336_alignment.config import DataConfig, SourceConfig
from cs336_alignment.data.batching import mix_seed
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.data.filter import Verify, find_correct, without
from cs336_alignment.data.formats import Example, to_example
from cs336_alignment.data.layout import detect_layout
from cs336_alignment.data.ledger import LedgerEntry
from cs336_alignment.data.lint import Findings, Judged, judge
from cs336_alignment.data.mixture import Mixture
from cs336_alignment.data.prepare import PreparedSource, Progress, prepare_source
from cs336_alignment.data.row import Row
from cs336_alignment.data.sources import open_source
from cs336_alignment.data.templates import PromptTemplate, load_template
from cs336_alignment.errors import UserError, UserErrors

SPLIT_STREAM = 7  # of the seeds mixed from the run's, one that no epoch uses


@dataclass(frozen=True)
class PreparedData:
    """The examples of one split.

    Attributes:
        dataset: the tokens.
        sources: where they come from, in the order of the examples.
        selection: (N,) the numbers of the examples among those of all sources.
        mixture: how several weighted sources are drawn; None: each example once.
        fingerprint: sha256 over all that is trained or evaluated.
    """

    dataset: TokenizedDataset
    sources: tuple[PreparedSource, ...]
    selection: NDArray[np.int64]
    mixture: Mixture | None
    fingerprint: str

    @staticmethod
    def of(
        sources: tuple[PreparedSource, ...],
        selection: NDArray[np.int64] | None = None,
        mixture: Mixture | None = None,
    ) -> PreparedData:
        """Join sources; with a selection, only those of their examples."""
        whole = TokenizedDataset([chunk for source in sources for chunk in source.store.chunks])
        digest = hashlib.sha256("".join(source.fingerprint for source in sources).encode())
        if selection is not None:
            digest.update(selection.tobytes())
        if mixture is not None:
            digest.update(repr((mixture.weights, mixture.stop)).encode())
        chosen = np.arange(len(whole)) if selection is None else selection
        dataset = whole if selection is None else whole.select(selection)
        return PreparedData(dataset, sources, chosen, mixture, digest.hexdigest())

    @property
    def ledgers(self) -> tuple[LedgerEntry, ...]:
        """What became of each source's rows."""
        return tuple(source.ledger for source in self.sources)

    @property
    def template(self) -> PromptTemplate | None:
        """What shaped the prompts of rows that have none of their own."""
        return self.sources[0].template

    @property
    def largest_token_id(self) -> int:
        """In any example."""
        return max(ledger.largest_token_id for ledger in self.ledgers)

    @property
    def ground_truths(self) -> list[str | None]:
        """The final answer of each example, or None."""
        return self._column("ground_truth")

    @property
    def choices(self) -> list[list[str]]:
        """The choices that the question of each example gives."""
        return self._column("choices")

    @property
    def groups(self) -> list[str]:
        """(N,) the name of each example's source, short where that tells them apart; empty if all
        are of one.
        """
        paths = [ledger.source for ledger in self.ledgers]
        stems = [Path(path).stem for path in paths]
        names = stems if len(set(stems)) == len(stems) else paths
        sizes = [len(source.store.lengths) for source in self.sources]
        numbers = np.repeat(np.arange(len(names)), sizes)[self.selection].tolist()
        return [names[number] for number in numbers] if len(set(numbers)) > 1 else []

    @property
    def places(self) -> list[str]:
        """Where the row of each example stands."""
        return self._column("place")

    def _column(self, name: str) -> list[Any]:
        values = [value for source in self.sources for value in source.store.column(name)]
        return [values[number] for number in self.selection.tolist()]

    def iterate_origins(self) -> Iterator[tuple[str, str]]:
        """Yield source and place of each example's row, in the order of the examples, without
        holding all.
        """
        rows = (
            (source.ledger.source, place)
            for source in self.sources
            for place in source.store.column("place")
        )
        begin = 0
        for number in self.selection.tolist():  # ascending: a selection leaves examples out
            yield next(islice(rows, number - begin, None))
            begin = number + 1

    @property
    def prompt_hashes(self) -> NDArray[np.uint64]:
        """(N,) a hash of each example's prompt."""
        return np.concatenate([s.store.hashes("prompt_hash") for s in self.sources])[self.selection]


@dataclass(frozen=True)
class RunData:
    """What a run trains on and is evaluated on.

    Attributes:
        train: training examples.
        held_out: evaluation examples, if any.
        warnings: lines of the linter.
    """

    train: PreparedData
    held_out: PreparedData | None
    warnings: tuple[str, ...]


def prepare_run(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    progress: Progress = lambda *_: nullcontext(lambda _: None),
    note: Callable[[str], None] = lambda _: None,
    verify: Verify | None = None,
) -> RunData:
    """Prepare all data of a run and let the linter judge it.

    Args:
        config: the data section.
        tokenizer: of the model.
        seed: of the run: built-in data and `eval_fraction` follow it.
        progress: shows bars.
        note: prints lines: each source, and its format as detected.
        verify: tells whether a response is correct, for `data.filter=correct`.

    Raises:
        UserError: as `prepare_source`, `find_correct` and `judge` do.
    """
    sources = config.sources or [SourceConfig(config.train_path)]
    prepare = partial(
        prepare_source, config=config, tokenizer=tokenizer, seed=seed, progress=progress, note=note
    )
    prepare_train = partial(prepare, split="train", limit=config.max_train_examples)
    prepared = _prepare_all(sources, prepare_train)
    train = PreparedData.of(prepared, mixture=_mixture(sources, prepared, config.mixture_stop))
    held_out = None
    if config.eval_path is not None:
        held_out = _held_out(config, prepare)
    elif config.eval_fraction:
        train, held_out = split_off(train, config.eval_fraction, seed)
    if config.filter == "correct":
        assert verify is not None
        train = _filter(train, sources, config, tokenizer, verify, progress)
    return RunData(train, held_out, tuple(_judge(train, held_out, config)))


def _filter(
    train: PreparedData,
    sources: list[SourceConfig],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    verify: Verify,
    progress: Progress,
) -> PreparedData:
    """Choose the correct examples: a pure selection of what is prepared, so that it has no state of
    its own and changes the fingerprint where it changes what is trained.
    """
    with progress("verifying", len(train.dataset)) as advance:
        kept = find_correct(
            train.dataset, train.ground_truths, train.places, tokenizer, verify, advance
        )
    wrong = train.selection[~kept]
    parts, begin = [], 0
    for source in train.sources:
        examples = TokenizedDataset(source.store.chunks)
        own = wrong[(wrong >= begin) & (wrong < begin + len(examples))] - begin
        begin += len(examples)
        remaining = examples.select(np.setdiff1d(np.arange(len(examples)), own))
        ledger = without(source.ledger, examples.select(own), remaining, tokenizer)
        parts.append(replace(source, ledger=ledger))
    mixture = _mixture(sources, tuple(parts), config.mixture_stop)
    return PreparedData.of(tuple(parts), train.selection[kept], mixture)


def _prepare_all(
    sources: Sequence[SourceConfig], prepare: Callable[[SourceConfig], PreparedSource]
) -> tuple[PreparedSource, ...]:
    """Prepare every source, so that the bad rows of all of them are told at once."""
    prepared, errors, total = [], [], 0
    for source in sources:
        try:
            prepared.append(prepare(source))
        except UserErrors as found:
            errors += found.errors
            total += found.total
    if errors:
        raise UserErrors(errors, total)
    return tuple(prepared)


def prepare_evaluation(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    progress: Progress,
    note: Callable[[str], None],
) -> tuple[PreparedData, list[str]]:
    """Prepare evaluation data alone; returns it with the linter's warnings."""
    data = _held_out(config, partial(
        prepare_source, config=config, tokenizer=tokenizer, seed=seed, progress=progress, note=note
    ))  # fmt: skip
    return data, judge([_found_in(part) for part in data.sources], config.lint)


def evaluation_examples(config: DataConfig, *, seed: int) -> Iterator[Example]:
    """Read the evaluation rows again as they were before they became tokens, without the bad ones.

    Args:
        config: the data section, with an `eval_path`.
        seed: of built-in data.
    """
    assert config.eval_path is not None
    source = SourceConfig(config.eval_path, format=config.format, columns=config.columns)
    rows = open_source(config.eval_path, seed=seed, default_split="test").rows()
    layout, read = detect_layout(rows, source, config.eval_path)
    template = load_template(config.prompt_template)
    for row in read:
        with suppress(UserError):
            if isinstance(row, Row):
                yield to_example(row, layout, template, config.train_on)


def split_off(data: PreparedData, fraction: float, seed: int) -> tuple[PreparedData, PreparedData]:
    """Divide rows into training and evaluation data, by a permutation of the seed. All pieces of a
    row that was split stay together.

    Args:
        data: unweighted.
        fraction: of the rows that are evaluated; at least one is, and one is trained.
        seed: of the run.

    Raises:
        UserError: there is but one row (65).
    """
    numbers: dict[str, int] = {}
    rows = np.array([numbers.setdefault(place, len(numbers)) for place in data.places])
    total = len(numbers)
    if total < 2:
        raise UserError(
            "D312",
            "data.eval_fraction needs two rows or more to divide",
            got=f"{total}",
            hint="give data.eval_path, or data.eval_fraction=0",
        )
    count = min(total - 1, max(1, math.ceil(total * fraction - 1e-9)))
    order = np.random.Generator(np.random.PCG64(mix_seed(seed, SPLIT_STREAM))).permutation(total)
    evaluated = np.isin(rows, order[:count])
    return (
        PreparedData.of(data.sources, data.selection[~evaluated]),
        PreparedData.of(data.sources, data.selection[evaluated]),
    )


def _held_out(config: DataConfig, prepare: Callable[..., PreparedSource]) -> PreparedData:
    assert config.eval_path is not None
    source, limit = SourceConfig(config.eval_path), config.max_eval_examples
    return PreparedData.of((prepare(source, split="test", limit=limit),))


def _mixture(
    sources: list[SourceConfig], prepared: tuple[PreparedSource, ...], stop: str
) -> Mixture | None:
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return None
    return Mixture(tuple(part.ledger.kept for part in prepared), tuple(weights), stop)


def _judge(train: PreparedData, held_out: PreparedData | None, config: DataConfig) -> list[str]:
    parts = list(train.sources)
    if held_out is not None and config.eval_path is not None:
        parts += held_out.sources
    judged = [_found_in(part) for part in parts]
    if len(train.sources) > 1:
        repeated = _repeated_across(train.sources)
        judged.append(Judged(repeated, len(train.dataset), "all sources together"))
    if held_out is not None and config.lint.eval_overlap != "off":
        found, shared = Findings(), np.isin(held_out.prompt_hashes, train.prompt_hashes)
        found.add_found("eval_overlap", shared, held_out.places.__getitem__)
        judged.append(Judged(found, len(held_out.dataset), "the evaluation data"))
    return judge(judged, config.lint)


def _repeated_across(sources: Sequence[PreparedSource]) -> Findings:
    """Find the examples of a source that an earlier one has, too."""
    findings, seen = Findings(), np.zeros(0, np.uint64)
    for source in sources:
        hashes = source.store.hashes("row_hash")
        findings.add_found("duplicate_rows", np.isin(hashes, seen), source.store.place)
        seen = np.union1d(seen, hashes)
    return findings


def _found_in(part: PreparedSource) -> Judged:
    # A row of which pieces were kept is one row read and several examples, and these can repeat.
    rows = max(part.ledger.rows_read, part.ledger.kept)
    return Judged(part.findings, rows, part.ledger.source)


def ledger_json(data: RunData) -> dict[str, dict[str, object]]:
    """Give the content of `data_ledger.json`: for each split the sums, its examples, and each
    source with what the linter found in it.
    """
    content = {}
    for name, split in (("train", data.train), ("eval", data.held_out)):
        if split is None:
            continue
        total = LedgerEntry()
        for ledger in split.ledgers:
            total.merge(ledger)
        total.source = ", ".join(ledger.source for ledger in split.ledgers)
        total.format = "; ".join(dict.fromkeys(ledger.format for ledger in split.ledgers))
        total.bad_places = [place for ledger in split.ledgers for place in ledger.bad_places]
        total.measure(split.dataset.lengths)
        sources = [
            {**part.ledger.as_dict(), "findings": asdict(part.findings)} for part in split.sources
        ]
        content[name] = {**total.as_dict(), "examples": len(split.dataset), "sources": sources}
    return content
