"""The best step and the end of patience follow from the metrics alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cs336_alignment.config import Config, TrainerConfig
from cs336_alignment.config_check import check
from cs336_alignment.errors import UserError
from cs336_alignment.metric_names import EVALUATED, GENERATED, greater_is_better
from cs336_alignment.training.best import Criterion, Judge, Score, Verdict
from cs336_alignment.training.checkpoint_folders import mark_latest
from cs336_alignment.training.checkpoint_writer import CheckpointWriter
from cs336_alignment.training.manifest import _evaluation_hash
from cs336_alignment.training.snapshot import TrainState
from tests.checkpoints import save

LOSS = Criterion("eval/loss", greater=False)
REWARD = Criterion("eval/answer_reward", greater=True)


def rows_of(values: dict[int, float | None], metric: str = "eval/loss") -> list[dict[str, Any]]:
    steps = [{"step": step, "train/loss": 0.0} for step in values]  # lines that are no evaluations
    return steps + [{"step": step, metric: value} for step, value in values.items()]


def judge(
    values: dict[int, float | None], saved: set[int] | None = None, *, patience: int | None = None,
    criterion: Criterion | None = LOSS, **since: int,
) -> Judge:  # fmt: skip
    options = {"comparable_since": 0, "patient_since": 0} | since
    steps = set(values) if saved is None else saved
    return Judge(
        criterion, patience, **options, evaluations=lambda: rows_of(values), saved_steps=lambda: steps
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "least", "greatest"),
    [
        ({3: 2.0, 6: 1.0, 9: 1.5}, 6, 3),
        ({3: 1.0, 6: 1.0, 9: 1.0}, 3, 3),  # of equals the earlier one
        ({3: None, 6: 1.0, 9: None}, 6, 6),  # null is NaN: it never wins
        ({3: 1.0, 6: None, 9: 2.0}, 3, 9),
    ],
)
def test_the_best_step(values: dict[int, float | None], least: int, greatest: int) -> None:
    for greater, want in ((False, least), (True, greatest)):
        criterion = Criterion("eval/loss", greater)
        best = criterion.best(criterion.scores(rows_of(values)))
        assert best == Score(want, float(values[want] or math.nan))


def test_no_number_no_best() -> None:
    assert LOSS.best(LOSS.scores(rows_of({3: None, 6: None}))) is None
    assert judge({3: None}).verdict(3) == Verdict()
    assert judge({}).verdict(0) == Verdict()
    assert judge({3: 1.0}, criterion=None, patience=1).verdict(9) == Verdict()


def test_infinities_do_not_win_before_they_are_written_either() -> None:
    """In the file they are null; what is judged before the writing must be judged alike."""
    for value in (math.inf, -math.inf, math.nan):
        for greater in (False, True):
            criterion = Criterion("eval/loss", greater)
            verdict = judge({3: 1.0}, criterion=criterion).verdict(6, {"eval/loss": value})
            assert verdict.best == Score(3, 1.0)


def test_step_zero_counts_for_patience_and_is_never_exported() -> None:
    made_worse = judge({0: 1.0, 3: 2.0, 6: 3.0}, patience=2)
    assert made_worse.verdict(6) == Verdict(Score(3, 2.0), stop=True)
    assert [score.step for score in made_worse.choices(6)] == [3, 6]
    assert judge({0: 1.0}, patience=1).verdict(0) == Verdict()


@pytest.mark.parametrize(
    ("values", "patience", "stop"),
    [
        ({0: 9.0, 3: 5.0, 6: 6.0}, 2, False),
        ({0: 9.0, 3: 5.0, 6: 6.0, 9: 5.0}, 2, True),  # as good is not better
        ({0: 9.0, 3: 5.0, 6: 6.0, 9: 4.0}, 2, False),
        ({0: None, 3: None}, 2, False),  # the first one is what others must be better than
        ({0: None, 3: None, 6: None}, 2, True),
        ({0: 9.0, 3: 5.0, 6: 6.0, 9: 7.0}, None, False),
    ],
)
def test_patience(values: dict[int, float | None], patience: int | None, stop: bool) -> None:
    assert judge(values, patience=patience).verdict(max(values)).stop == stop


def test_more_steps_after_an_early_end_begin_a_new_patience() -> None:
    values: dict[int, float | None] = {0: 9.0, 3: 5.0, 6: 6.0, 9: 7.0}
    assert judge(values, patience=2).verdict(9).stop
    assert not judge(values, patience=2, patient_since=9).verdict(9).stop
    assert not judge(values | {12: 8.0}, patience=2, patient_since=9).verdict(12).stop
    assert judge(values | {12: 8.0, 15: 8.0}, patience=2, patient_since=9).verdict(15).stop


def test_evaluations_of_other_questions_do_not_compare() -> None:
    verdict = judge({3: 1.0, 6: 4.0, 9: 3.0}, comparable_since=4).verdict(9)
    assert verdict.best == Score(9, 3.0)


def test_a_checkpoint_that_is_gone_is_told_and_the_next_best_is_kept() -> None:
    verdict = judge({3: 1.0, 6: 2.0, 9: 3.0}, saved={6, 9}).verdict(9)
    assert verdict == Verdict(Score(6, 2.0), saved=True, lost=Score(3, 1.0))
    present = judge({3: 2.0, 6: 1.0}, saved={3}).verdict(6)
    assert present == Verdict(Score(6, 1.0), saved=False)  # it can still be saved
    assert judge({3: 1.0}, saved=set()).verdict(6) == Verdict(None, lost=Score(3, 1.0))


@given(st.lists(st.one_of(st.none(), st.integers(-3, 3).map(float)), min_size=1, max_size=9))
def test_a_kill_changes_no_verdict(values: list[float | None]) -> None:
    """Judging at every evaluation ends where judging once from the whole file does."""
    dated: dict[int, float | None] = {}
    for number, value in enumerate(values):
        before_writing = judge(dated, patience=3).verdict(
            number, {"eval/loss": math.nan if value is None else value}
        )
        dated[number] = value
        after = judge(dated, patience=3).verdict(number)
        assert (before_writing.best, before_writing.stop) == (after.best, after.stop)
    kept = [score for score in LOSS.scores(rows_of(dated)) if score.step > 0]
    assert judge(dated).verdict(len(values)).best == LOSS.best(kept)


def test_every_metric_says_which_way_is_better() -> None:
    greater = {name for name in EVALUATED if greater_is_better(name)}
    assert greater == {
        "eval/reward", "eval/format_reward", "eval/answer_reward", "eval/stop_rate",
    }  # fmt: skip
    assert all(greater_is_better(name) is not None for name in EVALUATED)
    assert greater_is_better("eval/loss/gsm8k_rewards") is False
    assert greater_is_better("eval/happiness") is None
    metric = TrainerConfig(metric_for_best_model="eval/loss", greater_is_better=True)
    assert Criterion.of(metric) == Criterion("eval/loss", True)


def config(**trainer: Any) -> Config:
    result = Config(run_name="r", trainer=TrainerConfig(**trainer))
    result.model.name_or_path, result.data.train_path, result.data.eval_path = "m", "d", "e"
    return result


@pytest.mark.parametrize(
    ("trainer", "code", "text"),
    [
        ({"metric_for_best_model": "answer_reward"}, "C131", "did you mean eval/answer_reward?"),
        ({"metric_for_best_model": "eval_loss"}, "C131", "did you mean eval/loss?"),
        ({"metric_for_best_model": "train/grad_norm"}, "C131", "begins with eval/"),
        ({"metric_for_best_model": "eval/answer_rewrd", "eval_steps": 5}, "C133", "did you mean"),
        ({"early_stopping_patience": 3}, "C134", "trainer.metric_for_best_model=eval/loss"),
        ({"metric_for_best_model": "eval/loss"}, "C135", "trainer.eval_steps=100"),
        (
            {"metric_for_best_model": "eval/reward", "eval_steps": 5},
            "C135",
            "evaluation.generation_steps=100",
        ),
    ],
)
def test_what_cannot_choose_is_refused_at_the_start(
    trainer: dict[str, Any], code: str, text: str
) -> None:
    with pytest.raises(UserError) as error:
        check(config(**trainer))
    assert error.value.code == code and text in str(error.value)


def test_what_can_choose_is_not_refused() -> None:
    check(config(metric_for_best_model="eval/loss/gsm8k", eval_steps=5))
    check(config(metric_for_best_model="eval/happiness", greater_is_better=True, eval_steps=5))
    generating = config(metric_for_best_model="eval/reward", early_stopping_patience=1)
    generating.evaluation.generation_steps = 5
    check(generating)
    generating.data.eval_path = None
    with pytest.raises(UserError, match="no evaluation data"):
        check(generating)


def test_a_metric_that_does_not_come_is_named_with_those_that_do() -> None:
    of = {"eval/loss": 1.0, "eval/reward": 0.0}
    judge({}).refuse_missing(of)
    with pytest.raises(UserError) as error:
        judge({}, criterion=Criterion("eval/rewards", True)).refuse_missing(of)
    text = str(error.value)
    assert error.value.code == "C132" and "eval/loss, eval/reward" in text
    assert "did you mean eval/reward?" in text
    sometimes = Criterion("eval/response_length_correct", False)
    assert sometimes.metric in GENERATED
    judge({}, criterion=sometimes).refuse_missing(of)  # nothing was correct


def test_a_damaged_checkpoint_is_none(tmp_path: Path) -> None:
    """The best step after it is saved anew, though a folder of that name is there."""
    save(tmp_path, 1, keep=9)
    save(tmp_path, 2, keep=9)
    writer = CheckpointWriter(
        tmp_path, extra={}, save_sidecars=lambda _: None, keep=9, asynchronous=False,
        damaged=[tmp_path / "step-000002"],
    )  # fmt: skip
    assert writer.saved_steps == {1}
    module = torch.nn.Linear(2, 2)
    writer.begin(TrainState(step=2), module, torch.optim.AdamW(module.parameters()))
    writer.finish()
    assert writer.saved_steps == {1, 2}


@pytest.mark.parametrize("change", ["top_p=0.5", "num_samples=2", "min_new_tokens=3"])
def test_other_sampling_is_another_question(change: str) -> None:
    name, value = change.split("=")
    before, after = Config(), Config()
    setattr(after.evaluation, name, float(value))
    assert _evaluation_hash(before, None, None) != _evaluation_hash(after, None, None)


def test_the_best_checkpoint_outlives_the_rotation(tmp_path: Path) -> None:
    def left() -> tuple[list[str], dict[str, str]]:
        names = sorted(path.name for path in tmp_path.glob("step-*"))
        return names, json.loads((tmp_path / "index.json").read_text())

    save(tmp_path, 1, keep=1)
    mark_latest(tmp_path, 1, best=1, keep=1)
    save(tmp_path, 2, keep=1, best=1)
    save(tmp_path, 3, keep=1, best=1)
    index = {"latest": "step-000003", "best": "step-000001"}
    assert left() == (["step-000001", "step-000003"], index)
    save(tmp_path, 4, keep=2, best=1)
    mark_latest(tmp_path, 4, best=4, keep=2)
    index = {"latest": "step-000004", "best": "step-000004"}
    assert left() == (["step-000003", "step-000004"], index)
    (tmp_path / "step-000004" / "model.safetensors").write_bytes(b"")  # a later one, damaged
    mark_latest(tmp_path, 3, best=3, keep=1)
    assert left()[0] == ["step-000003", "step-000004"]
