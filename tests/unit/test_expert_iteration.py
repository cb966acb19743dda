"""What an iteration asks and trains on; `tests/faults/test_experiment_kills.py` runs it whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cs336_alignment.config import ColumnsConfig, Config, DataConfig, ModelConfig
from cs336_alignment.data.splits import prepare_run
from cs336_alignment.errors import UserError
from cs336_alignment.experiments.expert_iteration import config_of_iteration, copy_whole
from cs336_alignment.experiments.expert_summary import choose_iteration
from cs336_alignment.experiments.samples import (
    RESULT,
    choose_questions,
    refuse_other_rows,
    summarize_samples,
)
from cs336_alignment.model.loading import load_tokenizer
from cs336_alignment.model.source import resolve_model


def test_questions_are_a_pure_function_of_seed_and_iteration() -> None:
    gradable = np.array([1, 2, 5, 7, 8, 9])
    assert choose_questions(gradable, None, 1, 1).tolist() == gradable.tolist()
    assert choose_questions(gradable, 99, 1, 1).tolist() == gradable.tolist()
    drawn = {
        (seed, number): tuple(choose_questions(gradable, 3, seed, number).tolist())
        for seed in (1, 2) for number in range(1, 5)
    }  # fmt: skip
    assert len(set(drawn.values())) > 4
    for (seed, number), chosen in drawn.items():
        assert list(chosen) == sorted(set(chosen)) and set(chosen) <= set(gradable.tolist())
        assert tuple(choose_questions(gradable, 3, seed, number).tolist()) == chosen


def test_samples_are_counted() -> None:
    def row(index: int, response: str, right: float) -> dict[str, object]:
        return {"index": index, "response": response, "answer_reward": right,
                "format_reward": 1.0, "token_entropy": 0.5, "length": 4}  # fmt: skip

    rows = [row(0, "a", 1.0), row(0, "a", 1.0), row(0, "b", 1.0), row(3, "c", 0.0)]
    found = summarize_samples(rows, rows[:3], rows[1:3])
    assert (found["questions"], found["samples"], found["correct"]) == (2, 4, 3)
    assert (found["duplicates"], found["kept"], found["solved_share"]) == (1, 2, 0.5)
    assert found["correct_share"] == 0.75 and found["response_entropy"] == 0.5


def test_an_iteration_reads_its_rows_and_the_evaluation_data_as_the_command_says(
    tmp_path: Path,
) -> None:
    config = Config(run_name="e", output_root=str(tmp_path))
    held_out = tmp_path / "test.jsonl"
    held_out.write_text(json.dumps({"q": "1 + 1 = ?", "answer": "Two.\n#### 2", "prompt": "no"}))
    config.data = DataConfig(
        "train.jsonl", eval_path=str(held_out), columns=ColumnsConfig(question="q"),
        format="question_answer", max_train_examples=1, filter="correct",
    )  # fmt: skip
    run = config_of_iteration(config, 2, ModelConfig("m"))
    assert (run.run_name, run.output_root) == ("iteration-02", str(tmp_path / "e"))
    assert run.evaluation.generation_steps == 0 and run.model.name_or_path == "m"
    assert config.evaluation.generation_steps is None and config.data.filter == "correct"
    rows = Path(run.data.train_path)
    rows.parent.mkdir(parents=True)
    row = {"prompt": "User: 3 + 4 = ?", "response": " 7", "ground_truth": "7"}
    rows.write_text((json.dumps(row) + "\n") * 3)
    tokenizer = load_tokenizer(resolve_model("builtin:arithmetic", None, False))
    data = prepare_run(run.data, tokenizer, seed=1)
    assert len(data.train.dataset) == 3 and data.train.ground_truths == ["7"] * 3
    assert data.held_out is not None and data.held_out.ground_truths == ["2"]


def test_the_best_iteration_is_chosen_by_its_metric(tmp_path: Path) -> None:
    parts = []
    for number, (reward, loss) in enumerate([(0.5, 0.3), (0.75, 0.2), (0.75, 0.4)], start=1):
        part = tmp_path / f"iteration-{number:02d}"
        part.mkdir()
        line = {"step": 4, "eval/answer_reward": reward, "eval/loss": loss}
        (part / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        parts.append(part)
    assert choose_iteration(parts, None) == (3, None)
    assert choose_iteration(parts, "eval/answer_reward") == (2, 0.75)
    assert choose_iteration(parts, "eval/loss") == (2, 0.2)
    assert choose_iteration(parts, "eval/reward") == (3, None)


def test_a_model_is_copied_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", tmp_path / "model"
    source.mkdir()
    (source / "a").write_text("new")
    target.mkdir()
    (target / "b").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copytree", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError):
            copy_whole(source, target)
    assert (target / "b").read_text() == "old"
    copy_whole(source, target)
    assert [path.name for path in target.iterdir()] == ["a"]


def test_rows_that_were_trained_on_are_not_replaced_by_others(tmp_path: Path) -> None:
    request = {"iteration": 1, "reward": ["r.py:reward", "a" * 64], "seed": 3}
    refuse_other_rows(1, tmp_path, request)  # lost: the same ones are drawn again
    (tmp_path / RESULT).write_text(json.dumps({"request": request}))
    refuse_other_rows(1, tmp_path, request)
    with pytest.raises(UserError, match="other samples") as caught:
        refuse_other_rows(1, tmp_path, request | {"reward": ["r.py:reward", "b" * 64]})
    assert caught.value.code == "C302" and "reward" in str(caught.value)
