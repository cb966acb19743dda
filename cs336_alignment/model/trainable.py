"""What of a loaded model is trained: all of it, all but what is frozen, or adapters; new tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.config import Config, LoraConfig, ModelConfig
from cs336_alignment.errors import UserError
from cs336_alignment.model.base_model import Base
from cs336_alignment.model.fits import embedding_rows
from cs336_alignment.model.loading import base_of, in_four_bits, load_model
from cs336_alignment.model.lora import add_adapter
from cs336_alignment.model.narrow import narrow_frozen
from cs336_alignment.model.source import ModelSource


def load_to_train(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    device: torch.device,
    dtype: torch.dtype | None,
    loaded: Callable[[PreTrainedModel], object],
) -> PreTrainedModel:
    """Load a model as it is trained when it is held whole, and choose what of it is trained.

    Args:
        source: from `resolve_model`.
        tokenizer: with the new tokens, see `load_tokenizer`.
        config: of the run.
        device: where it will compute; only 4-bit weights are there already.
        dtype: that autocast computes in; None: there is none.
        loaded: is called with the model as it was loaded.

    Raises:
        UserError: as `load_model` and `choose_trained`.
    """
    options, lora = config.model, config.lora
    held = None if lora.quantize is None else in_four_bits(device, dtype or torch.float32)
    model = load_model(source, random_init=options.random_init, seed=config.seed, held=held)
    loaded(model)
    base = base_of(source, model, lora.quantize) if lora.active else None
    choose_trained(model, tokenizer, options, lora, base, seed=config.seed)
    if lora.active and dtype is not None:
        narrow_frozen(model, dtype)
    return model


def choose_trained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: ModelConfig,
    lora: LoraConfig,
    base: Base | None,
    *,
    seed: int,
) -> None:
    """Give new tokens their rows, then freeze what is not trained or put adapters in.

    Args:
        model: as loaded.
        tokenizer: with the new tokens, see `load_tokenizer`.
        options: `freeze` and `new_tokens` are read.
        lora: adapters, if there are any.
        base: what the model is; needed for adapters.
        seed: of the adapters' weights.

    Raises:
        UserError: a pattern or name finds nothing, nothing is left to train, new tokens have
            frozen rows, or an adapter would not load on its base model (78).
    """
    grown = add_rows(model, tokenizer, options.new_tokens)
    if lora.active:
        assert base is not None
        if grown and lora.export != "merged":
            raise UserError(
                "M128",
                f"lora.export={lora.export} and model.new_tokens do not combine on this model: the "
                "adapter would have more rows than the base model's embedding and not load on it",
                hint="lora.export=merged",
            )
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        names = [name for name, module in model.named_modules() if module in ends]
        add_adapter(model, lora, base, seed=seed, trained_whole=names if options.new_tokens else ())
        return
    freeze(model, options.freeze)
    rows = model.get_input_embeddings().weight
    if options.new_tokens and not rows.requires_grad:
        raise UserError(
            "M129",
            "model.new_tokens and model.freeze do not combine: the new tokens would stay untrained",
            hint="leave the embedding out of model.freeze",
        )


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Leave parameters out of training.

    Args:
        model: all of it is trained so far.
        patterns: regular expressions; a parameter whose name one of them finds is frozen, a tied
            one by any of its names.

    Raises:
        UserError: one finds no parameter, or all together find every one (78).
    """
    parameters = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        found = [parameter for name, parameter in parameters if re.search(pattern, name)]
        if not found:
            raise UserError(
                "M120",
                f"model.freeze finds no parameter with {pattern!r}",
                expected=f"a regular expression for names such as {parameters[0][0]} and "
                f"{parameters[-1][0]}",
            )
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for _, parameter in parameters):
        raise UserError(
            "M120", "model.freeze leaves nothing to train",
            got=", ".join(patterns)
        )  # fmt: skip


def add_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]
) -> bool:
    """Give new tokens rows in embedding and head, each the mean of the rows before.

    Args:
        model: its embedding grows if it has no rows to spare.
        tokenizer: that has the tokens already, as its last ones.
        tokens: the new ones.

    Returns:
        Whether the embedding has grown.
    """
    if not tokens:
        return False
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in tokens]
    first, size = min(ids), max(ids) + 1
    before = embedding_rows(model)
    if size > before:
        model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for rows in () if module is None else module.parameters():  # a weight, perhaps a bias
                rows[ids] = rows[: min(first, before)].mean(0)
    return size > before
