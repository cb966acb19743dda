"""Evaluation of a policy on held-out examples: its loss, and what it says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import KW_ONLY, dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.config import EvaluationConfig
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.data.encode import special_tokens
from cs336_alignment.data.prepare import Progress
from cs336_alignment.data.templates import PromptTemplate
from cs336_alignment.data.tokenize import decode
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.evaluation.final_answer import OPENING
from cs336_alignment.evaluation.generate import LocalGenerator
from cs336_alignment.evaluation.grading import close_reward, failures_of
from cs336_alignment.evaluation.log_generations import generation_row, summarize
from cs336_alignment.evaluation.loss import evaluate_loss
from cs336_alignment.evaluation.rewards import RewardFunction, with_choices
from cs336_alignment.evaluation.sampling import (
    Generation,
    Generator,
    Request,
    request_seed,
    sampling_of,
)
from cs336_alignment.evaluation.truths import doubtful_truths
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.compile import in_eager
from cs336_alignment.model.fits import check_fits
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.stop import StopNow


class _Stopped(Exception):
    """Ends this process's generation between two batches."""


def gradable_of(ground_truths: Sequence[str | None], most: int | None) -> list[int]:
    """Give the numbers of the examples that are generated for: the first with a ground truth."""
    return [i for i, truth in enumerate(ground_truths) if truth is not None][:most]


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        metrics: `eval/…` → number.
        rows: the generations, as `log_generations` makes them; empty if none were asked for.
    """

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


@dataclass
class Evaluator:
    """Evaluates one policy on one set of examples, shared among processes.

    Args:
        policy: not wrapped; None: the model is not here, so there is no loss.
        tokenizer: of the model.
        dataset: the evaluation examples.
        ground_truths: of each, or None; those with one are generated for.
        config: the evaluation section.
        processes: who shares the work.
        microbatch_tokens: token budget of a forward pass.
        batching: flat rows, or padded ones.
        seed: of sampling.
        progress: shows a bar.
        reward: grades what is generated; see `make_reward`. It is closed whenever that is done.
        choices: that the question of each example gives, if any does.
        groups: the source of each example, if there are several.
        asked: gives the status of a request to stop, None while there is none.
        generator: None: the policy generates.
        warn: prints a warning.
    """

    policy: Policy | None
    tokenizer: PreTrainedTokenizerBase
    dataset: TokenizedDataset
    ground_truths: Sequence[str | None]
    _: KW_ONLY
    config: EvaluationConfig
    processes: Processes
    microbatch_tokens: int
    batching: Batching
    seed: int
    progress: Progress
    reward: RewardFunction
    choices: Sequence[Sequence[str]] = ()
    groups: Sequence[str] = ()
    asked: Callable[[], ExitStatus | None] = lambda: None
    generator: Generator | None = None
    warn: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        self.stop_ids = special_tokens(self.tokenizer).stops
        self.gradable = gradable_of(self.ground_truths, self.config.num_prompts)
        if self.generator is None:
            assert self.policy is not None
            self.generator = LocalGenerator(
                self.policy.model, self.tokenizer, batch_size=self.config.batch_size,
                autocast_dtype=self.policy.autocast_dtype,
            )  # fmt: skip

    def check(self, model: PreTrainedModel | None, template: PromptTemplate | None) -> list[str]:
        """Look before the first generation at what would make it useless.

        Args:
            model: that generates; None: it is not here.
            template: of the prompts.

        Returns:
            A line for each warning.

        Raises:
            UserError: prompt and response do not fit into the model's positions (78).
        """
        if not self.gradable:
            return ["no evaluation row has a ground truth, so nothing is generated"]
        longest = max(len(self.dataset.prompt_ids(i)) for i in self.gradable)
        if model is not None:
            check_fits(model, 0, 0, longest + self.config.max_new_tokens)
        choices = {i: self.choices[i] for i in self.gradable if self.choices and self.choices[i]}
        truths = {i: str(self.ground_truths[i]) for i in self.gradable}
        with self.progress("looking at ground truths", len(truths)) as advance:
            lines = doubtful_truths(truths, choices, self.config.reward, advance)
        if self.config.reward == "r1_zero" and not self._has_tags():
            name = "the prompts do"
            if template is not None and not template.tagged:
                name = f"the prompt template {template.name} does"
            lines.append(
                "the reward r1_zero looks for </think> <answer> … </answer>, and "
                f"{name} not ask for it"
            )
        if choices and self.config.reward in ("r1_zero", "gsm8k"):
            lines.append(
                f"the questions are multiple choice, and the reward {self.config.reward} knows no "
                "letters but bare ones: evaluation.reward=multiple_choice does"
            )
        return lines

    def _has_tags(self) -> bool:
        """Whether the first prompt asks for answer tags, or the response that it has gives some."""
        first = self.dataset[self.gradable[0]].input_ids.tolist()
        return OPENING in decode(self.tokenizer, first)

    def run(self, *, generate: bool) -> EvaluationResult:
        """Evaluate the loss, if the model is here, and, if wanted, generate; every process gets the
        same result.

        Raises:
            StopNow: some process was asked to stop; raised on all of them.
            UserError: the reward failed on every response (70).
        """
        metrics = {} if self.policy is None else self._loss(self.policy)
        self._leave_if_asked()
        if not generate or not self.gradable:
            return EvaluationResult(metrics, [])
        with in_eager():
            rows = self.generate()
        if (failures := failures_of(rows)) is not None:
            self.warn(failures)
        summary = summarize(rows)
        names = {
            "token_entropy": "response_entropy",
            "length": "response_length",
            "length_correct": "response_length_correct",
            "length_incorrect": "response_length_incorrect",
        }
        for name, value in summary.items():
            if value is not None:
                metrics[f"eval/{names.get(name, name)}"] = value
        return EvaluationResult(metrics, rows)

    def _loss(self, policy: Policy) -> dict[str, float]:
        with in_eager(), self.progress("evaluation loss", len(self.dataset)) as advance:
            return evaluate_loss(
                policy,
                self.dataset,
                self.processes,
                microbatch_tokens=self.microbatch_tokens,
                batching=self.batching,
                stop_ids=self.stop_ids,
                groups=self.groups,
                advance=advance,
                stopped=lambda: self.asked() is not None,
            )

    def _leave_if_asked(self) -> None:
        """Leave together: a process that left alone would keep the others waiting for its share."""
        requests = [status for status in self.processes.gather(self.asked()) if status is not None]
        if requests:
            raise StopNow(max(requests))  # INTERRUPTED is the larger number

    def generate(self) -> list[dict[str, Any]]:
        """Generate for the prompts, each process for its share; returns all rows in order,
        everywhere.
        """
        count, index = self.processes.count, self.processes.index
        wanted = [(i, n) for i in self.gradable for n in range(self.config.num_samples)]
        mine = sorted(wanted, key=lambda one: -len(self.dataset.prompt_ids(one[0])))[index::count]
        requests = [
            Request(self.dataset.prompt_ids(i), request_seed(self.seed, i, n)) for i, n in mine
        ]

        def note(n: int) -> None:
            if self.asked() is not None:
                raise _Stopped
            advance(n * count)

        generations: list[Generation] = []
        failure: UserError | None = None
        here = nullcontext() if self.policy is None else self.processes.held_whole(self.policy)
        with here, self.progress("generation", len(wanted)) as advance, suppress(_Stopped):
            assert self.generator is not None  # made with the evaluator
            try:
                generations = self.generator.generate(
                    requests, sampling_of(self.config), advance=note
                )
            except UserError as error:  # of one process; the others would wait for its share
                failure = error
        self._leave_if_asked()
        for told in self.processes.gather(failure):
            if told is not None:
                raise told
        rows: list[dict[str, Any]] = []
        try:
            with self.progress("rewards", len(wanted)) as advance, suppress(_Stopped):
                for (i, n), request, generation in zip(mine, requests, generations, strict=True):
                    prompt = decode(self.tokenizer, request.prompt_ids)
                    rows.append(self._grade(generation, prompt, i, n))
                    note(1)
        finally:
            close_reward(self.reward)
        self._leave_if_asked()
        shares = self.processes.gather(rows)
        return sorted(
            (row for share in shares for row in share),
            key=lambda row: (row["index"], row["sample"]),
        )

    def _grade(
        self, generation: Generation, prompt: str, index: int, sample: int
    ) -> dict[str, Any]:
        # Only there can the built-in grader be stopped (`answers_equal`).
        assert threading.current_thread() is threading.main_thread()
        reward = with_choices(self.reward, self.choices[index] if self.choices else ())
        truth = str(self.ground_truths[index])
        return generation_row(generation, prompt, truth, reward, index=index, sample=sample)
