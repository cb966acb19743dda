"""Trained stretches of a text, in characters, and the tokens that lie in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from cs336_alignment.data.tokenize import decode, tokenize_plain
from cs336_alignment.errors import Place, UserError


@dataclass(frozen=True)
class Span:
    """A trained stretch of a text.

    Attributes:
        start: its first character.
        end: the one after its last.
        weight: of each of its tokens.
    """

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class Rendered:
    """A conversation as its chat template writes it.

    Attributes:
        text: all of it, BOS among it if the template writes one.
        spans: what is trained, in order, none empty, never overlapping.
        changed_characters: how many characters of the messages the template lost or changed;
            trimmed white space counts.
        findings: the linter's checks that the messages show, and where.
    """

    text: str
    spans: tuple[Span, ...]
    changed_characters: int
    findings: tuple[tuple[str, Place], ...] = ()


class TokenizedText(NamedTuple):
    """A rendered conversation as tokens.

    Attributes:
        input_ids: (L,) int32.
        weights: (L,) float32, 0 on context, else the token's weight.
        boundary_moved: whether tokenizing the whole text at once would have put a token across a
            span's border.
    """

    input_ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    boundary_moved: bool


class TurnEnd:
    """Finds the end of what is trained of a turn: the special token after its content.

    Args:
        tokenizer: says which texts are tokens of their own.
        tail: what the chat template writes after the content of a last turn; None: not known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tail: str | None) -> None:
        self._added = added_tokens(tokenizer)
        names = sorted(self._added, key=len, reverse=True)
        self._run = re.compile(rf"\s*(?:{'|'.join(map(re.escape, names)) or '(?!)'})+")
        self._tail = tail
        # Up to the tokens that end a turn; empty if there are none.
        run = None if tail is None else self._run.search(tail)
        self.stop = "" if tail is None or run is None else tail[: run.end()]

    def find(self, text: str, content: str) -> int:
        """Give the end of what is trained of a text that is one turn, the last.

        The tail's length decides where it is known: the content may itself hold what looks like the
        end of a turn.
        """
        if self._tail is not None and text.endswith(self._tail):
            return len(text) - len(self._tail) + len(self.stop)
        stripped = text.rstrip()
        if stripped.endswith(self._added):
            return len(stripped)
        content = content.strip()
        at = stripped.rfind(content)
        return self._run_end(text, at + len(content)) if content and at >= 0 else len(stripped)

    def extend(self, text: str, start: int, end: int) -> int:
        """Move the end of a marked turn to that of the special token that ends it."""
        if self._tail is None:
            ends = text[start:end].rstrip().endswith(self._added)
            return end if ends else self._run_end(text, end)
        if self.stop and text.startswith(self.stop, end):
            return end + len(self.stop)
        if self.stop and text[start:end].endswith(self._tail):
            return end - len(self._tail) + len(self.stop)
        return end

    def _run_end(self, text: str, at: int) -> int:
        run = self._run.match(text, at)
        return run.end() if run else at


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """List the tokens that are found before a text is cut into words: special and added ones."""
    names = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    # Gemma adds runs of newlines too, and those end no turn.
    return tuple(sorted(name for name in names if name.strip()))


def count_changed(contents: Sequence[str], text: str) -> int:
    """Count the characters of contents, in order, that a text does not have, trimmed ones too."""
    changed = at = 0
    for content in contents:
        for candidate in (content, content.strip()):
            found = text.find(candidate, at)
            # A template may move a message to the front or the end.
            if found >= 0 or candidate in text:
                at = max(at, found + len(candidate))
                changed += len(content) - len(candidate)
                break
        else:
            changed += len(content)
    return changed


def tokenize_rendered(
    rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase
) -> list[TokenizedText]:
    """Tokenize conversations in one batch, and find the tokens of their spans.

    Nothing is added (the template wrote the special tokens) and nothing cut. Where a token of the
    whole text would cross a span's border, the text is tokenized in pieces, as it is when the model
    generates: the prompt first. A tokenizer that puts a space before each piece would change the
    text that way; there the whole is kept, and the token on the border is trained.

    Args:
        rendered: as `ChatRenderer.render` makes them.
        tokenizer: one with offsets (a fast one) is tokenized once, any other twice.

    Returns:
        A row for each.

    Raises:
        UserError: the tokenizer has no offsets, and its pieces do not make up the text (78).
    """
    texts = [each.text for each in rendered]
    whole, offsets = _encode(texts, tokenizer)
    added = frozenset(added_tokens(tokenizer))
    rows: list[TokenizedText | None] = []
    for each, ids, places in zip(rendered, whole, offsets, strict=True):
        weights = None if places is None else _weights(each, places, added)
        ids_array = np.asarray(ids, dtype=np.int32)
        rows.append(None if weights is None else TokenizedText(ids_array, weights, False))
    unclear = [i for i, row in enumerate(rows) if row is None]
    cut = [_pieces(rendered[i]) for i in unclear]
    encoded, _ = _encode([text for pieces in cut for text, _ in pieces], tokenizer)
    parts = iter(encoded)
    for i, pieces in zip(unclear, cut, strict=True):
        joined = [(next(parts), weight) for _, weight in pieces]
        rows[i] = _settle(rendered[i], whole[i], offsets[i], joined, tokenizer)
    return [row for row in rows if row is not None]


def _encode(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[NDArray[np.int64] | None]]:
    """Tokenize texts; with each its tokens' (L, 2) starts and ends in characters, if known."""
    if not tokenizer.is_fast:
        return tokenize_plain(texts, tokenizer), [None] * len(texts)
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    # What an earlier call of the tokenizer asked for would still hold here.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens  # type: ignore[attr-defined]
    found = backend.encode_batch(list(texts), add_special_tokens=False)
    return [each.ids for each in found], [
        np.array(each.offsets, dtype=np.int64).reshape(-1, 2) for each in found
    ]


def _weights(
    rendered: Rendered, offsets: NDArray[np.int64], added: frozenset[str]
) -> NDArray[np.float32] | None:
    """Give every token its weight; None if a span's border does not fall between two tokens."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    weights = np.zeros(len(offsets), dtype=np.float32)
    borders = np.array([(span.start, span.end) for span in rendered.spans], dtype=np.int64)
    # Bytes of one character may be several tokens with the same offsets: `left` takes them all.
    tokens = np.searchsorted(starts, borders.reshape(-1, 2), side="left")
    for span, (first, after) in zip(rendered.spans, tokens.tolist(), strict=True):
        if not _is_between(rendered.text, starts, ends, first, span.start):
            return None
        if not _is_between(rendered.text, starts, ends, after, span.end):
            # An added token may swallow the white space after it (AddedToken's rstrip); cut off
            # here, that space would become a token that the whole text does not have.
            token = rendered.text[starts[after - 1] : span.end].strip() if after else ""
            rest = rendered.text[span.end : ends[after - 1]] if after else ""
            if token not in added or not rest.isspace():
                return None
        weights[first:after] = span.weight
    return weights


def _is_between(
    text: str, starts: NDArray[np.int64], ends: NDArray[np.int64], token: int, at: int
) -> bool:
    """Whether all tokens before this one end at a place, and this one begins there.

    A gap counts as no: offsets may leave out white space that belongs to a token (trim_offsets).
    """
    if at in (0, len(text)):
        return True
    return bool(0 < token < len(starts) and ends[token - 1] == at == starts[token])


def _pieces(rendered: Rendered) -> list[tuple[str, float]]:
    """Cut a text at the borders of its spans: the pieces that are not empty, with their weights."""
    pieces, at = [], 0
    for span in rendered.spans:
        pieces.append((rendered.text[at : span.start], 0.0))
        pieces.append((rendered.text[span.start : span.end], span.weight))
        at = span.end
    pieces.append((rendered.text[at:], 0.0))
    return [piece for piece in pieces if piece[0]]


def _settle(
    rendered: Rendered,
    whole: list[int],
    offsets: NDArray[np.int64] | None,
    pieces: list[tuple[list[int], float]],
    tokenizer: PreTrainedTokenizerBase,
) -> TokenizedText:
    """Choose between the tokens of the pieces and those of the whole text."""
    ids = [token for part, _ in pieces for token in part]
    moved = ids != whole
    if moved and decode(tokenizer, ids) != decode(tokenizer, whole):
        if offsets is None:
            raise UserError(
                "D408",
                "this tokenizer changes a conversation that it gets in pieces, and does not say "
                "where its tokens stand",
                got=type(tokenizer).__name__,
                hint="use a fast tokenizer (a model folder with tokenizer.json)",
            )
        weights = np.zeros(len(whole), dtype=np.float32)
        for span in rendered.spans:
            weights[(offsets[:, 0] < span.end) & (offsets[:, 1] > span.start)] = span.weight
        return TokenizedText(np.array(whole, dtype=np.int32), weights, True)
    each = [np.full(len(part), weight, dtype=np.float32) for part, weight in pieces]
    joined = np.concatenate(each) if each else np.zeros(0, dtype=np.float32)
    return TokenizedText(np.array(ids, dtype=np.int32), joined, moved)
