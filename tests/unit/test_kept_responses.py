"""Responses that are on the disk are not generated again, and a torn line is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cs336_alignment.errors import UserError
from cs336_alignment.evaluation.kept_responses import CHUNK_BATCHES, KeptGenerator, KeptResponses
from cs336_alignment.evaluation.sampling import Generation, Request, Sampling

REQUESTS = [Request([1 + i % 3] * (1 + i % 5), seed=i) for i in range(30)]


class Counting:
    """Answers with what was asked, and stops when told to."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.asked: list[int] = []
        self.stop_after = stop_after

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *,
        advance: Callable[[int], None] = lambda _: None,
    ) -> list[Generation]:  # fmt: skip
        if len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += [request.seed for request in requests]
        advance(len(requests))
        return [
            Generation(f"té\ud7ff {r.seed}", (r.seed, 2), 0.1 * r.seed, 2, "eos") for r in requests
        ]


def run(folder: Path, inner: Counting, identity: str = "a", process: int = 0) -> list[Generation]:
    kept = KeptResponses(folder, identity, process)
    done: list[int] = []
    try:
        return KeptGenerator(inner, kept, batch_size=2).generate(
            REQUESTS, Sampling(), advance=done.append
        )
    finally:
        if inner.stop_after > len(REQUESTS):
            assert sum(done) == len(REQUESTS)


def test_a_stopped_generation_goes_on(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Counting())
    assert [g.token_ids[0] for g in whole] == list(range(30))
    first = Counting(stop_after=16)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", first)
    second = Counting()
    assert run(tmp_path / "cut", second) == whole
    assert len(first.asked) == 2 * 2 * CHUNK_BATCHES
    assert sorted(first.asked + second.asked) == list(range(30))
    third = Counting()
    assert run(tmp_path / "cut", third) == whole and third.asked == []


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_a_torn_line_is_generated_anew(tmp_path: Path, cut: int) -> None:
    whole = run(tmp_path, Counting())
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-cut])
    again = Counting()
    assert run(tmp_path, again) == whole
    assert len(again.asked) == (0 if cut == 1 else 30 % (2 * CHUNK_BATCHES) or 2 * CHUNK_BATCHES)
    last = Counting()  # what was appended after the torn line is whole
    assert run(tmp_path, last) == whole and last.asked == []


def test_another_model_has_its_own_and_processes_share(tmp_path: Path) -> None:
    run(tmp_path, Counting(), identity="a", process=0)
    other = Counting()
    run(tmp_path, other, identity="b")
    assert len(other.asked) == 30
    shared = Counting()
    run(tmp_path, shared, identity="a", process=1)  # it reads what process 0 wrote
    assert shared.asked == []


def test_a_disk_that_refuses_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot keep responses"):
        KeptResponses(tmp_path / "file" / "x", "a", 0).add(
            REQUESTS[:1], [Generation("", (), None, 0, "eos")]
        )
