"""Ragged examples come back as they went in, whatever the chunks and selections."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cs336_alignment.data.dataset import Chunk, TokenizedDataset
from cs336_alignment.data.tokenize import TokenRow

ROWS = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 90), st.sampled_from([0.0, 0.0, 1.0, 0.5, 2.0])),
                 min_size=2, max_size=12),
        st.sampled_from([1.0, 0.25]),
    ),
    min_size=1, max_size=9,
)  # fmt: skip


def make(example: tuple[list[tuple[int, float]], float]) -> TokenRow:
    tokens, weight = example
    return TokenRow.of_weights([i for i, _ in tokens], [w for _, w in tokens], weight)


@given(ROWS, st.integers(1, 5), st.randoms(use_true_random=False))
def test_rows_come_back(examples: list, per_chunk: int, random: object) -> None:
    rows = [make(example) for example in examples]
    chunks = [Chunk.of(rows[i : i + per_chunk]) for i in range(0, len(rows), per_chunk)]
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    chosen = TokenizedDataset(chunks).select(np.array(order[: max(1, len(order) // 2)]))
    for position, number in enumerate(order[: len(chosen)]):
        tokens, weight = examples[number]
        weights = [0.0, *(w for _, w in tokens[1:])]  # nothing predicts the first token
        got = chosen[position]
        assert got.input_ids.tolist() == [i for i, _ in tokens]
        assert got.response_mask.tolist() == [w > 0 for w in weights]
        assert got.example_weight == weight and got.example_id == position
        if got.weights is None:
            assert set(weights) <= {0.0, 1.0}
        else:
            assert got.weights.tolist() == weights
        assert chosen.lengths[position] == len(tokens)
        assert chosen.response_lengths[position] == sum(w > 0 for w in weights)
        assert chosen.token_weights[position] == pytest.approx(weight * sum(weights))
        assert chosen.example_weights[position] == weight


def test_the_prompt_is_what_stands_before_the_last_trained_stretch() -> None:
    rows = [
        TokenRow.of_response([5, 6, 7, 8], 2),
        TokenRow.of_weights([1, 2, 3, 4, 5], [0, 1, 0, 0, 1]),
    ]
    dataset = TokenizedDataset.of(rows)
    assert dataset.prompt_ids(0) == [5, 6]
    assert dataset.prompt_ids(1) == [1, 2, 3, 4]


def test_a_response_row_is_the_same_as_its_weights() -> None:
    for prompt in range(4):
        a = TokenRow.of_response([4, 5, 6], prompt)
        b = TokenRow.of_weights([4, 5, 6], [float(i >= prompt) for i in range(3)])
        assert a.spans.tolist() == b.spans.tolist() and a.weights.tolist() == b.weights.tolist()
