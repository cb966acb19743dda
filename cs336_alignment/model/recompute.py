"""Activation checkpointing: the backward pass recomputes what the forward pass did not keep."""

from __future__ import annotations

from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from cs336_alignment.errors import UserError

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def _keep_products(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    """Keep what is dear to compute: matrix products and attention."""
    name = operation.name()
    dear = name.split(".")[0] in PRODUCTS or "attention" in name or "varlen_attn" in name
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_keep_products)


def enable_checkpointing(model: PreTrainedModel, selective: bool = False) -> None:
    """Keep each layer's input alone and recompute the rest in the backward pass; no result changes.

    Args:
        model: of transformers, whose names for this changed within the supported versions.
        selective: keep the outputs of matrix products and attention, too.

    Raises:
        UserError: the architecture cannot recompute its layers (78).
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            "C124",
            f"trainer.gradient_checkpointing and model.name_or_path do not combine: "
            f"{type(model).__name__} cannot recompute its layers",
            hint="trainer.gradient_checkpointing=false; a smaller trainer.microbatch_tokens saves "
            "memory, too",
        )
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = _selective_contexts
    older = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", older)(options)


def disable_checkpointing(model: PreTrainedModel) -> None:
    """Keep all activations again."""
    older = model.gradient_checkpointing_disable
    getattr(model, "activation_checkpointing_disable", older)()
