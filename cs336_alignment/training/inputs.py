"""What a run is made of before there is a model: tokenizer, data and their order, reward."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cs336_alignment.config import Config, EvaluationConfig
from cs336_alignment.config_clashes import clash
from cs336_alignment.data.batching import StepPlan
from cs336_alignment.data.splits import RunData, prepare_run
from cs336_alignment.evaluation.rewards import REWARDS, RewardFunction, describe_reward, make_reward
from cs336_alignment.evaluation.verify import verifying
from cs336_alignment.model.loading import open_model
from cs336_alignment.model.source import ModelSource
from cs336_alignment.tracking.console import Console


@dataclass(frozen=True)
class Inputs:
    """The parts.

    Attributes:
        source: of the model.
        tokenizer: of the model.
        data: to train and evaluate on.
        reward: of what is generated; where nothing is, one that is never asked.
    """

    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    data: RunData
    reward: RewardFunction


def load_inputs(config: Config, console: Console) -> Inputs:
    """Load them, and say what became of the rows.

    Raises:
        UserError: the model or data cannot be found or are bad, or a reward cannot be imported.
    """
    evaluation = config.evaluation
    reward = REWARDS["r1_zero"]
    if evaluation.generation_steps is not None:  # else nothing is graded, no code of users' runs
        reward = make_reward(evaluation)
        console.note(describe_reward(evaluation, reward))
    source, tokenizer = open_model(config.model)
    return Inputs(source, tokenizer, load_data(config, tokenizer, console), reward)


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase, console: Console) -> RunData:
    """Prepare the data, or find them in the cache, and say what became of the rows.

    Raises:
        UserError: they cannot be found or are bad.
    """
    with verifying(config.evaluation) as verify:
        data = prepare_run(
            config.data, tokenizer, seed=config.seed, progress=console.progress, note=console.note,
            verify=verify,
        )  # fmt: skip
    for line in data.warnings:
        console.warn(line)
    return data


def refuse_other_backends(options: EvaluationConfig) -> None:
    """Refuse to generate with other weights than those in training.

    Raises:
        UserError: it was asked for (78).
    """
    if options.backend != "transformers" and options.generation_steps is not None:
        raise clash(
            "evaluation.backend",
            "evaluation.generation_steps",
            f"what evaluation.backend={options.backend} generates with are not the weights in "
            "training; set one to transformers or the other to null",
        )


def plan_of(config: Config, data: RunData) -> tuple[StepPlan, range]:
    """Give the order of training, and the steps of a whole run."""
    trainer = config.trainer
    plan = StepPlan(
        len(data.train.dataset), trainer.global_batch_size, config.seed, config.data.shuffle,
        data.train.mixture,
    )  # fmt: skip
    return plan, range(plan.total_steps(trainer.num_train_epochs, trainer.max_steps))
