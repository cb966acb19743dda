"""Examples as tokens: ragged arrays that lie in memory or in a mapped file.

N examples, L tokens of one example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cs336_alignment.data.tokenize import TokenizedExample, TokenRow

Ints = NDArray[np.integer]


@dataclass(frozen=True)
class Chunk:
    """Neighbouring examples whose tokens lie one after another.

    Attributes:
        input_ids: (tokens,) int32.
        offsets: (examples + 1,) where each example's tokens begin.
        spans: (spans, 2) int32, trained stretches as (start, end) within their example.
        span_offsets: (examples + 1,) where each example's spans begin.
        span_weights: (spans,) float32, the weight of a stretch's tokens.
        example_weights: (examples,) float32.
    """

    input_ids: NDArray[np.int32]
    offsets: Ints
    spans: NDArray[np.int32]
    span_offsets: Ints
    span_weights: NDArray[np.float32]
    example_weights: NDArray[np.float32]

    @staticmethod
    def of(rows: Sequence[TokenRow]) -> Chunk:
        """Lay rows one after another."""
        return Chunk(
            np.concatenate([row.input_ids for row in rows]),
            np.cumsum([0, *(len(row.input_ids) for row in rows)]),
            np.concatenate([row.spans for row in rows]),
            np.cumsum([0, *(len(row.spans) for row in rows)]),
            np.concatenate([row.span_weights for row in rows]),
            np.array([row.example_weight for row in rows], dtype=np.float32),
        )

    @property
    def lengths(self) -> Ints:
        """(examples,) tokens of each example."""
        return np.diff(self.offsets)

    @property
    def response_lengths(self) -> Ints:
        """(examples,) trained tokens of each example."""
        return self._sum_over_examples(self.spans[:, 1] - self.spans[:, 0])

    @property
    def token_weights(self) -> NDArray[np.float64]:
        """(examples,) the summed weights of each example's trained tokens."""
        sizes = (self.spans[:, 1] - self.spans[:, 0]) * self.span_weights.astype(np.float64)
        return self._sum_over_examples(sizes) * self.example_weights

    def _sum_over_examples(self, values: NDArray) -> NDArray:  # type: ignore[type-arg]
        sums = np.concatenate([np.zeros(1, values.dtype), np.cumsum(values)])
        return sums[self.span_offsets[1:]] - sums[self.span_offsets[:-1]]


class TokenizedDataset:
    """Examples by number, and what planning must know of all of them.

    Args:
        chunks: the examples, in order.
        selection: (N,) numbers of the examples that this data set has, in its order; None: all.

    Attributes:
        lengths: (N,) tokens of each example.
        response_lengths: (N,) trained tokens of each example, at least 1.
        token_weights: (N,) summed weights of each example's trained tokens.
        example_weights: (N,) weight of each example.
        weighted: whether any weight differs from 1.
    """

    def __init__(self, chunks: Sequence[Chunk], selection: Ints | None = None) -> None:
        self._chunks = tuple(chunks)
        self._firsts = np.cumsum([0, *(len(chunk.offsets) - 1 for chunk in chunks)])
        self._selection = np.arange(self._firsts[-1]) if selection is None else selection
        chosen = self._selection
        self.lengths: Ints = np.concatenate([c.lengths for c in chunks])[chosen]
        self.response_lengths: Ints = np.concatenate([c.response_lengths for c in chunks])[chosen]
        self.token_weights = np.concatenate([c.token_weights for c in chunks])[chosen]
        self.example_weights = np.concatenate([c.example_weights for c in chunks])[chosen]
        self.weighted = any(
            (c.span_weights != 1).any() or (c.example_weights != 1).any() for c in chunks
        )

    @staticmethod
    def of(rows: Sequence[TokenRow]) -> TokenizedDataset:
        """Build a data set in memory."""
        return TokenizedDataset([Chunk.of(rows)])

    def __len__(self) -> int:
        return len(self._selection)

    def __getitem__(self, example_id: int) -> TokenizedExample:
        row = self._row(example_id)
        weights = torch.from_numpy(row.weights)
        return TokenizedExample(
            torch.from_numpy(row.input_ids.astype(np.int64)),
            weights > 0,
            example_id,
            weights if self.weighted else None,
            row.example_weight,
        )

    def prompt_ids(self, example_id: int) -> list[int]:
        """Give the tokens before the last trained stretch: what a response is generated for."""
        row = self._row(example_id)
        return row.input_ids[: row.spans[-1, 0]].tolist()

    def response_ids(self, example_id: int) -> list[int]:
        """Give the tokens of the last trained stretch."""
        row = self._row(example_id)
        start, end = row.spans[-1]
        return row.input_ids[start:end].tolist()

    def _row(self, example_id: int) -> TokenRow:
        number = self._selection[example_id]
        place = int(np.searchsorted(self._firsts, number, side="right")) - 1
        chunk, index = self._chunks[place], number - self._firsts[place]
        ids = chunk.input_ids[chunk.offsets[index] : chunk.offsets[index + 1]]
        own = slice(chunk.span_offsets[index], chunk.span_offsets[index + 1])
        weight = float(chunk.example_weights[index])
        return TokenRow(ids, chunk.spans[own], chunk.span_weights[own], weight)

    def select(self, example_ids: Ints) -> TokenizedDataset:
        """Give a data set of some of these examples, in this order; the tokens are shared."""
        return TokenizedDataset(self._chunks, self._selection[example_ids])
