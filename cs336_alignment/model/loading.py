"""Models and their tokenizers, loaded with weights or built from a config; an adapter's folder is
its base model with the adapter merged.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cs336_alignment.config import ModelConfig
from cs336_alignment.errors import Place, UserError, first_line
from cs336_alignment.model.adapter_files import is_adapter, read_adapter_config
from cs336_alignment.model.adapters import is_adapted
from cs336_alignment.model.base_model import ADAPTER_CONFIG, Base, weights_sha256
from cs336_alignment.model.lora import load_adapter, merge_adapter
from cs336_alignment.model.source import ModelSource, require_weights, resolve_model

TOKENIZER = "tokenizer_config.json"


def open_model(model: ModelConfig) -> tuple[ModelSource, PreTrainedTokenizerBase]:
    """Find the model that a config names, and load its tokenizer with the new tokens.

    Raises:
        UserError: as `resolve_model` and `load_tokenizer` say.
    """
    source = resolve_model(model.name_or_path, model.revision, model.trust_remote_code)
    return source, load_tokenizer(source, model.new_tokens)


def load_tokenizer(source: ModelSource, new_tokens: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """Load the tokenizer; it need have neither pad nor EOS token.

    Padding is never recognized by its id here, so a missing pad token is filled in with EOS where
    generation wants one; a missing EOS is the data step's business.

    Args:
        source: from `resolve_model`.
        new_tokens: to add, none of which it has.

    Raises:
        UserError: it cannot be loaded (66), or has one of the new tokens (78).
    """
    if is_adapter(source.location) and not (Path(source.location) / TOKENIZER).is_file():
        source = _base_of(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except Exception as failure:
        raise _cannot_load("tokenizer", source, failure) from failure
    known = [token for token in new_tokens if token in tokenizer.get_vocab()]
    if known:
        raise UserError(
            "M130",
            f"the tokenizer of {source.location} has tokens of model.new_tokens already",
            got=", ".join(known),
            hint="leave them out",
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new_tokens])
    return tokenizer


def load_model(
    source: ModelSource, *, random_init: bool, seed: int, held: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """Load a causal language model in float32, on the CPU.

    Args:
        source: from `resolve_model`.
        random_init: take only the config and draw the weights.
        seed: of the drawn weights.
        held: how else its weights are held, from `in_four_bits`.

    Raises:
        UserError: it cannot be loaded, or has no weights and random_init is off (66); an adapter
            that is not of its base model (78).
    """
    common: dict[str, Any] = {"trust_remote_code": source.trust_remote_code, **(held or {})}
    if is_adapter(source.location):
        if random_init:
            return load_model(_base_of(source), random_init=True, seed=seed)
        model = load_adapted(source)
        merge_adapter(model)
        return model
    if source.is_local and not random_init:
        require_weights(source)
    transformers.logging.disable_progress_bar()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        if random_init:
            config = AutoConfig.from_pretrained(source.location, revision=source.revision, **common)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **common)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.location,
            revision=source.revision,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported like missing ones, and refused below
            **common,
        )
    except Exception as failure:
        raise _cannot_load("model", source, failure) from failure
    finally:
        transformers.logging.set_verbosity(level)
    model, info = loaded
    _refuse_drawn_weights(source, info)
    if is_adapted(model):
        raise UserError(
            "M109", f"{source.location} is an adapter on the hub",
            hint=f"hf download {source.location} --local-dir FOLDER, and give the folder"
        )  # fmt: skip
    return model


def in_four_bits(device: torch.device, compute: torch.dtype) -> dict[str, Any]:
    """Give what `from_pretrained` is told to hold weights as QLoRA does (Dettmers and others, arXiv
    2305.14314): NormalFloat in blocks of 64, whose scales are quantized, too.

    Args:
        device: a GPU.
        compute: the dtype that products run in.

    Raises:
        UserError: there is no GPU, or no library for it (78).
    """
    if device.type != "cuda":
        raise UserError(
            "C162", "lora.quantize=nf4 needs a CUDA GPU", got=str(device),
            hint="lora.quantize=null",
        )  # fmt: skip
    if importlib.util.find_spec("bitsandbytes") is None:
        hint = "pip install 'cs336_alignment[quantize]', or lora.quantize=null"
        raise UserError("C162", "lora.quantize=nf4 needs bitsandbytes", hint=hint)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )  # fmt: skip
    return {"quantization_config": settings, "device_map": {"": device}}


def _base_of(source: ModelSource) -> ModelSource:
    config = read_adapter_config(Path(source.location))
    name = config.base_model_name_or_path or ""
    try:
        return resolve_model(name, config.revision, source.trust_remote_code)
    except UserError as error:
        error.place = Place(f"{source.location}/{ADAPTER_CONFIG}", field="base_model_name_or_path")
        if error.code == "M101":
            error.hint = (
                "put the base model there, or in a copy of the adapter write where it is now"
            )
        raise


def load_adapted(source: ModelSource) -> PreTrainedModel:
    """Load the base model of an adapter's folder and put the adapter in.

    Raises:
        UserError: the base model cannot be loaded (66), or is another one by now (78).
    """
    of_base = _base_of(source)
    model = load_model(of_base, random_init=False, seed=0)
    load_adapter(Path(source.location), model, base_of(of_base, model))
    return model


def base_of(
    source: ModelSource, model: PreTrainedModel | None, quantize: str | None = None
) -> Base:
    """Describe a model, as it was just loaded, as the base of adapters; None: it is not yet.

    Raises:
        UserError: it is an adapter itself (78).
    """
    if is_adapter(source.location):
        raise UserError(
            "M131",
            "model.name_or_path is an adapter, and an adapter of an adapter loads nowhere",
            got=source.location,
            hint="to go on with it: lora.adapter_path=FOLDER, and its base model as "
            "model.name_or_path",
        )
    name = str(Path(source.location).resolve()) if source.is_local else source.location
    sha256 = None if model is None else weights_sha256(model.named_parameters())
    return Base(name, source.revision, sha256, quantize)


def build_model(source: ModelSource) -> PreTrainedModel:
    """Build a model of its config, for weights that come later; see `load_model`.

    Raises:
        UserError: there is no config, or no such architecture (66).
    """
    common: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source.location, revision=source.revision, **common)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **common)
    except Exception as failure:
        raise _cannot_load("model", source, failure) from failure
    with contextlib.suppress(OSError):  # not every model has one
        model.generation_config = GenerationConfig.from_pretrained(
            source.location, revision=source.revision or "main"
        )
    return model


def _refuse_drawn_weights(source: ModelSource, info: Mapping[str, Any]) -> None:
    """transformers draws at random what a file does not hold; nobody asked for that."""
    lost = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if lost:
        raise UserError(
            "M107",
            f"the weights of {source.location} lack tensors that the model has",
            got=f"{len(lost)} missing or of another shape: {', '.join(lost[:3])}",
            hint="the folder is damaged, or its config.json belongs to another model",
        )


def _cannot_load(what: str, source: ModelSource, failure: Exception) -> UserError:
    message = f"cannot load the {what} of {source.location}: {first_line(failure)}"
    hint = "check the id and the network; offline, give a local folder or fill the cache first"
    hint = "that of a run is in its folder model/" if source.is_local else hint
    return UserError("M103", message, hint=hint)


def eos_ids(settings: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Give the tokens that end a response: the tokenizer's and those the model's folder names.

    Args:
        settings: of the model's generation, None if it has none.
        tokenizer: of the model.
    """
    configured = None if settings is None else settings.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}
