"""What a model with adapters holds: which layers have one, and what of it all is trained.

In the files modules that are trained whole besides have the names that peft gives them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

PREFIX = "base_model.model."  # of every name in peft's files


def is_adapted(model: nn.Module) -> bool:
    """Whether adapters are in a model."""
    return "peft_config" in vars(model)


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what is trained and no adapter's, a tied parameter by each of its names."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and ".lora_" not in name:
            yield name, parameter


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Give the layers that have an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Give all that is trained, where it is, by the names that peft's files have."""
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    found = {**found, **dict(whole_parameters(model))}
    return {f"{PREFIX}{name}": tensor for name, tensor in found.items()}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Give the parameters (a tied one once) and persistent buffers that are no adapter's, by the
    names that they have without adapters.
    """
    persistent = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **buffers}
    if not is_adapted(model):
        return tensors
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in tensors.items()
        if ".lora_" not in name
    }


def adapter_config(model: nn.Module) -> Any:
    """Give peft's own record of a model's adapters."""
    return vars(model)["peft_config"]["default"]


def base_sha256(model: nn.Module) -> str | None:
    """Give the hash of the base model's weights; None without adapters."""
    return vars(model)["adapter_base"].sha256 if is_adapted(model) else None


def adapter_dropout(model: nn.Module) -> float:
    """Give the dropout before the adapters; 0 without any."""
    return float(adapter_config(model).lora_dropout) if is_adapted(model) else 0.0


def changed_by_training(model: nn.Module) -> set[str]:
    """Name the parameters of the merged model that training changes."""
    return {*(f"{name}.weight" for name in adapter_layers(model)), *dict(whole_parameters(model))}


def describe_adapter(model: nn.Module) -> str:
    """Say in a few words what adapters a model has and where."""
    config: Any = adapter_config(model)
    names = adapter_layers(model)
    kind = "DoRA" if config.use_dora else "LoRA"
    divisor = f"sqrt({config.r})" if config.use_rslora else config.r
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
    text = f"{kind} of rank {config.r}, scaled by {config.lora_alpha:g} / {divisor}, on "
    whole = ", ".join(config.modules_to_save or ())
    text += f"{len(names)} layers ({leaves})" + (f"; trained whole: {whole}" if whole else "")
    experts = (p for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3)
    fused = any(not parameter.requires_grad for parameter in experts)
    return f"{text}; fused experts stay as they are" if fused else text
