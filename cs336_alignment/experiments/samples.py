"""One iteration's sampling: questions drawn, responses sampled and verified, the correct ones kept
as rows to train on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from cs336_alignment.config import Config, ModelConfig
from cs336_alignment.data.batching import mix_seed
from cs336_alignment.data.splits import PreparedData
from cs336_alignment.data.tokenize import tokenize_prompts
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.evaluation.arms import Arm
from cs336_alignment.evaluation.evaluator import Evaluator
from cs336_alignment.evaluation.grading import failures_of
from cs336_alignment.evaluation.kept_responses import FOLDER, forget
from cs336_alignment.evaluation.rewards import code_of, make_reward
from cs336_alignment.evaluation.run import Opening
from cs336_alignment.files import sha256_of, write_json
from cs336_alignment.model.compile import in_eager
from cs336_alignment.model.source import resolve_model
from cs336_alignment.tracking.console import Console
from cs336_alignment.tracking.tracker import write_generations
from cs336_alignment.training.parallel import Processes

ROWS, SAMPLES, RESULT = "rows.jsonl", "samples.jsonl", "sampling.json"
QUESTION_STREAM, SAMPLE_STREAM = 11, 12  # of the seeds mixed from the run's
COLUMNS = ("prompt", "response", "ground_truth")


class Sampler:
    """Samples with the models of the iterations, one after another.

    Args:
        config: of the command.
        data: whose questions are asked.
        tokenizer: of the first model, and so of all.
        precision: as `refuse_launcher_options` gave it.
        processes: share the work.
        console: shows what happens.
        asked: gives the status of a request to stop, None while there is none.
    """

    def __init__(
        self,
        config: Config,
        data: PreparedData,
        tokenizer: PreTrainedTokenizerBase,
        *,
        precision: str,
        processes: Processes,
        console: Console,
        asked: Callable[[], ExitStatus | None],
    ) -> None:
        self.config = config
        self.data = data
        self.tokenizer = tokenizer
        self.precision = precision
        self.processes = processes
        self.console = console
        self.asked = asked
        self.reward = make_reward(config.evaluation)
        self.gradable = np.flatnonzero([truth is not None for truth in data.ground_truths])

    def __call__(
        self, iteration: int, model: ModelConfig, folder: Path, *, is_trained: bool
    ) -> bool:
        """Leave an iteration's rows in its folder, unless they are there.

        Responses are kept as they come, so a stop costs at most a few batches.

        Args:
            iteration: from 1.
            model: that is asked.
            folder: of the iteration.
            is_trained: whether steps were taken on the rows.

        Returns:
            Whether there was anything left to do.

        Raises:
            UserError: rows that were trained on would be others now (78); no response is correct,
                or a prompt does not survive being written (65); the disk refuses (73, 74).
            StopNow: some process was asked to stop.
        """
        request = self._request(iteration, model)
        if is_trained:
            refuse_other_rows(iteration, folder, request)
        if self.processes.agree(_is_done(folder, request)):
            self.console.note(f"responses of iteration {iteration} are there: {folder / ROWS}")
            self.processes.on_main(lambda: forget(folder / FOLDER))  # a kill may have left them
            return False
        evaluator = self._open(iteration, model, folder)
        with in_eager():
            rows = evaluator.generate()
        if (failures := failures_of(rows)) is not None:
            self.console.warn(failures)
        self.processes.on_main(lambda: self._write(iteration, folder, request, rows))
        return True

    def _open(self, iteration: int, model: ModelConfig, folder: Path) -> Evaluator:
        options = self.config.expert_iteration
        chosen = choose_questions(self.gradable, options.num_questions, self.config.seed, iteration)
        source = resolve_model(model.name_or_path, model.revision, model.trust_remote_code)
        arm = Arm(model, source, self.tokenizer, self.data, chosen)
        self._refuse_changed_prompts(arm)
        evaluation = replace(
            self.config.evaluation, num_prompts=None, num_samples=options.num_samples,
            temperature=options.temperature, top_p=options.top_p,
        )  # fmt: skip
        self.console.note(
            f"sampling   {len(chosen):,} questions × {options.num_samples} responses, temperature "
            f"{options.temperature:g}, top_p {options.top_p:g}"
        )
        config = replace(self.config, evaluation=evaluation)
        opening = Opening(config, self.precision, folder, self.processes, self.console, self.reward)
        evaluator = opening.model(arm)
        evaluator.seed = mix_seed(self.config.seed, SAMPLE_STREAM, iteration)
        evaluator.asked = self.asked
        return evaluator

    def _request(self, iteration: int, model: ModelConfig) -> dict[str, Any]:
        """Everything that decides what the rows are; the weights follow from the model's folder."""
        evaluation, options = self.config.evaluation, self.config.expert_iteration
        return {
            "iteration": iteration,
            # Lists are of training; requests made before there were any compare equal.
            "model": {name: value for name, value in asdict(model).items() if value != []},
            "data": self.data.fingerprint,
            "seed": self.config.seed,
            "num_questions": options.num_questions,
            "num_samples": options.num_samples,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_new_tokens": evaluation.max_new_tokens,
            "min_new_tokens": evaluation.min_new_tokens,
            "stop": list(evaluation.stop),
            "reward": [evaluation.reward, code_of(self.reward)],
        }

    def _refuse_changed_prompts(self, arm: Arm) -> None:
        """Refuse a prompt whose text, once written into a row, would be other tokens."""
        numbers = range(len(arm.chosen))
        wanted = [arm.dataset.prompt_ids(number) for number in numbers]
        texts = [
            str(self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            ))
            for ids in wanted
        ]  # fmt: skip
        again = tokenize_prompts(texts, self.tokenizer, self.config.data.add_special_tokens)
        for number in numbers:
            if again[number] != wanted[number]:
                example = int(arm.chosen[number])
                raise UserError(
                    "D341",
                    f"the prompt of {arm.data.places[example]} is other tokens once it is written "
                    "down and read again",
                    expected=f"{len(wanted[number])} tokens",
                    got=f"{len(again[number])} tokens",
                    hint="the tokenizer does not give its own text back; use another model",
                )

    def _write(
        self, iteration: int, folder: Path, request: Mapping[str, Any], rows: list[dict[str, Any]]
    ) -> None:
        correct = [row for row in rows if row["answer_reward"] > 0]
        kept = list({(row["index"], row["response"]): row for row in reversed(correct)}.values())
        kept.reverse()
        write_generations(folder / SAMPLES, rows)
        result = summarize_samples(rows, correct, kept)
        self.console.note(
            f"verified   {result['samples']:,} responses: {result['correct']:,} correct "
            f"({result['correct_share']:.1%}), {result['duplicates']:,} of them repeated, "
            f"{result['kept']:,} kept; {result['solved_share']:.1%} of the questions have one"
        )
        if not kept:
            raise _nothing_correct(iteration, rows, folder)
        write_generations(folder / ROWS, [{name: row[name] for name in COLUMNS} for row in kept])
        digest = sha256_of(folder / ROWS)
        write_json(folder / RESULT, {**result, "rows_sha256": digest, "request": dict(request)})
        forget(folder / FOLDER)


def choose_questions(
    gradable: NDArray[np.integer[Any]], count: int | None, seed: int, iteration: int
) -> NDArray[np.int64]:
    """Draw the questions of an iteration: a pure function of seed and iteration.

    Args:
        gradable: (N,) numbers of the examples that have a ground truth.
        count: how many; None: all.
        seed: of the run.
        iteration: from 1.

    Returns:
        Their numbers, in the order of the data.
    """
    if count is None or count >= len(gradable):
        return gradable.astype(np.int64)
    generator = np.random.Generator(np.random.PCG64(mix_seed(seed, QUESTION_STREAM, iteration)))
    drawn = generator.choice(gradable, count, replace=False)
    return np.sort(drawn).astype(np.int64)


def summarize_samples(
    rows: Sequence[Mapping[str, Any]],
    correct: Sequence[Mapping[str, Any]],
    kept: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Count what was sampled.

    Args:
        rows: all responses, as `generation_row` makes them.
        correct: those of them that have a reward.
        kept: those of them that are trained on: each different response to a question once.
    """
    questions, solved = {row["index"] for row in rows}, {row["index"] for row in correct}
    return {
        "questions": len(questions),
        "samples": len(rows),
        "correct": len(correct),
        "duplicates": len(correct) - len(kept),
        "kept": len(kept),
        "solved": len(solved),
        "correct_share": len(correct) / len(rows),
        "format_share": math.fsum(row["format_reward"] for row in rows) / len(rows),
        "solved_share": len(solved) / len(questions),
        "response_entropy": math.fsum(row["token_entropy"] for row in rows) / len(rows),
        "response_length": math.fsum(row["length"] for row in rows) / len(rows),
    }


def read_sampling(folder: Path) -> dict[str, Any]:
    """Read what was counted in an iteration; {} where its sampling has not come to its end."""
    try:
        return dict(json.loads((folder / RESULT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def refuse_other_rows(iteration: int, folder: Path, request: Mapping[str, Any]) -> None:
    """Keep the rows that an iteration was trained on from being replaced by others.

    Raises:
        UserError: what decides them has changed (78).
    """
    before = read_sampling(folder).get("request", request)
    if changed := [name for name, value in request.items() if before.get(name) != value]:
        raise UserError(
            "C302",
            f"iteration {iteration} was trained on other samples than this command would draw",
            got="; ".join(f"{name}: {before.get(name)} → {request[name]}" for name in changed),
            hint="undo the change (of a reward's file, say), or start another: run_name=…",
        )


def _is_done(folder: Path, request: Mapping[str, Any]) -> bool:
    found, rows = read_sampling(folder), folder / ROWS
    return (
        found.get("request") == request
        and rows.is_file()
        and sha256_of(rows) == found.get("rows_sha256")
    )


def _nothing_correct(iteration: int, rows: Sequence[Mapping[str, Any]], folder: Path) -> UserError:
    ended = sum(row["stopped"] != "length" for row in rows)
    formed = sum(row["format_reward"] > 0 for row in rows)
    return UserError(
        "R310",
        f"iteration {iteration} has nothing to train on: none of {len(rows):,} samples is correct",
        got=f"{formed:,} in the right format, {ended:,} that ended by themselves",
        hint=f"look at {folder / SAMPLES}; begin with a model that sometimes answers (train it "
        "first), raise evaluation.max_new_tokens, expert_iteration.num_samples or num_questions, "
        "or lower expert_iteration.temperature",
    )
