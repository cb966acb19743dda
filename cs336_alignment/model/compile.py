"""Compilation of the model's repeated layers (regional: one compilation serves all of them)."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from transformers import PreTrainedModel

from cs336_alignment.errors import UserError


def compile_layers(model: PreTrainedModel) -> int:
    """Have `torch.compile` run the repeated layers, for any number of tokens; returns how many.

    Attention stays as it is: its shapes change with every microbatch.

    Raises:
        UserError: the architecture does not name its layers (78).
    """
    layers = repeated_layers(model, "trainer.compile=false")
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def repeated_layers(model: nn.Module, instead: str) -> list[nn.Module]:
    """Find the repeated layers, from the first to the last.

    Raises:
        UserError: the architecture does not name them (78); `instead` says what does without.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    # A sharded layer is of a class made for it, below its own.
    layers = [m for m in model.modules() if names & {kind.__name__ for kind in type(m).__mro__}]
    if not layers:
        raise UserError(
            "C163",
            f"{type(model).__name__} does not say which modules its repeated layers are",
            hint=instead,
        )
    return layers


def compiled_graphs() -> int:
    """Count the graphs compiled in this process so far; growth means recompilation."""
    from torch._dynamo.utils import counters  # an import of a second

    return int(counters["stats"]["unique_graphs"])


def in_eager() -> contextlib.AbstractContextManager[object]:
    """Run without compilation within a context: evaluation and generation bring other shapes."""
    return torch.compiler.set_stance("force_eager")
