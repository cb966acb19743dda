"""Evaluation of a policy on held-out examples: its loss, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from cs336_alignment.config import EvaluationConfig
from cs336_alignment.data.formats import Example
from cs336_alignment.data.prepare import Progress, TokenizedDataset
from cs336_alignment.evaluation.log_generations import log_generations, summarize
from cs336_alignment.evaluation.loss import evaluate_loss
from cs336_alignment.evaluation.rewards import REWARDS
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.parallel import Processes


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
        policy: not wrapped.
        tokenizer: of the model.
        dataset: the evaluation examples as tokens.
        examples: the same as texts; those with a ground truth are generated for.
        config: the evaluation section.
        processes: who shares the work.
        microbatch_tokens: token budget of a forward pass.
        flat: flat rows, or padded ones.
        seed: of sampling.
        add_special_tokens: as in training.
        progress: shows a bar.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        dataset: TokenizedDataset,
        examples: Sequence[Example],
        *,
        config: EvaluationConfig,
        processes: Processes,
        microbatch_tokens: int,
        flat: bool,
        seed: int,
        add_special_tokens: bool,
        progress: Progress,
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.dataset = dataset
        self.config = config
        self.processes = processes
        self.microbatch_tokens = microbatch_tokens
        self.flat = flat
        self.seed = seed
        self.add_special_tokens = add_special_tokens
        self.progress = progress
        gradable = [example for example in examples if example.ground_truth is not None]
        self.prompts = gradable[: config.num_prompts]

    def run(self, *, generate: bool) -> EvaluationResult:
        """Evaluate the loss and, if asked, generate; every process gets the same result."""
        with self.progress("evaluation loss", len(self.dataset)) as advance:
            metrics = evaluate_loss(
                self.policy,
                self.dataset,
                self.processes,
                microbatch_tokens=self.microbatch_tokens,
                flat=self.flat,
                advance=advance,
            )
        if not generate or not self.prompts:
            return EvaluationResult(metrics, [])
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

    def generate(self) -> list[dict[str, Any]]:
        """Generate for the prompts, each process for its share; returns all rows in order,
        everywhere.
        """
        count, index = self.processes.count, self.processes.index
        mine = self.prompts[index::count]
        with self.progress("generation", len(self.prompts)) as advance:
            result = log_generations(
                self.policy.model,
                self.tokenizer,
                [example.prompt for example in mine],
                [example.ground_truth or "" for example in mine],
                REWARDS[self.config.reward],
                max_new_tokens=self.config.max_new_tokens,
                temperature=self.config.temperature,
                batch_size=self.config.batch_size,
                stop=self.config.stop,
                seed=self.seed + index,
                advance=lambda n: advance(n * count),
                add_special_tokens=self.add_special_tokens,
            )
        shares = self.processes.gather(result["rows"])
        rows: list[dict[str, Any]] = [{} for _ in self.prompts]
        for process, share in enumerate(shares):
            rows[process::count] = share
        return rows
