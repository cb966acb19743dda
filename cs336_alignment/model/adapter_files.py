"""The files of an adapter, as peft has them: found, read and refused, written."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cs336_alignment.errors import UserError, first_few, first_line
from cs336_alignment.model.adapters import adapter_config, adapter_tensors
from cs336_alignment.model.base_model import ADAPTER_CONFIG, unfit

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What an adapter's file may say; another thing that is not at peft's default is refused.
KNOWN = frozenset({
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save",
    "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform",
    "layers_pattern", "fan_in_fan_out", "lora_bias", "base_model_name_or_path", "revision",
    "task_type", "inference_mode", "auto_mapping", "peft_version",
})  # fmt: skip


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    path = Path(folder)
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()


def read_adapter_config(folder: Path) -> Any:
    """Read what peft says of an adapter.

    Raises:
        UserError: there is none (66), or it is of a kind that cannot be trained here (78).
    """
    from peft import LoraConfig as PeftLora
    from peft import PeftConfig

    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            "M122",
            f"{folder} holds no adapter" if folder.exists() else f"there is no folder {folder}",
            expected=f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}",
            hint=_where_adapters_are(folder),
        )
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except Exception as failure:
        raise unfit(folder, f"{ADAPTER_CONFIG} cannot be read: {first_line(failure)}") from failure
    if not isinstance(config, PeftLora):
        raise unfit(folder, f"it is no LoRA: {config.peft_type}")
    default: Any = PeftLora()
    odd = [
        f.name for f in dataclasses.fields(config)
        if f.name not in KNOWN
        and (getattr(config, f.name) or None) != (getattr(default, f.name) or None)
        and (f.name, getattr(config, f.name)) != ("init_lora_weights", "gaussian")
    ]  # fmt: skip
    if odd:
        raise unfit(folder, f"{ADAPTER_CONFIG} has {', '.join(odd)}, which is not supported here")
    return config


def _where_adapters_are(folder: Path) -> str:
    if (folder / "sharded").is_dir():
        what = f"{folder.resolve()} export.format=adapter"
        return f"it is a checkpoint in parts: `cs336-sft export {what}` makes it whole"
    if folder.is_file():
        return f"give the folder it is in: {folder.parent}"
    run = folder if (folder / "adapter").is_dir() else folder.parent
    if (run / "adapter" / ADAPTER_CONFIG).is_file():
        return f"that of the run is in {run / 'adapter'}"
    return "of the hub: hf download NAME --local-dir FOLDER"


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter's folder.

    Raises:
        UserError: the file is damaged (78).
    """
    try:
        return load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as failure:
        raise unfit(folder, f"{ADAPTER_WEIGHTS} cannot be read: {first_line(failure)}") from failure


def read_adapter_weights(folder: str | Path, model: nn.Module) -> dict[str, Tensor]:
    """Read the tensors of an adapter's folder, by the names of `adapter_tensors`.

    Raises:
        UserError: they are not those that the model, with its adapters, has (78).
    """
    weights = load_weights(Path(folder).expanduser())
    refuse_unfit(Path(folder), model, weights)
    return weights


def refuse_unfit(folder: Path, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse the tensors of an adapter's folder if they are not those of the model's adapters.

    Raises:
        UserError: they are others (78).
    """
    own = adapter_tensors(model)
    lacking, other = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = sorted(n for n in own if n in weights and own[n].shape != weights[n].shape)
    for what, names in (("lacks", lacking), ("has besides", other), ("has other shapes:", shapes)):
        if names:
            raise unfit(folder, f"it {what} {first_few(names)}")


def refuse_another_base(folder: Path, model: nn.Module) -> None:
    """Refuse a folder whose adapter was trained on other weights than this model's.

    Raises:
        UserError: they are others (78).
    """
    vars(model)["adapter_base"].refuse_another(folder, None)


def save_adapter_config(folder: Path, model: nn.Module) -> None:
    """Write what peft wants to know of an adapter, and which model it belongs to."""
    config: Any = copy.deepcopy(adapter_config(model))
    config.inference_mode = True
    if isinstance(config.target_modules, set):  # in one order
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    vars(model)["adapter_base"].save(folder)
