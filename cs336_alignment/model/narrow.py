"""Frozen layers in the dtype that autocast computes in: the same numbers in half the memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from cs336_alignment.model.adapters import adapter_config


class _Narrow(nn.Linear):
    """A frozen layer held in the dtype that autocast computes in, which takes any input."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


def narrow_frozen(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Hold the frozen linear layers in the compute dtype: autocast computes with just these
    numbers, and would make them anew at every use. The head stays, and so do layers with DoRA,
    which reads their norms.
    """
    if adapter_config(model).use_dora:
        return
    head = model.get_output_embeddings()
    for module in model.modules():
        frozen = not any(parameter.requires_grad for parameter in module.parameters())
        if type(module) is nn.Linear and module is not head and frozen:
            module.__class__ = _Narrow
            for parameter in module.parameters():
                parameter.data = parameter.data.to(dtype)


def narrowed_to(model: nn.Module) -> torch.dtype | None:
    """Give the dtype of `narrow_frozen`; None: all weights are as loaded."""
    found = (module.weight.dtype for module in model.modules() if isinstance(module, _Narrow))
    return next(found, None)
