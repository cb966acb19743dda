"""The config that a folder was made with, and what a later command may change of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cs336_alignment.config import ALL_KEYS, Config, flatten
from cs336_alignment.errors import Place, UserError

# What may change between a stop and a restart. These keys do not touch the weights:
FREE = frozenset({
    "run_name", "output_root", "trainer.logging_steps", "trainer.eval_steps", "trainer.save_steps",
    "trainer.save_total_limit", "trainer.resume", "trainer.max_hours", "trainer.async_save",
    "trainer.metric_for_best_model", "trainer.greater_is_better", "trainer.reload_check",
    "trainer.watchdog_minutes", "data.eval_path", "data.max_eval_examples", "data.num_workers",
    "data.cache_dir", "parallel.num_processes", "parallel.timeout_minutes", "lora.export",
})  # fmt: skip
FREE_SECTIONS = (
    "evaluation.", "logger.", "inspect.", "export.", "hub.", "data.lint.", "expert_iteration.",
    "sweep.",
)  # fmt: skip
# These are told: the same examples in the same steps, with sums in another order, or a longer run.
NOTICED = frozenset({
    "trainer.max_steps", "trainer.num_train_epochs", "trainer.microbatch_tokens",
    "trainer.gradient_accumulation_steps", "trainer.batching", "trainer.gradient_checkpointing",
    "trainer.compile", "trainer.early_stopping_patience", "trainer.loss_spike",
    "trainer.loss_spike_nats", "parallel.strategy", "parallel.reshard_after_forward",
    "parallel.shard_gradients", "parallel.cpu_offload",
})  # fmt: skip
LENGTH = frozenset({"trainer.max_steps", "trainer.num_train_epochs"})
CUT = frozenset(
    {"trainer.microbatch_tokens", "trainer.gradient_accumulation_steps", "trainer.batching"}
)


def read_config(path: Path) -> dict[str, Any]:
    """Read a `config.yaml`, flattened; a key that a later release added is at its default.

    Raises:
        UserError: it cannot be read (74).
    """
    try:
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(old, dict):
            raise ValueError("it holds no config")
    except (OSError, yaml.YAMLError, ValueError) as failure:
        raise unreadable(path, failure) from failure
    return {**dict(flatten(Config())), **dict(_flatten_dict(old))}


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
    changed = _changed(read_config(path), config)
    if refused := {key: values for key, values in changed.items() if not may_change(key)}:
        text = f"{what} whose config differs where it changes them"
        raise _refusal(refused, text, Place(path), config)


def compare(old: Mapping[str, Any], new: Config, place: Place) -> tuple[list[str], bool]:
    """Compare a run's config with the command's, key by key.

    Args:
        old: the run's, as `read_config` gives it.
        new: the command's config.
        place: of the old config, for the error.

    Returns:
        Notices for the keys that may change but are worth telling, and whether the run's length
        changed.

    Raises:
        UserError: a key that changes training differs (78), with old and new value of each.
    """
    changed = {
        key: values
        for key, values in _changed(old, new).items()
        if key not in FREE and not key.startswith(FREE_SECTIONS)
    }
    # With a mean of means the cut is part of the loss.
    noticed = NOTICED - CUT if new.trainer.loss_normalization == "microbatch" else NOTICED
    if refused := {key: values for key, values in changed.items() if key not in noticed}:
        raise _refusal(refused, "a run whose config differs where it changes training", place, new)
    notices = [
        f"{key} changed from {before} to {after}" for key, (before, after) in changed.items()
    ]
    lengthened = bool(changed.keys() & LENGTH)
    if lengthened:
        notices.append("the learning rate follows the schedule of the new length from here on")
    return notices, lengthened


def unreadable(path: Path, failure: Exception) -> UserError:
    """Build the error for a file of a folder that cannot be read (74)."""
    return UserError(
        "R204",
        f"cannot read {path}: {failure}",
        hint="restore it from a copy, or start anew with another run_name=…",
    )


def _changed(old: Mapping[str, Any], new: Config) -> dict[str, tuple[Any, Any]]:
    """Give old and new value of each key that differs."""
    return {key: (old[key], value) for key, value in flatten(new) if old[key] != value}


def _refusal(
    changed: Mapping[str, tuple[Any, Any]], what: str, place: Place, config: Config
) -> UserError:
    return UserError(
        "C301",
        f"the folder holds {what}",
        place=place,
        got="; ".join(f"{key}: {before} → {after}" for key, (before, after) in changed.items()),
        hint=f"to start another: run_name={config.run_name}-2",
    )


def _flatten_dict(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and f"{prefix}{key}" not in ALL_KEYS:
            yield from _flatten_dict(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
