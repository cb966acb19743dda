"""A group that was typed beside a preset: `model=smollm2 experiment=quickstart`. Presets are merged
after groups, so a preset's value of a key would stand in place of the group's.
"""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Iterable
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cs336_alignment.config import ALL_KEYS, MISSING
from cs336_alignment.errors import UserError

PRESETS = "experiment"  # the group whose options set keys of all sections


def refuse_hidden_groups(composed: DictConfig) -> None:
    """Refuse a typed group of which the chosen preset hides a value, where nobody typed the key.

    Args:
        composed: while Hydra runs it, in its context.

    Raises:
        UserError: with the line that lets the group win (78).
    """
    choices = HydraConfig.get().runtime.choices
    typed = {word.split("=", 1)[0].lstrip("+"): word for word in HydraConfig.get().overrides.task}
    groups = {group: word for group, word in typed.items() if group in choices}
    preset = groups.pop(PRESETS, None)
    if choices[PRESETS] is None or preset is None or not groups:
        return
    final = _values(composed)
    hidden = {
        key: value for key, value in _values(_composed(groups.values())).items()
        if _section(key) in groups and key not in typed and value not in (final[key], MISSING)
    }  # fmt: skip
    if not hidden:
        return
    # What an option only inherits may be the preset's: `optimizer=muon` says nothing about rates.
    bare = _composed(())
    defaults, without = bare.hydra.runtime.choices, _values(bare)
    lost = {
        _section(key) for key, value in hidden.items()
        if value != without[key] or choices[_section(key)] == defaults[_section(key)]
    }  # fmt: skip
    if not lost:
        return
    hidden = {key: value for key, value in hidden.items() if _section(key) in lost}
    words = " ".join(word for group, word in groups.items() if group in lost)
    raise UserError(
        "C136",
        f"{words} would have no effect on keys that {preset} sets, too",
        expected="the keys typed, or the preset alone",
        got=", ".join(f"{key}={_text(final[key])}" for key in hidden) + f" by {preset}",
        hint=f"add {shlex.join(f'{key}={_text(value)}' for key, value in hidden.items())}, "
        f"or leave {words} out",
    )


def _composed(words: Iterable[str]) -> DictConfig:
    loader = GlobalHydra.instance().config_loader()
    return loader.load_configuration("train", list(words), RunMode.RUN)


def _values(config: DictConfig) -> dict[str, Any]:
    """Give every key's value as it is written, interpolations too."""
    whole: Any = OmegaConf.to_container(config)
    return {key: functools.reduce(dict.__getitem__, key.split("."), whole) for key in ALL_KEYS}


def _section(key: str) -> str:
    return key.split(".", 1)[0]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
