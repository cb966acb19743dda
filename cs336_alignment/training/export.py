"""The way out: a plain Hugging Face folder with tokenizer, generation config and a model card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.files import flush_folder, flush_tree, system_error


def save_sidecars(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what makes weights a model folder: config, generation config, tokenizer."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    _generation_config(model, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def export_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write the trained model as a folder that plain transformers loads; replaces an older one at
    once.

    Args:
        folder: `model/` of the run.
        model: trained, not wrapped.
        tokenizer: as trained with.
        card: the text of its README.md.
        weights: name → tensor; None: those that the model holds.

    Raises:
        UserError: the disk is full or failing (74).
    """
    # Names that the next attempt uses again, so that a kill leaves nothing for ever.
    temporary = folder.with_name(f".{folder.name}.new")
    old = folder.with_name(f".{folder.name}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        model.generation_config = _generation_config(model, tokenizer)
        model.save_pretrained(temporary, state_dict=weights)
        save_sidecars(temporary, model, tokenizer)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        _make_readable(temporary)
        flush_tree(temporary)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
        flush_folder(folder.parent)  # the new one is there for good before the old one goes
        shutil.rmtree(old, ignore_errors=True)
    except Exception as failure:
        shutil.rmtree(temporary, ignore_errors=True)
        if (reason := system_error(failure)) is None:
            raise
        raise UserError(
            "R207",
            f"cannot write the model to {folder}: {reason}",
            ExitStatus.IO,
            hint="make room and run the same command again: only this last step repeats",
        ) from failure


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


def model_card(
    *,
    base_model: str,
    run_name: str,
    data: str,
    facts: Mapping[str, str],
    results: Sequence[tuple[str, float, float]],
    prompt_template: str,
) -> str:
    """Write the README.md of an exported model.

    Args:
        base_model: what was fine-tuned.
        run_name: of the run.
        data: the training source.
        facts: settings worth knowing, name → value.
        results: (metric, before, after).
        prompt_template: the text with its placeholder, since a model is only as good as its prompt.
    """
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [sft]"]
    if not base_model.startswith(("/", ".", "~", "builtin:")) and base_model.count("/") == 1:
        lines.append(f"base_model: {base_model}")
    lines += [
        "---",
        "",
        f"# {run_name}",
        "",
        f"`{base_model}`, fine-tuned on `{data}` with cs336_alignment.",
        "",
    ]
    if results:
        lines += ["| metric | before | after |", "|---|---|---|"]
        lines += [f"| {name} | {before:.4f} | {after:.4f} |" for name, before, after in results] + [
            ""
        ]
    lines += ["| setting | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += ["", "Prompt template:", "", "```", prompt_template, "```", ""]
    return "\n".join(lines)
