"""The way out: a plain Hugging Face folder with tokenizer, generation config and a model card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.files import replacing_folder, telling
from cs336_alignment.model.adapter_files import ADAPTER_WEIGHTS, save_adapter_config
from cs336_alignment.model.adapters import adapter_tensors, is_adapted
from cs336_alignment.training.safetensors_file import write_safetensors

MAX_SHARD_SIZE = "50GB"


def save_sidecars(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what makes weights a model folder: config, generation config, tokenizer; or what makes
    those of adapters a folder for peft.
    """
    tokenizer.save_pretrained(folder)
    if is_adapted(model):  # with a config.json transformers would look for a whole model
        save_adapter_config(folder, model)
        return
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    _generation_config(model, tokenizer).save_pretrained(folder)


def export_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    pictures: Sequence[Path] = (),
    *,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write the trained model as a folder that plain transformers loads; replaces an older one at
    once.

    Args:
        folder: `model/` of the run.
        model: trained, not wrapped; if it has adapters, they alone are written.
        tokenizer: as trained with.
        card: the text of its README.md.
        pictures: of the card.
        weights: name → tensor; None: those that the model holds.

    Raises:
        UserError: the disk is full or failing (74).
    """
    with telling_full_disk(folder), replacing_folder(folder) as temporary:
        write_model(temporary, model, tokenizer, card, pictures, weights=weights)


def telling_full_disk(folder: Path) -> AbstractContextManager[None]:
    """Make a UserError (74) of a disk that refuses an export."""
    hint = "make room and run the same command again: only this last step repeats"
    return telling("R207", f"cannot write the model to {folder}", hint)


def write_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    pictures: Sequence[Path] = (),
    max_shard_size: str = MAX_SHARD_SIZE,
    *,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write all files of an exported model into a folder that is there; see `export_model`."""
    if is_adapted(model):
        write_safetensors(folder / ADAPTER_WEIGHTS, weights or adapter_tensors(model))
    else:
        model.generation_config = _generation_config(model, tokenizer)
        model.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)
    save_sidecars(folder, model, tokenizer)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for picture in pictures:
        if picture.is_file():
            shutil.copyfile(picture, folder / picture.name)
    _make_readable(folder)


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """Keep the model's own settings and make sure that the token trained as the end stops
    generation.
    """
    config = GenerationConfig.from_dict((model.generation_config or GenerationConfig()).to_dict())
    configured = config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    ids = list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *ids) if i is not None))
    config.eos_token_id = ids[0] if len(ids) == 1 else ids or None
    if config.pad_token_id is None:
        pad = tokenizer.pad_token_id
        config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True  # Llama 2's has a temperature without it, which cannot be saved
    return config


def _make_readable(folder: Path) -> None:
    """Give files the modes of the umask: safetensors writes 0600, which no other user could
    load.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
