"""What a run was made of: versions, commit, hashes of data, tokenizer and template."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.config import Config, EvaluationConfig
from cs336_alignment.data.splits import PreparedData
from cs336_alignment.data.tokenize import tokenizer_fingerprint
from cs336_alignment.errors import UserError
from cs336_alignment.model.adapters import base_sha256
from cs336_alignment.training.shards import part_of

PACKAGES = (
    "cs336-alignment", "torch", "transformers", "accelerate", "datasets", "tokenizers",
    "safetensors", "peft", "hydra-core", "numpy", "wandb",
)  # fmt: skip


def build_manifest(
    config: Config,
    *,
    old: Mapping[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: PreparedData,
    held_out: PreparedData | None,
    num_processes: int,
    precision: str,
    step: int,
    reward_sha256: str | None = None,
) -> dict[str, Any]:
    """Describe a run; what an earlier part of the same run noted (its wandb id) is kept.

    Evaluations from `evaluation_since_step` on ask the same questions.

    Args:
        config: of the command.
        old: the manifest of the earlier part; empty if there is none.
        model: loaded.
        tokenizer: of the model.
        train: the training data.
        held_out: the evaluation data, if any.
        num_processes: that train.
        precision: of the computation, as resolved.
        step: where this part begins.
        reward_sha256: of the file of a user's reward function, if one grades.

    Raises:
        UserError: training data, tokenizer, template or, where it counts, the number of processes
            of the earlier part were others (78).
    """
    questions = _evaluation_hash(config, held_out, reward_sha256)
    since = step + 1 if step and "evaluation_sha256" in old else 0
    same_questions = old.get("evaluation_sha256") == questions
    manifest: dict[str, Any] = {
        "versions": versions(),
        "git_commit": git_commit(),
        "data_sha256": train.fingerprint,
        "eval_data_sha256": None if held_out is None else held_out.fingerprint,
        "evaluation_sha256": questions,
        "evaluation_since_step": old.get("evaluation_since_step", 0) if same_questions else since,
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        "template_sha256": _template_hash(train),
        "model_revision": getattr(model.config, "_commit_hash", None) or config.model.revision,
        "base_sha256": base_sha256(model),
        "data_revision": train.sources[0].revision,
        "num_processes": num_processes,
        "threads_per_process": torch.get_num_threads(),
        "parallel": config.parallel.strategy,
        "precision": precision,
        "wandb_run_id": old.get("wandb_run_id") or uuid.uuid4().hex[:12],
        **count_parameters(model),
    }
    changes = dict(old.get("changes", {}))
    if found := _changes(old, manifest):
        changes[str(step)] = found
    manifest["changes"] = changes
    watched = [
        ("data_sha256", "training data"),
        ("tokenizer_sha256", "tokenizer"),
        ("template_sha256", "prompt template"),
        ("precision", "precision"),
    ]
    if config.trainer.loss_normalization == "microbatch":  # a mean over the processes' means
        watched.append(("num_processes", "number of processes"))
    for key, what in watched:
        if key in old and old[key] != manifest[key]:
            raise UserError(
                "C302",
                f"the {what} differs from what this run was started with",
                expected=f"{key} {str(old.get(key))[:16]}",
                got=str(manifest[key])[:16],
                hint=f"to start another run: run_name={config.run_name}-2",
            )
    return manifest


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Name what rounding may depend on and that is not as it was."""
    before = {**old, **old.get("versions", {})}
    now = {**new, **new["versions"]}
    names = (
        "num_processes", "parallel", "threads_per_process", "git_commit", "python", *PACKAGES,
    )  # fmt: skip
    changed = [name for name in names if name in before and before[name] != now.get(name)]
    return [f"{name} was {before[name]} and is {now.get(name)}" for name in changed]


def versions() -> dict[str, str]:
    """Give the versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_commit() -> str | None:
    """Give the commit of the checkout that this package runs from; None if it is installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def count_parameters(module: nn.Module) -> dict[str, int]:
    """Count parameters: all, trained, and held by this process (the main one has most)."""
    total = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    local = sum(part_of(p).rows.numel() for p in module.parameters())
    return {"parameters": total, "trainable_parameters": trained, "local_parameters": local}


def _template_hash(train: PreparedData) -> str:
    template = train.template
    text = "chat" if template is None else f"{template.text}\0{template.text_with_input or ''}"
    return hashlib.sha256(text.encode()).hexdigest()


def _evaluation_hash(config: Config, held_out: PreparedData | None, reward: str | None) -> str:
    """Hash what an evaluation's numbers depend on besides the model."""
    evaluation, default = config.evaluation, EvaluationConfig()
    later = ("num_samples", "min_new_tokens", "top_p")  # runs that had none keep their hash
    more = {n: v for n in later if (v := getattr(evaluation, n)) != getattr(default, n)}
    text = [
        held_out and held_out.fingerprint, evaluation.num_prompts, evaluation.max_new_tokens,
        evaluation.temperature, evaluation.stop, evaluation.reward,
        *([reward] if reward else []), *([more] if more else []),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()
