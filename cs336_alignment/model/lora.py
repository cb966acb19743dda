"""Adapters by peft (LoRA, DoRA, rsLoRA), made inside the model that is trained, and merged into it.

The layers are exchanged in place, so that all else goes on seeing a plain Hugging Face model.
Modules that are trained whole besides are trained where they are, not in a copy as peft does it.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cs336_alignment.config import LoraConfig
from cs336_alignment.errors import Place, UserError, first_few, first_line
from cs336_alignment.model.adapter_files import (
    load_weights,
    read_adapter_config,
    read_adapter_weights,
    refuse_unfit,
)
from cs336_alignment.model.adapters import (
    PREFIX,
    adapter_config,
    adapter_layers,
    adapter_tensors,
    whole_parameters,
)
from cs336_alignment.model.base_model import Base, unfit, weights_sha256


def add_adapter(
    model: PreTrainedModel,
    options: LoraConfig,
    base: Base,
    *,
    seed: int,
    trained_whole: Collection[str] = (),
    fill: bool = True,
) -> None:
    """Put adapters into a model, new ones or those of a folder, and freeze the rest.

    Args:
        model: plain; its layers are exchanged in place.
        options: what adapters, and where.
        base: what the model is.
        seed: of what is drawn.
        trained_whole: names of modules that are trained besides those of the options.
        fill: read the weights of an adapter that is continued; False: they come later, and of the
            model's own weights only shapes and dtypes are looked at, unless the adapter is a DoRA.

    Raises:
        UserError: nothing has a name that was given, or an embedding has it (78); an adapter that
            is not there (66), or does not fit the model or the options (78).
    """
    folder = None if options.adapter_path is None else Path(options.adapter_path).expanduser()
    if folder is None:
        config = _new_config(model, options)
    else:
        config = read_adapter_config(folder)
        _refuse_other_options(folder, config, options)
        base.refuse_another(folder, config.base_model_name_or_path)
    config.lora_dropout = options.dropout
    whole = {*(config.modules_to_save or options.modules_to_save), *trained_whole}
    _inject(model, config, base, whole, seed, folder)
    if folder is not None and fill:
        _fill(model, read_adapter_weights(folder, model))


def load_adapter(folder: Path, model: PreTrainedModel, base: Base) -> None:
    """Put the adapter of a folder into its base model.

    Raises:
        UserError: it does not fit (78).
    """
    config, weights = read_adapter_config(folder), load_weights(folder)
    base.refuse_another(folder, None)  # it named the model itself
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    if (rows := weights.get(f"{PREFIX}{name}.weight")) is not None:
        _resize(model, len(rows))  # it was trained on new tokens
    _inject(model, config, base, set(config.modules_to_save or ()), 0, folder)
    refuse_unfit(folder, model, weights)
    _fill(model, weights)


def _new_config(model: PreTrainedModel, options: LoraConfig) -> Any:
    from peft import LoraConfig as PeftLora
    from peft import inject_adapter_in_model

    assert options.r is not None
    targets, hollow = _targets(model, options.target_modules), nn.Module()
    _refuse_unknown(model, options.modules_to_save, "lora.modules_to_save")
    config: Any = PeftLora(
        r=options.r,
        lora_alpha=options.alpha or 2 * options.r,  # type: ignore[arg-type]  # any number will do
        target_modules=sorted(targets),
        use_dora=options.dora,
        use_rslora=options.rslora,
        task_type="CAUSAL_LM",
    )
    # Some names of linear layers peft takes, in every file, for experts that are one parameter now:
    # it says which where it finds nothing.
    vars(hollow)["config"] = model.config
    with contextlib.suppress(ValueError):
        inject_adapter_in_model(config, hollow)
    if fused := sorted(config.target_parameters or ()):
        if options.target_modules != "all-linear":
            raise _no_adapter(fused, "experts" if "_proj" in str(fused) else "gate")
        kept = tuple(f".{name}" for name in config.target_modules or ())
        targets = {name for name in targets if f".{name}".endswith(kept)}
    config.target_modules, config.target_parameters = targets, None
    config.rank_pattern, config.alpha_pattern = {}, {}
    return config


def _targets(model: PreTrainedModel, wanted: list[str] | str) -> set[str]:
    """Name the modules that get adapters, as they are given or in full."""
    if isinstance(wanted, list):
        _refuse_unknown(model, wanted, "lora.target_modules")
        return set(wanted)
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    if wanted == "all-linear":
        return {
            name for name, module in modules.items()
            if isinstance(module, nn.Linear | Conv1D)
            and module is not head and not _computes_otherwise(module)
        }  # fmt: skip
    found = {name for name in modules if re.fullmatch(wanted, name)}
    if not found:
        raise UserError(
            "M124", f"lora.target_modules={wanted} matches no module's whole name",
            hint=_linear_names(model),
        )  # fmt: skip
    return found


def _computes_otherwise(layer: Any) -> bool:
    """Whether a linear layer of a model's own kind gives something else, as some routers do."""
    if not type(layer).forward.__module__.startswith("transformers.models."):
        return False
    try:
        with torch.no_grad():
            given = layer(layer.weight.new_zeros(1, layer.in_features))
    except (AttributeError, RuntimeError, ValueError, TypeError, IndexError):
        return True
    return not isinstance(given, Tensor) or given.shape != (1, layer.out_features)


def _no_adapter(names: Sequence[str], whole: str) -> UserError:
    return UserError(
        "M125",
        f"lora.target_modules finds {first_few(names)}: embedding, LM head, routers and fused "
        "experts get no adapter here",
        hint=f"leave it out, or train it whole: lora.modules_to_save=[{whole}]",
    )


def _refuse_other_options(folder: Path, config: Any, options: LoraConfig) -> None:
    """Options at their default give way to the adapter's own."""
    default = LoraConfig()
    of_adapter = {
        "r": config.r, "alpha": config.lora_alpha, "dora": config.use_dora,
        "rslora": config.use_rslora, "target_modules": config.target_modules,
        "modules_to_save": config.modules_to_save or [],
    }  # fmt: skip
    for name, value in of_adapter.items():
        wanted = getattr(options, name)
        same = set(wanted) == set(value) if isinstance(wanted, list) else wanted == value
        if wanted != getattr(default, name) and not same:
            shown = sorted(value) if isinstance(value, set | list) else value
            raise UserError(
                "M123",
                f"lora.{name} is not that of the adapter in lora.adapter_path",
                place=Place(folder),
                expected=f"lora.{name}={shown}, or leave it out",
                got=str(wanted),
            )


def _inject(
    model: PreTrainedModel, config: Any, base: Base, whole: Collection[str], seed: int,
    folder: Path | None = None,
) -> None:  # fmt: skip
    from peft import inject_adapter_in_model
    from peft.tuners.lora import Linear as LoraLinear

    ends = {
        name for name, module in model.named_modules()
        if module in (model.get_input_embeddings(), model.get_output_embeddings())
    }  # fmt: skip
    config.modules_to_save = None  # peft would copy them
    config.init_lora_weights, config.inference_mode = True, False
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # What peft sets right by itself, and what is refused below.
        warnings.filterwarnings("ignore", message="fan_in_fan|.*tie_word_emb|.*_pattern keys")
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as failure:
            if folder is not None:
                raise unfit(folder, first_line(failure)) from failure
            raise UserError(
                "M124",
                "lora.target_modules finds nothing, or what cannot have an adapter",
                got=first_line(failure),
                hint=_linear_names(model),
            ) from failure
    adapted = adapter_layers(model)
    if folder is not None and (fused := config.target_parameters):
        raise unfit(folder, f"what it adapts are fused experts here: {', '.join(sorted(fused))}")
    config.target_parameters = None
    ends |= {n for n, layer in adapted.items() if _computes_otherwise(layer.get_base_layer())}
    if refused := sorted(ends & adapted.keys()):
        raise _no_adapter(refused, refused[0].rpartition(".")[2])
    for layer in adapted.values():
        layer.cast_input_dtype_enabled = False  # autocast would only narrow it again
        plain = type(layer) is LoraLinear and isinstance(layer.get_base_layer(), nn.Linear)
        if plain and not config.use_dora and not config.lora_bias:
            vars(layer)["forward"] = partial(_adapted, layer)
    for name, module in model.named_modules():
        if any(_is_called(name, wanted) for wanted in whole):
            if inside := [n for n in adapted if n == name or n.startswith(f"{name}.")]:
                raise UserError(
                    "M126",
                    f"lora.modules_to_save and lora.target_modules both find {inside[0]}",
                    hint="a module has an adapter or is trained whole",
                )
            module.requires_grad_(True)
    config.modules_to_save = sorted(
        {name.rpartition(".")[0] for name, _ in whole_parameters(model)}
    ) or None  # fmt: skip
    config.base_model_name_or_path, config.revision = base.name, base.revision
    vars(model)["adapter_base"] = base


def _adapted(layer: Any, x: Tensor) -> Tensor:
    """Compute what peft's layer does, the adapter's share added where the layer's output is: three
    temporary outputs less, whose holes in the memory cost a quarter of a step's peak on a CPU.

    Args:
        layer: a linear one.
        x: (…, inputs).

    Returns:
        (…, outputs).
    """
    rows = x.flatten(0, -2)
    low = layer.lora_A["default"](layer.lora_dropout["default"](rows))  # (rows, r)
    out = layer.base_layer(rows)
    up, scale = layer.lora_B["default"].weight.t().to(out.dtype), layer.scaling["default"]
    # Compilation plans its memory itself, and selective checkpointing keeps `out` as it is.
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        out = torch.addmm(out, low, up, alpha=scale)
    else:
        out.addmm_(low, up, alpha=scale)
    return out.unflatten(0, x.shape[:-1])


def know_base(model: nn.Module, sha256: str, folder: str | None) -> None:
    """Tell a model with adapters the hash of its base's weights, which came after them.

    Args:
        model: with adapters.
        sha256: see `weights_sha256`.
        folder: of an adapter that is continued; None: it is new.

    Raises:
        UserError: that adapter belongs to another base (78).
    """
    base = replace(vars(model)["adapter_base"], sha256=sha256)
    vars(model)["adapter_base"] = base
    if folder is not None:
        config = read_adapter_config(Path(folder).expanduser())
        base.refuse_another(Path(folder), config.base_model_name_or_path)


def copy_adapter(
    source: PreTrainedModel, target: PreTrainedModel, trained: Mapping[str, Tensor]
) -> None:
    """Put the adapter that one model trained into its base model.

    Args:
        source: with the adapter.
        target: as it was loaded.
        trained: `adapter_tensors` of the source, whole.

    Raises:
        UserError: the base model's files have changed meanwhile (78).
    """
    own: Any = vars(source)
    config, base = copy.deepcopy(adapter_config(source)), own["adapter_base"]
    if base.quantize is None and weights_sha256(target.named_parameters()) != base.sha256:
        raise UserError(
            "M132",
            f"the weights of {base.name} have changed since the run began",
            hint="put its files back; the checkpoints are intact, and the same command exports",
        )
    rows: Any = source.get_input_embeddings().weight
    _resize(target, len(rows))
    _inject(target, config, base, set(config.modules_to_save or ()), seed=0)
    _fill(target, trained)


def _fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in adapter_tensors(model).items():
            tensor.copy_(weights[name])


def _resize(model: PreTrainedModel, rows: int) -> None:
    own: Any = model.get_input_embeddings().weight
    if len(own) != rows:
        model.resize_token_embeddings(rows, mean_resizing=False)


def wake_adapters(model: nn.Module) -> None:
    """Let new adapters compute something: while B is zero, much could be wrong and not show."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.02, generator=generator)


def merge_adapter(model: PreTrainedModel) -> None:
    """Add the adapters to the weights and take them out: a plain model is left."""
    with torch.no_grad():
        for name, layer in adapter_layers(model).items():
            layer.merge(safe_merge=True)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)


def _is_called(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _refuse_unknown(model: nn.Module, wanted: Collection[str], key: str) -> None:
    names = [name for name, _ in model.named_modules()]
    unknown = [word for word in wanted if not any(_is_called(name, word) for name in names)]
    if unknown:
        raise UserError(
            "M124",
            f"{key} names modules that the model does not have",
            got=", ".join(unknown),
            hint=_linear_names(model),
        )


def _linear_names(model: nn.Module) -> str:
    modules = model.named_modules()
    names = {name.rpartition(".")[2] for name, m in modules if [*m.parameters(recurse=False)]}
    return f"its modules are {', '.join(sorted(names))}: in […] their names, else a pattern"
