"""The config that a folder of several runs was made with, and what a later command may change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from cs336_alignment.config import Config, flatten
from cs336_alignment.errors import ExitStatus, Place, UserError


def refuse_changes(
    path: Path, config: Config, may_change: Callable[[str], bool], what: str
) -> None:
    """Refuse a command that differs from an earlier one where that would mix two experiments.

    Args:
        path: the earlier `config.yaml`.
        config: of the command.
        may_change: tells whether a key is free.
        what: the folder holds, for the error.

    Raises:
        UserError: a key differs (78), with old and new value of each; the file cannot be read (74).
    """
    try:
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
        before = {**dict(flatten(Config())), **_leaves(old, set(dict(flatten(Config()))))}
    except (OSError, yaml.YAMLError, AttributeError) as failure:
        raise UserError(
            "R204",
            f"cannot read {path}: {failure}",
            ExitStatus.IO,
            hint="restore it from a copy, or start anew with another run_name=…",
        ) from failure
    changed = {
        key: (before.get(key), value)
        for key, value in flatten(config)
        if before.get(key) != value and not may_change(key)
    }
    if changed:
        raise UserError(
            "C301",
            f"the folder holds {what} whose config differs where it changes them",
            ExitStatus.BAD_CONFIG,
            place=Place(path),
            got="; ".join(f"{key}: {old} → {new}" for key, (old, new) in changed.items()),
            hint=f"to start others: run_name={config.run_name}-2",
        )


def _leaves(value: dict[str, Any], keys: set[str], prefix: str = "") -> dict[str, Any]:
    """Flatten as far as the schema's keys go: a value may itself be a dictionary."""
    found: dict[str, Any] = {}
    for name, inner in value.items():
        key = f"{prefix}{name}"
        if isinstance(inner, dict) and key not in keys:
            found |= _leaves(inner, keys, f"{key}.")
        else:
            found[key] = inner
    return found
