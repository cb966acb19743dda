"""`data.filter=correct`: only rows that verify are trained on, and every other one is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cs336_alignment.config import DataConfig, EvaluationConfig, SourceConfig
from cs336_alignment.data.splits import RunData, ledger_json, prepare_run
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.evaluation.verify import verifying
from cs336_alignment.model.loading import load_tokenizer
from cs336_alignment.model.source import resolve_model
from tests.conftest import TINY, Sft

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows of 3 + i = …; those of the numbers given have another answer in the response."""

    def rows(name: str, count: int, wrong: tuple[int, ...] = (), truth: bool = True) -> Path:
        path = tmp_path / name
        with path.open("w") as file:
            for i in range(count):
                said = 3 + i + (i in wrong)
                response = f" Add {i} to 3. </think> <answer> {said} </answer>"
                row = {"prompt": f"3 + {i} = ? <think>", "response": response}
                file.write(json.dumps(row | ({"ground_truth": str(3 + i)} if truth else {})) + "\n")
        return path

    return rows


def prepared(config: DataConfig) -> RunData:
    tokenizer = load_tokenizer(resolve_model("builtin:arithmetic", None, False))
    with verifying(EvaluationConfig()) as verify:
        return prepare_run(config, tokenizer, seed=1, verify=verify)


def test_only_correct_rows_are_trained_on_and_the_others_are_counted(write: Write) -> None:
    path, alone = write("a.jsonl", 9, wrong=(2, 5)), write("b.jsonl", 9)
    alone.write_text("".join(alone.read_text().splitlines(True)[i] for i in (0, 1, 3, 4, 6, 7, 8)))
    data = prepared(DataConfig(str(path), eval_path=str(path), filter="correct"))
    want = prepared(DataConfig(str(alone)))
    assert data.train.places == [f"{path}:{i + 1}" for i in (0, 1, 3, 4, 6, 7, 8)]
    assert [data.train.dataset[i].input_ids.tolist() for i in range(7)] == [
        want.train.dataset[i].input_ids.tolist() for i in range(7)
    ]
    assert data.held_out is not None and len(data.held_out.dataset) == 9
    (ledger,), (same,) = data.train.ledgers, want.train.ledgers
    assert (ledger.rows_read, ledger.filtered, ledger.dropped) == (9, {"wrong": 2}, {})
    for name in ("kept", "tokens", "response_tokens", "longest", "ends_with_stop", "lengths"):
        assert getattr(ledger, name) == getattr(same, name), name
    written = ledger_json(data)
    assert written["train"]["filtered"] == {"wrong": 2} and written["eval"]["filtered"] == {}
    assert ("filtered: wrong", "2") in list(ledger.rows())
    other = prepared(DataConfig(str(path), eval_path=str(path)))
    assert other.train.fingerprint != data.train.fingerprint


def test_what_is_set_aside_for_evaluation_is_not_filtered(write: Write) -> None:
    config = DataConfig(str(write("a.jsonl", 20, wrong=tuple(range(0, 20, 2)))), eval_fraction=0.5)
    plain = prepared(config)
    config.filter = "correct"
    data = prepared(config)
    assert data.held_out is not None and plain.held_out is not None
    assert data.held_out.places == plain.held_out.places
    assert set(data.train.places) < set(plain.train.places)
    filtered = len(plain.train.places) - len(data.train.places)
    assert data.train.ledgers[0].filtered == {"wrong": filtered}
    assert data.train.ledgers[0].kept == 20 - filtered


def test_a_mixture_draws_what_is_left_of_each_source(write: Write) -> None:
    sources = [
        SourceConfig(str(write("a.jsonl", 10, wrong=(0, 1))), weight=1),
        SourceConfig(str(write("b.jsonl", 6, wrong=(5,))), weight=1),
    ]
    data = prepared(DataConfig(sources=sources, filter="correct", mixture_stop="all_exhausted"))
    assert data.train.mixture is not None and data.train.mixture.sizes == (8, 5)
    assert [ledger.filtered["wrong"] for ledger in data.train.ledgers] == [2, 1]
    numbers = np.concatenate([data.train.mixture.order(1, epoch, None) for epoch in range(2)])
    assert set(numbers.tolist()) == set(range(13))


@pytest.mark.parametrize(
    ("wrong", "truth", "code", "texts"),
    [
        ((1,), False, "D340", ("a.jsonl:1", "columns.ground_truth", "4 errors in all")),
        ((0, 1, 2, 3), True, "D301", ("4 examples", "no example", "data.filter=none")),
    ],
)
def test_what_cannot_be_filtered(
    wrong: tuple[int, ...], truth: bool, code: str, texts: tuple[str, ...], write: Write
) -> None:
    path = write("a.jsonl", 4, wrong, truth)
    with pytest.raises(UserError) as raised:
        prepared(DataConfig(str(path), filter="correct"))
    assert (raised.value.code, raised.value.status) == (code, ExitStatus.BAD_DATA)
    for text in texts:
        assert text in str(raised.value)


def test_the_commands_honour_it_and_a_run_keeps_to_it(
    write: Write, sft: Sft, tmp_path: Path
) -> None:
    path = write("a.jsonl", 12, wrong=(0, 7))
    given = (*TINY, f"data.train_path={path}", "run_name=r", "trainer.max_steps=2")
    done = sft("train", *given, "data.filter=correct")
    assert done.returncode == 0, done.stderr
    assert "10 examples of 12 rows" in done.stdout and "2 filtered (wrong)" in done.stdout
    ledger = json.loads((tmp_path / "outputs/r/data_ledger.json").read_text())
    assert ledger["train"]["filtered"] == {"wrong": 2} and ledger["train"]["examples"] == 10
    changed = sft("train", *given, "trainer.max_steps=3")
    assert changed.returncode == 78 and "data.filter: correct → none" in changed.stderr
    shown = sft("prepare", *given, "data.filter=correct")
    assert "filtered: wrong" in shown.stdout
    seen = sft("inspect", *given, "data.filter=correct")
    assert "a.jsonl:2" in seen.stdout and "2 wrong" in seen.stdout
    clash = sft("train", *given, "data.filter=correct", "data.overlong=split")
    assert clash.returncode == 78 and "data.overlong" in clash.stderr
