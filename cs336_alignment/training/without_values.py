"""The model that training builds, of tensors without values: it takes no time and no memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.config import Config
from cs336_alignment.model.loading import base_of, load_model
from cs336_alignment.model.narrow import narrow_frozen
from cs336_alignment.model.source import ModelSource
from cs336_alignment.model.trainable import choose_trained

# Of bitsandbytes' NF4: half a byte a weight, a byte of scale for 64 of them, and a float32 for 256
# scales.
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)


def without_values(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    dtype: torch.dtype | None,
) -> PreTrainedModel:
    """Build the model on the `meta` device, with its new tokens, adapters and frozen weights.

    Args:
        source: of the model; its weights need not be there.
        tokenizer: with the new tokens, see `load_tokenizer`.
        config: of the run.
        dtype: that autocast computes in; None: there is none.

    Raises:
        UserError: there is no such model, or what is to be trained of it does not fit it.
    """
    lora = config.lora
    with torch.device("meta"):
        model = load_model(source, random_init=True, seed=0)
        base = base_of(source, None, lora.quantize) if lora.active else None
        choose_trained(model, tokenizer, config.model, lora, base, seed=0)
    if lora.quantize is not None:
        _pack(model)
    elif lora.active and dtype is not None and config.parallel.strategy != "fsdp2":
        narrow_frozen(model, dtype)
    return model


def _pack(model: PreTrainedModel) -> None:
    """Give frozen linear layers weights of as many bytes as they have in 4 bits."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) is nn.Linear and module is not head and not module.weight.requires_grad:
            size = round(module.weight.numel() * FOUR_BITS)
            packed = torch.empty(size, dtype=torch.uint8, device="meta")
            module.weight = nn.Parameter(packed, requires_grad=False)


def exchange_tensors(
    model: nn.Module, make: Callable[[Tensor], Tensor], *, buffers: bool = True
) -> None:
    """Put other tensors in place of a model's parameters, and of its buffers; a tied one stays
    one.
    """
    found: dict[int, Tensor] = {}

    def exchanged(tensor: Tensor) -> Tensor:
        if id(tensor) not in found:
            other = make(tensor)
            if isinstance(tensor, nn.Parameter):
                other = nn.Parameter(other, tensor.requires_grad)
            found[id(tensor)] = other
        return found[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers if buffers else {}):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = exchanged(tensor)  # type: ignore[assignment]


class ReadAsOne(TorchDispatchMode):
    """Within its block a number that is read from a tensor without values is 1: an optimizer reads
    sizes of what it steps by, and its memory does not depend on them.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            tensor: Tensor = args[0]
            if isinstance(tensor, FakeTensor) or tensor.is_meta:
                return 1.0
        return func(*args, **(kwargs or {}))
