"""The models of an evaluation, each with the same examples as its own tokenizer makes them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.config import Config, DataConfig, ModelConfig
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.data.splits import PreparedData, prepare_evaluation
from cs336_alignment.data.tokenize import special_prefix, tokenizer_fingerprint
from cs336_alignment.errors import UserError
from cs336_alignment.evaluation.categories import find_categories
from cs336_alignment.evaluation.sampling import doubtful_sampling
from cs336_alignment.files import sha256_of
from cs336_alignment.model.loading import load_tokenizer
from cs336_alignment.model.source import WEIGHT_FILES, ModelSource, resolve_model
from cs336_alignment.tracking.console import Console


@dataclass(frozen=True)
class Arm:
    """A model that is evaluated, and its data.

    Attributes:
        options: which model.
        source: where it is.
        tokenizer: its own.
        data: as the tokenizer makes them.
        chosen: (N,) numbers of the examples that every arm has, in the same order in all of them.
    """

    options: ModelConfig
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    chosen: NDArray[np.int64]

    @property
    def dataset(self) -> TokenizedDataset:
        """The chosen examples."""
        return self.data.dataset.select(self.chosen)

    @property
    def ground_truths(self) -> list[str | None]:
        """Of the chosen examples."""
        truths = self.data.ground_truths
        return [truths[i] for i in self.chosen.tolist()]

    @property
    def choices(self) -> list[list[str]]:
        """That the questions of the chosen examples give."""
        choices = self.data.choices
        return [choices[i] for i in self.chosen.tolist()]

    def categories(self, seed: int) -> dict[str, dict[int, str]]:
        """Give the columns that sort the rows, by the numbers of the chosen examples."""
        places = {int(old): new for new, old in enumerate(self.chosen)}
        return {
            column: {places[i]: value for i, value in values.items() if i in places}
            for column, values in find_categories(self.data, seed=seed).items()
        }


def prepare_arms(config: Config, console: Console) -> list[Arm]:
    """Prepare the data for each model's tokenizer, before any model is loaded.

    Args:
        config: of the command.
        console: shows what happens.

    Returns:
        The model, and the baseline if there is one.

    Raises:
        UserError: an empty prompt, nothing that a baseline could be compared on, or no example that
            both tokenizers leave in (65); and as the data step does.
    """
    options = config.evaluation
    arms = [_prepare_arm(config, config.model, None, console)]
    if options.baseline is not None:
        baseline = ModelConfig(name_or_path=options.baseline)
        arms.append(_prepare_arm(config, baseline, arms[0].tokenizer, console))
        arms = _same_examples(arms, console)
        if arms[0].tokenizer.get_vocab() != arms[1].tokenizer.get_vocab():
            console.warn("the tokenizers differ: losses, entropies and lengths count other tokens")
    truths = arms[0].ground_truths
    gradable = [i for i, truth in enumerate(truths) if truth is not None]
    if 0 < len(gradable) < len(truths):
        lacking = len(truths) - len(gradable)
        console.note(f"{lacking:,} of {len(truths):,} rows have no ground truth: only their loss")
    if options.baseline is not None and not gradable:
        raise UserError(
            "D330",
            f"no row of {config.data.eval_path} has a ground truth, so nothing can be compared",
            hint="name their column: data.columns.ground_truth=…",
        )
    for arm in arms:
        _refuse_empty_prompts(arm, gradable[: options.num_prompts], config.data)
    for line in doubtful_sampling(options):
        console.warn(line)
    return arms


def _prepare_arm(
    config: Config,
    options: ModelConfig,
    model_tokenizer: PreTrainedTokenizerBase | None,
    console: Console,
) -> Arm:
    source = resolve_model(options.name_or_path, options.revision, options.trust_remote_code)
    tokenizer = load_tokenizer(source)
    if model_tokenizer is not None and model_tokenizer.chat_template:
        tokenizer.chat_template = model_tokenizer.chat_template  # both are asked the same text
    data, warnings = prepare_evaluation(
        config.data, tokenizer, seed=config.seed, progress=console.progress, note=console.note
    )
    for line in warnings:
        console.warn(line)
    return Arm(options, source, tokenizer, data, np.arange(len(data.dataset)))


def _same_examples(arms: Sequence[Arm], console: Console) -> list[Arm]:
    """Choose the examples that all arms have: a tokenizer may make one too long."""
    keys = []
    for arm in arms:
        seen: Counter[str] = Counter()
        numbers = {}
        for number, place in enumerate(arm.data.places):
            numbers[place, seen[place]] = number  # a row that was split is several examples
            seen[place] += 1
        keys.append(numbers)
    common = [key for key in keys[0] if all(key in other for other in keys[1:])]
    left_out = max(map(len, keys)) - len(common)
    if not common:
        raise UserError(
            "D331",
            "model and baseline have no example in common: their tokenizers drop different ones",
            hint="raise data.max_length",
        )
    if left_out:
        console.warn(f"{left_out:,} examples are left out: too long in one of the tokenizers")
    return [
        replace(arm, chosen=np.array([numbers[key] for key in common]))
        for arm, numbers in zip(arms, keys, strict=True)
    ]


def _refuse_empty_prompts(arm: Arm, gradable: Sequence[int], config: DataConfig) -> None:
    prefix = special_prefix(arm.tokenizer) if config.add_special_tokens else []
    for number in gradable:
        example = int(arm.chosen[number])
        length = len(arm.data.dataset.prompt_ids(example))
        # Where all is trained, the first token stands before it: nothing could predict that one.
        if length <= len(prefix) or (length == 1 and config.train_on == "all"):
            raise UserError(
                "D332",
                f"the prompt of example {number + 1} is empty, so there is nothing to answer",
                got=arm.data.places[example],
                expected="a row with a prompt or question, and data.train_on=response",
            )


def identity_of(arm: Arm, model: PreTrainedModel | None, config: Config) -> str:
    """Name all that decides what a model answers to a request.

    The reward is not among it: it is computed anew from the text.

    Args:
        arm: the model.
        model: loaded; None: another process has it, or another library.
        config: of the command.
    """
    # Of the hub.
    weights: object = None if model is None else getattr(model.config, "_commit_hash", None)
    if arm.options.random_init:
        weights = config.seed
    elif arm.source.is_local:
        patterns = (*WEIGHT_FILES, "*config.json")
        files = [f for p in patterns for f in Path(arm.source.location).glob(p)]
        # Weights that are not read here may be too many to read for their hash alone.
        stamps = [
            sha256_of(f) if model else [f.stat().st_size, f.stat().st_mtime_ns] for f in files
        ]
        weights = sorted(zip((f.name for f in files), stamps, strict=True))
    options = asdict(config.evaluation)
    sampling = ("max_new_tokens", "min_new_tokens", "temperature", "top_p", "stop")
    return json.dumps([
        arm.source.location, arm.source.revision, weights, tokenizer_fingerprint(arm.tokenizer),
        {name: options[name] for name in sampling},
        {name: metadata.version(name) for name in ("cs336-alignment", "transformers", "torch")},
    ])  # fmt: skip
