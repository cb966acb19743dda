"""Evaluation of a policy on held-out examples: its loss, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.config import EvaluationConfig
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.data.encode import special_tokens
from cs336_alignment.data.prepare import Progress
from cs336_alignment.data.templates import PromptTemplate
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.evaluation.generate import LocalGenerator, decode
from cs336_alignment.evaluation.log_generations import generation_row, summarize
from cs336_alignment.evaluation.loss import evaluate_loss
from cs336_alignment.evaluation.rewards import REWARDS
from cs336_alignment.evaluation.sampling import (
    Generation,
    Generator,
    Request,
    Sampling,
    request_seed,
)
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.compile import in_eager
from cs336_alignment.model.loading import check_fits
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
        groups: the source of each example, if there are several.
        asked: gives the status of a request to stop, None while there is none.
        generator: None: the policy generates.
    """

    def __init__(
        self,
        policy: Policy | None,
        tokenizer: PreTrainedTokenizerBase,
        dataset: TokenizedDataset,
        ground_truths: Sequence[str | None],
        *,
        config: EvaluationConfig,
        processes: Processes,
        microbatch_tokens: int,
        batching: Batching,
        seed: int,
        progress: Progress,
        groups: Sequence[str] = (),
        asked: Callable[[], ExitStatus | None] = lambda: None,
        generator: Generator | None = None,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.dataset = dataset
        self.config = config
        self.processes = processes
        self.microbatch_tokens = microbatch_tokens
        self.batching = batching
        self.seed = seed
        self.progress = progress
        self.groups = groups
        self.stop_ids = special_tokens(tokenizer).stops
        self.asked = asked
        self.ground_truths = ground_truths
        self.gradable = gradable_of(ground_truths, config.num_prompts)
        if generator is None:
            assert policy is not None
            generator = LocalGenerator(
                policy.model, tokenizer, batch_size=config.batch_size,
                autocast_dtype=policy.autocast_dtype,
            )  # fmt: skip
        self.generator = generator

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
        if self.config.reward == "r1_zero" and template is not None and not template.tagged:
            return [
                f"the reward looks for </think> <answer> … </answer>, and the prompt template "
                f"{template.name} does not ask for it"
            ]
        return []

    def run(self, *, generate: bool) -> EvaluationResult:
        """Evaluate the loss, if the model is here, and, if wanted, generate; every process gets the
        same result.

        Raises:
            StopNow: some process was asked to stop; raised on all of them.
        """
        metrics = {} if self.policy is None else self._loss(self.policy)
        self._leave_if_asked()
        if not generate or not self.gradable:
            return EvaluationResult(metrics, [])
        with in_eager():
            rows = self.generate()
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

        options = self.config
        sampling = Sampling(
            options.max_new_tokens, options.min_new_tokens, options.temperature, options.top_p,
            tuple(options.stop),
        )  # fmt: skip
        generations: list[Generation] = []
        failure: UserError | None = None
        with self.progress("generation", len(wanted)) as advance, suppress(_Stopped):
            try:
                generations = self.generator.generate(requests, sampling, advance=note)
            except UserError as error:  # of one process; the others would wait for its share
                failure = error
        self._leave_if_asked()
        for told in self.processes.gather(failure):
            if told is not None:
                raise told
        reward = REWARDS[options.reward]
        rows = [
            generation_row(
                generation, decode(self.tokenizer, request.prompt_ids),
                str(self.ground_truths[i]), reward, index=i, sample=n,
            )
            for (i, n), request, generation in zip(mine, requests, generations, strict=True)
        ]  # fmt: skip
        shares = self.processes.gather(rows)
        return sorted(
            (row for share in shares for row in share),
            key=lambda row: (row["index"], row["sample"]),
        )
