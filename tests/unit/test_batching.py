"""What a step trains on: all of it, once, whoever computes it and however it is cut."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336_alignment.data.batching import (
    StepPlan,
    balance,
    collate,
    cut_by_tokens,
    mix_seed,
    plan_microbatches,
    shared_prefix,
)
from cs336_alignment.data.tokenize import TokenizedExample
from cs336_alignment.microbatch import Batching, FlatLayout, Microbatch

layouts = st.sampled_from(get_args(Batching))
few = settings(max_examples=60, deadline=None, database=None)


@few
@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 2**40), st.booleans())
def test_every_epoch_is_a_permutation(examples: int, batch: int, seed: int, shuffle: bool) -> None:
    plan = StepPlan(examples, batch, seed, shuffle)
    steps = plan.steps_per_epoch
    assert steps == -(-examples // batch)
    for epoch in range(3):
        drawn = [plan.example_ids(step) for step in range(epoch * steps, (epoch + 1) * steps)]
        assert sorted(i for ids in drawn for i in ids) == list(range(examples))
        assert [len(ids) for ids in drawn[:-1]] == [batch] * (steps - 1)
        assert len(drawn[-1]) == examples - batch * (steps - 1) <= batch
        if not shuffle:
            assert [i for ids in drawn for i in ids] == list(range(examples))


def test_epochs_and_seeds_differ() -> None:
    orders = {
        StepPlan(100, 100, seed).example_ids(epoch) for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16 and tuple(range(100)) not in orders


def test_steps_may_be_asked_for_in_any_order() -> None:
    plan = StepPlan(10, 3, 0)
    forwards = [plan.example_ids(step) for step in range(20)]
    assert [plan.example_ids(step) for step in reversed(range(20))] == forwards[::-1]


PLANS = """
from cs336_alignment.data.batching import StepPlan, plan_microbatches
plan = StepPlan(37, 8, 42)
lengths = [2 + 13 * i % 29 for i in range(37)]
print([plan_microbatches(plan.example_ids(step), lengths, num_processes=2, process_index=p,
    microbatch_tokens=40, gradient_accumulation_steps=None, batching=batching)
    for step in (9, 3) for p in range(2) for batching in ("flat", "padded")])
"""


def test_a_fresh_process_plans_the_same() -> None:
    here: list[str] = []
    exec(PLANS, {"print": lambda value: here.append(repr(value))})
    there = subprocess.run(
        [sys.executable, "-c", PLANS], capture_output=True, text=True, timeout=120, check=True
    )
    assert there.stdout.strip() == here[0]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"),
    [(3, None, 12), (3, 5, 5), (3, 12, 12), (3, 99, 12), (0.5, None, 2), (0.3, None, 2), (0.01, None, 1),
     (1.0, None, 4), (1 / 3 * 3, None, 4)],
)  # fmt: skip
def test_total_steps(epochs: float, max_steps: int | None, steps: int) -> None:
    assert StepPlan(10, 3, 0).total_steps(epochs, max_steps) == steps


def test_mix_seed_is_splitmix64() -> None:
    """The first outputs for state 0, as published with the reference implementation."""
    assert mix_seed(0) == 0xE220A8397B1DCDAF >> 1
    assert mix_seed(-0x9E3779B97F4A7C15) == 0
    assert len({mix_seed(a, b) for a in range(30) for b in range(30)}) == 900
    assert all(0 <= mix_seed(a) < 2**63 for a in range(-50, 50))


lengths_of = st.lists(st.integers(2, 60), min_size=1, max_size=40)


@few
@given(lengths_of, st.integers(1, 6), st.data())
def test_slices_of_processes_partition_the_step(
    lengths: list[int], num_processes: int, data: st.DataObject
) -> None:
    ids = data.draw(st.permutations(range(len(lengths)))).copy()[
        : data.draw(st.integers(1, len(lengths)))
    ]
    slices = balance(ids, lengths, num_processes)
    assert len(slices) == num_processes
    assert sorted(i for part in slices for i in part) == sorted(ids)
    assert balance(ids[::-1], lengths, num_processes) == slices, "the order of drawing is no matter"
    loads = [sum(lengths[i] for i in part) for part in slices]
    assert max(loads) - min(loads) <= max(lengths[i] for i in ids)
    assert sum(not part for part in slices) == max(0, num_processes - len(ids))


def test_slices_are_balanced_by_tokens() -> None:
    assert balance(range(4), [2, 4, 10, 4], 2) == [[2], [1, 3, 0]]


@few
@given(lengths_of, st.integers(1, 4), st.integers(2, 200), layouts)
def test_microbatches_partition_the_slice_within_the_budget(
    lengths: list[int], num_processes: int, budget: int, batching: Batching
) -> None:
    ids = range(len(lengths))
    seen: list[int] = []
    for process in range(num_processes):
        cut = plan_microbatches(
            ids, lengths, num_processes=num_processes, process_index=process,
            microbatch_tokens=budget, gradient_accumulation_steps=None, batching=batching,
        )  # fmt: skip
        assert cut == [[]] or all(cut)
        for microbatch in filter(None, cut):
            sizes = [lengths[i] for i in microbatch]
            tokens = max(sizes) * len(sizes) if batching == "padded" else sum(sizes)
            assert tokens <= budget or len(sizes) == 1
        seen += [i for microbatch in cut for i in microbatch]
        assert sorted(seen[len(seen) - sum(map(len, cut)) :]) == sorted(
            balance(ids, lengths, num_processes)[process]
        )
    assert sorted(seen) == list(ids)


@few
@given(lengths_of, st.integers(1, 4), st.integers(1, 9), layouts)
def test_a_number_of_microbatches_partitions_the_slice(
    lengths: list[int], num_processes: int, accumulation: int, batching: Batching
) -> None:
    seen = []
    for process in range(num_processes):
        cut = plan_microbatches(
            range(len(lengths)), lengths, num_processes=num_processes, process_index=process,
            microbatch_tokens=None, gradient_accumulation_steps=accumulation, batching=batching,
        )  # fmt: skip
        mine = sum(map(len, cut))
        assert len(cut) == max(1, min(accumulation, mine))
        seen += [i for microbatch in cut for i in microbatch]
    assert sorted(seen) == list(range(len(lengths)))


def test_a_padded_budget_counts_padding() -> None:
    lengths = [2, 10, 2, 2, 2]
    assert cut_by_tokens(range(5), lengths, 20, batching="flat") == [[1, 0, 2, 3, 4]]
    assert cut_by_tokens(range(5), lengths, 20, batching="padded") == [[1, 0], [2, 3, 4]]


def test_an_example_over_the_budget_is_alone() -> None:
    lengths = [3, 50, 3, 3]
    for batching in get_args(Batching):
        assert cut_by_tokens(range(4), lengths, 9, batching=batching) == [[1], [0, 2, 3]]
    assert (
        cut_by_tokens([], lengths, 9, batching="flat")
        == cut_by_tokens([], lengths, 9, batching="padded")
        == []
    )


def test_budget_or_number_and_not_both() -> None:
    for budget, number in ((None, None), (8, 2)):
        with pytest.raises(ValueError, match="give one of"):
            plan_microbatches(
                [0], [2], num_processes=1, process_index=0, microbatch_tokens=budget,
                gradient_accumulation_steps=number, batching="flat",
            )  # fmt: skip


@pytest.mark.parametrize("batching", get_args(Batching))
def test_a_process_without_work_gets_one_empty_microbatch(batching: Batching) -> None:
    for budget, number in ((8, None), (None, 3)):
        cut = plan_microbatches(
            [4], [9] * 5, num_processes=3, process_index=2, microbatch_tokens=budget,
            gradient_accumulation_steps=number, batching=batching,
        )  # fmt: skip
        assert cut == [[]]
    filler = collate([], batching=batching)
    assert filler.input_ids.shape == (1, 1)
    assert filler.response_mask.tolist() == [False] and filler.labels.shape == (1,)
    assert filler.response_index.tolist() == [0] and filler.example_response_tokens.tolist() == [1]
    assert filler.num_response_tokens == 0


def example(ids: Sequence[int], num_prompt: int, example_id: int) -> TokenizedExample:
    mask = torch.arange(len(ids)) >= num_prompt
    return TokenizedExample(torch.tensor(ids), mask, example_id)


PAIR = [example([10, 11, 12, 13], 2, 5), example([20, 21], 1, 3)]


def test_a_flat_row_by_hand() -> None:
    batch = collate(PAIR, batching="flat")
    assert batch.input_ids.tolist() == [[10, 11, 12, 20]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0]]
    assert batch.attention_mask is None and batch.flat_layout is not None
    assert batch.flat_layout.groups == ((1, 3), (1, 1)) and batch.flat_layout.max_length == 3
    assert batch.flat_layout.cu_seq_lens.tolist() == [0, 3, 4]
    assert batch.flat_layout.cu_seq_lens.dtype == torch.int32
    assert batch.response_index.tolist() == [1, 2, 3]
    check_common(batch)


def test_padded_rows_by_hand() -> None:
    batch = collate(PAIR, batching="padded")
    assert batch.input_ids.tolist() == [[10, 11, 12], [20, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.attention_mask is not None and batch.flat_layout is None
    assert batch.attention_mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.response_index.tolist() == [1, 2, 3]
    check_common(batch)


def check_common(batch: Microbatch) -> None:
    assert batch.labels.tolist() == [12, 13, 21]
    assert batch.response_mask.tolist() == [True] * 3
    assert batch.example_response_tokens.tolist() == [2, 2, 1]
    assert batch.num_response_tokens == 3
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


@few
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6))
def test_both_layouts_hold_the_same(sizes: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    examples = [
        example(torch.randint(1, 99, (p + r,), generator=generator).tolist(), p, index)
        for index, (p, r) in enumerate(sizes)
    ]
    flat, padded = collate(examples, batching="flat"), collate(examples, batching="padded")
    # (token, its position, the label it predicts, what its example is divided by), by hand
    expected = [
        (int(e.input_ids[t]), t, int(e.input_ids[t + 1]), r)
        for e, (p, r) in zip(examples, sizes, strict=True)
        for t in range(p - 1, p + r - 1)
    ]
    for batch in (flat, padded):
        where = batch.response_index
        have = (
            batch.input_ids.flatten()[where], batch.position_ids.flatten()[where], batch.labels,
            batch.example_response_tokens,
        )  # fmt: skip
        assert list(zip(*(column.tolist() for column in have), strict=True)) == expected
        assert batch.num_response_tokens == len(expected) == int(batch.response_mask.sum())
    assert padded.attention_mask is not None and flat.flat_layout is not None
    assert torch.equal(padded.input_ids[padded.attention_mask], flat.input_ids[0])
    assert torch.equal(padded.position_ids[padded.attention_mask], flat.position_ids[0])
    borders = flat.flat_layout.cu_seq_lens
    assert borders.diff().tolist() == [p + r - 1 for p, r in sizes]
    assert [
        n for count, n in flat.flat_layout.groups for _ in range(count)
    ] == borders.diff().tolist()


@few
@given(
    st.integers(0, 20), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1),
    st.booleans(),
)  # fmt: skip
def test_a_shared_prefix_is_there_once_and_everything_else_stays(
    prefix: int, sizes: list[tuple[int, int]], odd: bool
) -> None:
    """Taken apart again, the row gives the examples; and each key index leads to what it should."""
    generator = torch.Generator().manual_seed(0)
    examples = [
        example(
            [*range(prefix), *torch.randint(30, 99, (p + r,), generator=generator).tolist()],
            prefix + p, index,
        )
        for index, (p, r) in enumerate(sizes)
    ]  # fmt: skip
    if odd:
        examples[-1].input_ids[0] = 77  # one that begins otherwise: nothing is shared
    shared = shared_prefix(examples)
    starts = [e.input_ids[: int(e.response_mask.int().argmax()) - 1].tolist() for e in examples]
    columns = zip(*starts, strict=False)
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    common = len(list(alike)) if len(starts) > 1 else 0
    total = sum(len(e.input_ids) - 1 for e in examples)
    pays = common >= 16 and (len(examples) - 1) * common >= 0.05 * total
    assert shared == (common if pays else 0)
    batch = collate(examples, batching="flat_shared_prefix")
    plain = collate(examples, batching="flat")
    assert batch.input_ids.numel() == total - (len(examples) - 1) * shared
    for name in ("labels", "response_mask", "example_response_tokens"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))
    for name in ("input_ids", "position_ids"):
        row, whole = getattr(batch, name)[0], getattr(plain, name)[0]
        assert torch.equal(row[batch.response_index], whole[plain.response_index])
    assert batch.flat_layout is not None and plain.flat_layout is not None
    parts = list(batch.input_ids[0].tensor_split(batch.flat_layout.cu_seq_lens[1:-1].tolist()))
    index = batch.flat_layout.prefix
    if index is None:
        assert not shared
    else:
        assert parts.pop(0).tolist() == examples[0].input_ids[:shared].tolist()
        keys = batch.input_ids[0, index.key_index]
        seen = keys.tensor_split(index.cu_key_lens[1:-1].tolist())[1:]
        assert all(torch.equal(s, e.input_ids[:-1]) for s, e in zip(seen, examples, strict=True))
        assert torch.equal(keys[index.own_index], batch.input_ids[0])
        copies = index.key_index[index.copies].unflatten(0, (-1, shared))
        assert len(copies) == len(examples) + 1 and (copies == torch.arange(shared)).all()
    for part, e in zip(parts, examples, strict=True):
        assert torch.equal(part, e.input_ids[shared:-1])


def test_a_trained_token_is_never_shared() -> None:
    ids = torch.arange(60)
    pair = [TokenizedExample(ids, ids >= 30, i) for i in range(2)]
    assert shared_prefix(pair) == 29  # position 29 predicts the first trained token
    early = [*pair, TokenizedExample(ids, ids >= 20, 2)]
    assert shared_prefix(early) == 19
    assert shared_prefix(pair[:1]) == 0
    assert shared_prefix([TokenizedExample(ids, ids >= 10, i) for i in range(2)]) == 0


def test_groups_join_neighbours_of_one_length() -> None:
    assert FlatLayout.of([3, 2, 2, 3, 3, 3]).groups == ((1, 3), (2, 2), (3, 3))


def test_a_first_token_without_prompt_is_no_label() -> None:
    for batching in get_args(Batching):
        batch = collate([example([7, 8, 9], 0, 0)], batching=batching)
        assert batch.labels.tolist() == [8, 9] and batch.num_response_tokens == 2


def test_a_microbatch_stays_on_its_device() -> None:
    batch = collate(PAIR, batching="flat")
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    assert moved.flat_layout is not None and moved.flat_layout.cu_seq_lens.is_meta
    assert moved.input_ids.is_meta and moved.labels.is_meta
