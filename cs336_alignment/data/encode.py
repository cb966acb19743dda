"""Rows to tokens in batches: the part of the data step that many processes can share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from cs336_alignment.config import DataConfig
from cs336_alignment.data.chat import ChatRenderer
from cs336_alignment.data.chat_lint import special_spelling
from cs336_alignment.data.formats import Example, to_example
from cs336_alignment.data.layout import ASKING, Layout
from cs336_alignment.data.ledger import LedgerEntry
from cs336_alignment.data.lint import Findings, SpecialTokens, check_row, ends_with_stop
from cs336_alignment.data.row import Row
from cs336_alignment.data.spans import tokenize_rendered
from cs336_alignment.data.templates import PromptTemplate
from cs336_alignment.data.tokenize import TokenRow, tokenize_plain, tokenize_prompts
from cs336_alignment.errors import MAX_SHOWN, Place, UserError

WINDOW = 24  # characters on each side of a border that decide how it tokenizes


@dataclass
class Encoded:
    """A batch of rows as tokens.

    Attributes:
        rows: the kept examples.
        places: of each.
        ground_truths: of each, or None.
        choices: that each one's question gives.
        hashes: (rows, 2) uint64, of all tokens and of those before the last trained stretch.
        ledger: what became of the rows.
        findings: of the linter.
        errors: the first bad rows, at most 20.
    """

    rows: list[TokenRow] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    ground_truths: list[str | None] = field(default_factory=list)
    choices: list[tuple[str, ...]] = field(default_factory=list)
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    ledger: LedgerEntry = field(default_factory=LedgerEntry)
    findings: Findings = field(default_factory=Findings)
    errors: list[UserError] = field(default_factory=list)


class Encoder:
    """Turns batches of rows into tokens; pure, so that any process may have one.

    Args:
        config: the data section.
        tokenizer: of the model.
        layout: of the source.
        template: for questions and instructions; None: the tokenizer's chat template.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
        template: PromptTemplate | None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.layout = layout
        self.template = template
        self.special = special_tokens(tokenizer)
        self._vocabulary = max(tokenizer.get_vocab().values(), default=-1) + 1
        late = {layout.columns[role] for role in layout.late}
        self._first = {*layout.ignored, *layout.columns.values(), *layout.lettered} - late
        self._late = late
        self._special = special_spelling(tokenizer)
        own = [] if template is None else [template.text, template.text_with_input or ""]
        self._own_special = max((len(self._special.findall(text)) for text in own), default=0)
        is_chat = template is None or layout.format in ("messages", "sharegpt")
        self._renderer = ChatRenderer(tokenizer, config.train_on) if is_chat else None

    def encode(self, batch: Sequence[Row | UserError]) -> Encoded:
        """Shape, tokenize, cut to length and check a batch of rows."""
        done = Encoded()
        examples: list[Example] = []
        for row in batch:
            done.ledger.rows_read += 1
            try:
                if isinstance(row, UserError):
                    raise row
                for name in sorted(row.fields.keys() - self._first):
                    done.ledger.come_late(f"{name} ({'read' if name in self._late else 'ignored'})")
                example = to_example(row, self.layout, self.template, self.config.train_on)
                self._check_ids(example)
                examples.append(example)
            except UserError as error:
                self._refuse(error, done)
        tokens = self._tokenize(examples, done)
        for example, made in zip(examples, tokens, strict=True):
            if made is not None:
                self._keep(example, made, done)
        # Those of `_tokenize` came last; files are read in the order of their names.
        done.errors.sort(
            key=lambda e: (str(e.place.path), e.place.line or 0) if e.place else ("", 0)
        )
        done.hashes = np.array([_hashes(row) for row in done.rows], np.uint64).reshape(-1, 2)
        return done

    def _check_ids(self, example: Example) -> None:
        if example.tokens is None or (largest := max(example.tokens[0])) < self._vocabulary:
            return
        raise UserError(
            "D212",
            "the tokenizer has no such token",
            place=Place(example.place.path, example.place.line, self.layout.columns["input_ids"]),
            expected=f"ids from 0 to {self._vocabulary - 1}",
            got=str(largest),
            hint="use the tokenizer that made the ids",
        )

    def _refuse(self, error: UserError, done: Encoded) -> None:
        done.ledger.bad_rows += 1
        if len(done.errors) < MAX_SHOWN:
            done.errors.append(error)

    def _tokenize(self, examples: Sequence[Example], done: Encoded) -> list[TokenRow | None]:
        """Tokenize examples of any kind, each kind in one call; None: the row was refused."""
        rows: list[TokenRow | None] = [None] * len(examples)
        texts = [i for i, example in enumerate(examples) if example.texts is not None]
        for i, row in zip(texts, self._texts([examples[i] for i in texts], done), strict=True):
            rows[i] = row
        rendered = []
        for i, example in enumerate(examples):
            if example.tokens is not None:
                rows[i] = TokenRow.of_weights(*example.tokens, example.weight)
            elif example.messages is not None:
                try:
                    rendered.append((i, self._render(example, done)))
                except UserError as error:
                    self._refuse(error, done)
        found = tokenize_rendered([text for _, text in rendered], self.tokenizer)
        for (i, _), (ids, weights, moved) in zip(rendered, found, strict=True):
            if moved:
                done.findings.add("moved_boundary", examples[i].place)
            rows[i] = TokenRow.of_weights(ids, weights, examples[i].weight)
        return rows

    def _texts(self, examples: Sequence[Example], done: Encoded) -> list[TokenRow]:
        config, tokenizer = self.config, self.tokenizer
        texts = [example.texts for example in examples if example.texts is not None]
        prompts = tokenize_prompts([p for p, _ in texts], tokenizer, config.add_special_tokens)
        responses = tokenize_plain([r for _, r in texts], tokenizer)
        moved = _moved_boundaries(texts, tokenizer)
        rows = []
        for example, (asked, _), prompt, response, is_moved in zip(
            examples, texts, prompts, responses, moved, strict=True
        ):
            # A response whose text already ends with EOS gets no second one.
            ends = config.append_eos and response[-1:] != [tokenizer.eos_token_id]
            ids = prompt + response + [tokenizer.eos_token_id] * ends
            whole = config.train_on == "all"
            rows.append(TokenRow.of_response(ids, len(prompt), example.weight, whole=whole))
            if is_moved:
                done.findings.add("moved_boundary", example.place)
            # A special token that a question spells and its template does not; in a prompt that
            # stands verbatim it may be meant.
            asks = self.layout.format in ASKING
            if asks and len(self._special.findall(asked)) > self._own_special:
                done.findings.add("special_text", example.place)
        return rows

    def _render(self, example: Example, done: Encoded) -> Any:
        if self._renderer is None:  # prompts and responses may be lists of messages, too
            self._renderer = ChatRenderer(self.tokenizer, self.config.train_on)
        assert example.messages is not None
        rendered = self._renderer.render(example.messages, example.tools, example.place)
        if rendered.changed_characters:
            done.findings.add("changed_text", example.place)
        # A row counts once for each check, at the first place that shows it.
        for name, place in dict(reversed(rendered.findings)).items():
            done.findings.add(name, place)
        return rendered

    def _keep(self, example: Example, row: TokenRow, done: Encoded) -> None:
        """Cut a row to length, check it, and count what became of it."""
        if example.weight == 0:
            done.ledger.drop("weight_is_zero")
            return
        if not len(row.spans):
            done.findings.add("no_trained_token", example.place)
            done.ledger.drop("no_trained_token")
            return
        # What stands in a conversation's trained stretch is what the template makes the assistant
        # say, tool-call tokens among it; and all of it is trained on purpose with `all`.
        on_purpose = example.messages is not None or self.config.train_on == "all"
        for name in check_row(row, self.special):
            if not (on_purpose and name == "trained_scaffolding"):
                done.findings.add(name, example.place)
        try:
            pieces = fit(row, self.config, example.place, done.ledger)
        except UserError as error:
            self._refuse(error, done)
            return
        for piece in pieces:
            if len(pieces) == 1 and not ends_with_stop(piece, self.special):
                done.findings.add("no_stop_token", example.place)
            done.ledger.keep(piece, stops=self.special.stops)
            done.rows.append(piece)
            done.places.append(str(example.place))
            done.ground_truths.append(example.ground_truth if len(pieces) == 1 else None)
            done.choices.append(example.choices)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """Read a tokenizer's special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    stops = special - {tokenizer.bos_token_id, tokenizer.pad_token_id}
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    table = np.zeros(max(special, default=-1) + 2, dtype=bool)
    table[list(special)] = True
    return SpecialTokens(tokenizer.bos_token_id, frozenset(stops), table)


def fit(row: TokenRow, config: DataConfig, place: Place, ledger: LedgerEntry) -> list[TokenRow]:
    """Apply `data.overlong` to one example, counting what it does.

    Args:
        row: with at least one trained token.
        config: the data section.
        place: of the row.
        ledger: takes the counts.

    Returns:
        No row, one, or several pieces.

    Raises:
        UserError: it is too long, and the policy is `error` (65).
    """
    length, limit = len(row.input_ids), config.max_length
    if length <= limit:
        return [row]
    if config.overlong == "error":
        raise UserError(
            "D302",
            "the example is longer than data.max_length",
            place=place,
            expected=f"at most {limit} tokens",
            got=f"{length} tokens, {int(row.spans[0, 0])} of them before the first trained one",
            hint="raise data.max_length, or set data.overlong=drop, truncate or split (all are "
            "counted)",
        )
    if config.overlong == "drop":
        ledger.drop("overlong")
        return []
    # Each piece after the first begins with the last token of the one before, which predicts its
    # first: so every trained token stays trained, once.
    step = limit - 1
    starts = range(0, length - 1, step) if config.overlong == "split" else (0,)
    pieces = [_piece(row, start, min(start + limit, length)) for start in starts]
    kept = [piece for piece in pieces if len(piece.spans)]
    if not kept:
        ledger.drop("prompt_fills_max_length")
    elif config.overlong == "truncate":
        # The end of the response is cut; no EOS is put there, or the model would learn to stop
        # mid-sentence.
        ledger.truncated += 1
    else:
        ledger.split += 1
        ledger.pieces += len(kept)
    return kept


def _piece(row: TokenRow, start: int, end: int) -> TokenRow:
    spans = np.clip(row.spans, start + 1, end) - start
    inside = spans[:, 1] > spans[:, 0]
    return TokenRow(
        row.input_ids[start:end], spans[inside], row.span_weights[inside], row.example_weight
    )


def _moved_boundaries(
    texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[bool]:
    """Whether a token would lie across the border if prompt and response were tokenized together.

    Only what stands around the border is tokenized again: how a word is cut does not depend on
    text that far away.
    """
    windows = [(prompt[-WINDOW:], response[:WINDOW]) for prompt, response in texts]
    lefts = list(dict.fromkeys(left for left, _ in windows))
    cut = dict(zip(lefts, tokenize_plain(lefts, tokenizer), strict=True))
    rights = tokenize_plain([right for _, right in windows], tokenizer)
    joint = tokenize_plain([left + right for left, right in windows], tokenizer)
    return [
        bool(left) and both != cut[left] + right
        for (left, _), right, both in zip(windows, rights, joint, strict=True)
    ]


def _hashes(row: TokenRow) -> tuple[int, int]:
    """Hash all tokens, and those before the last trained stretch (all, if there are none)."""
    ids = row.input_ids
    before = ids[: row.spans[-1, 0]]
    prompt = before if len(before) > 1 else ids
    return _hash(ids), _hash(prompt)


def _hash(ids: NDArray[np.int32]) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")
