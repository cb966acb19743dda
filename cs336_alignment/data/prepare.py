"""The data step: rows → examples → tokens, with every row accounted for in a ledger."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cs336_alignment.config import DataConfig
from cs336_alignment.data.formats import Example, PromptTemplate, load_template, to_example
from cs336_alignment.data.sources import SourceRead, read_source
from cs336_alignment.data.tokenize import TokenizedExample, tokenize_plain, tokenize_prompts
from cs336_alignment.errors import ExitStatus, Place, UserError, UserErrors

TOKENIZE_BATCH = 2_000
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass
class LedgerEntry:
    """What became of one source's rows; tokens are those of the kept examples."""

    source: str
    rows_read: int = 0
    rows_beyond_limit: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    response_tokens: int = 0
    longest: int = 0
    ends_with_eos: int = 0


@dataclass(frozen=True)
class TokenizedDataset:
    """Examples as tokens in three flat tensors.

    Attributes:
        input_ids: (all tokens,) int32.
        response_mask: (all tokens,) bool.
        lengths: tokens of each example.
        response_lengths: trained tokens of each example, at least 1.
        starts: where each example begins.
    """

    input_ids: Tensor
    response_mask: Tensor
    lengths: tuple[int, ...]
    response_lengths: tuple[int, ...]
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, example_id: int) -> TokenizedExample:
        span = slice(self.starts[example_id], self.starts[example_id] + self.lengths[example_id])
        return TokenizedExample(self.input_ids[span].long(), self.response_mask[span], example_id)

    @staticmethod
    def of(rows: Sequence[tuple[list[int], int]]) -> TokenizedDataset:
        """Build a data set from rows of (token ids, number of prompt tokens)."""
        lengths = tuple(len(ids) for ids, _ in rows)
        starts, total = [], 0
        for length in lengths:
            starts.append(total)
            total += length
        ids = torch.tensor([i for row, _ in rows for i in row], dtype=torch.int32)
        mask = torch.ones(total, dtype=torch.bool)
        for start, (_, num_prompt) in zip(starts, rows, strict=True):
            mask[start : start + num_prompt] = False
        # The first token of a row is predicted by nothing, whatever it is.
        responses = tuple(len(row) - max(num_prompt, 1) for row, num_prompt in rows)
        return TokenizedDataset(ids, mask, lengths, responses, tuple(starts))


@dataclass(frozen=True)
class PreparedData:
    """The outcome of the data step for one split.

    Attributes:
        dataset: the tokens.
        examples: the texts, in the order of the data set.
        ledger: what became of the rows.
        template: what shaped the prompts of rows that have no prompt of their own.
        fingerprint: sha256 over the tokens and masks that are trained.
        revision: the hub's revision, if one was named.
    """

    dataset: TokenizedDataset
    examples: tuple[Example, ...]
    ledger: LedgerEntry
    template: PromptTemplate
    fingerprint: str
    revision: str | None


def prepare(
    path: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    split: str,
    max_examples: int | None,
    progress: Progress = lambda *_: nullcontext(lambda _: None),
) -> PreparedData:
    """Read, shape, tokenize and filter one split.

    Args:
        path: of the source, see `read_source`.
        config: the data section.
        tokenizer: of the model.
        seed: of built-in data.
        split: `train` or `test`, for sources that have splits and name none.
        max_examples: only the first so many rows; None: all.
        progress: shows a bar.

    Raises:
        UserErrors: bad rows, all of them, in one error (65).
        UserError: nothing to read (66) or nothing left (65); a template that does not exist (78).
    """
    template = load_template(config.prompt_template)
    if config.append_eos and tokenizer.eos_token_id is None:
        raise UserError(
            "M104",
            "the tokenizer has no EOS token, so no response could learn to stop",
            ExitStatus.BAD_CONFIG,
            hint="choose a tokenizer with one, or set data.append_eos=false",
        )
    read = read_source(path, seed=seed, default_split=split)
    ledger = LedgerEntry(path, rows_read=len(read.rows) + len(read.errors))
    examples = _to_examples(read, template, max_examples, ledger)
    with progress("tokenizing", len(examples)) as advance:
        rows = _tokenize(examples, config, tokenizer, advance)
    kept_examples, kept_rows = [], []
    errors: list[UserError] = []
    for example, (ids, num_prompt) in zip(examples, rows, strict=True):
        try:
            fitted = _fit(ids, num_prompt, config, example.place, ledger)
        except UserError as error:
            errors.append(error)
            continue
        if fitted is not None:
            kept_examples.append(example)
            kept_rows.append((fitted, num_prompt))
    if errors:
        raise UserErrors(errors)
    if not kept_rows:
        raise UserError(
            "D301",
            f"no example of {path} is left",
            ExitStatus.BAD_DATA,
            got=f"{ledger.rows_read} rows read, dropped: {ledger.dropped or 'none'}",
            hint="raise data.max_length or give more rows",
        )
    dataset = TokenizedDataset.of(kept_rows)
    ledger.kept = len(dataset)
    ledger.tokens = sum(dataset.lengths)
    ledger.response_tokens = sum(dataset.response_lengths)
    ledger.longest = max(dataset.lengths)
    ledger.ends_with_eos = sum(ids[-1] == tokenizer.eos_token_id for ids, _ in kept_rows)
    digest = hashlib.sha256(dataset.input_ids.numpy().tobytes())
    digest.update(dataset.response_mask.numpy().tobytes())
    digest.update(repr(dataset.lengths).encode())
    return PreparedData(
        dataset, tuple(kept_examples), ledger, template, digest.hexdigest(), read.revision
    )


def _to_examples(
    read: SourceRead, template: PromptTemplate, max_examples: int | None, ledger: LedgerEntry
) -> list[Example]:
    if max_examples is not None:
        ledger.rows_beyond_limit = max(0, len(read.rows) - max_examples)
        read.rows = read.rows[:max_examples]
    examples, errors = [], list(read.errors)
    for row in read.rows:
        try:
            examples.append(to_example(row, template))
        except UserError as error:
            errors.append(error)
    if errors:
        errors.sort(key=lambda error: error.place.line or 0 if error.place else 0)
        raise UserErrors(errors)
    return examples


def _tokenize(
    examples: Sequence[Example],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    advance: Callable[[int], None],
) -> list[tuple[list[int], int]]:
    rows: list[tuple[list[int], int]] = []
    for start in range(0, len(examples), TOKENIZE_BATCH):
        batch = examples[start : start + TOKENIZE_BATCH]
        prompts = tokenize_prompts([e.prompt for e in batch], tokenizer, config.add_special_tokens)
        responses = tokenize_plain([e.response for e in batch], tokenizer)
        for prompt, response in zip(prompts, responses, strict=True):
            # A response whose text already ends with EOS gets no second one.
            ends = config.append_eos and response[-1:] != [tokenizer.eos_token_id]
            rows.append((prompt + response + [tokenizer.eos_token_id] * ends, len(prompt)))
        advance(len(batch))
    return rows


def _fit(
    ids: list[int], num_prompt: int, config: DataConfig, place: Place, ledger: LedgerEntry
) -> list[int] | None:
    """Apply `data.overlong` to one example; None: it is dropped, and counted."""
    if len(ids) <= config.max_length:
        if len(ids) > max(num_prompt, 1):
            return ids
        ledger.dropped["no_response_token"] = ledger.dropped.get("no_response_token", 0) + 1
        return None
    if config.overlong == "error":
        raise UserError(
            "D302",
            "the example is longer than data.max_length",
            ExitStatus.BAD_DATA,
            place=place,
            expected=f"at most {config.max_length} tokens",
            got=f"{len(ids)} tokens, {num_prompt} of them prompt",
            hint="raise data.max_length, or set data.overlong=drop or truncate (both are counted)",
        )
    if config.overlong == "truncate" and num_prompt < config.max_length:
        # The end of the response is cut; no EOS is put there, or the model would learn to stop
        # mid-sentence.
        ledger.truncated += 1
        return ids[: config.max_length]
    reason = "overlong" if config.overlong == "drop" else "prompt_fills_max_length"
    ledger.dropped[reason] = ledger.dropped.get(reason, 0) + 1
    return None
