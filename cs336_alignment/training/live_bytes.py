"""What tensors are alive, and were when most was, by what they are for."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cs336_alignment.training.heap import Heap

PASSING = "in passing"
# logsumexp keeps `exp(x - max)` for its sum (aten/src/ATen/native/ReduceOps.cpp), and a product of
# many rows with a vector each copies what does not lie as MKL wants it (LinearAlgebra.cpp).
COPYING = {torch.ops.aten.logsumexp.default, torch.ops.aten.bmm.default}


class LiveBytes(TorchDispatchMode):
    """Adds up the tensors that are made within its block and are still alive, by what they are for.

    Args:
        device: whose tensors count.
        heap: that is asked for a block for each; None: none is.

    Attributes:
        now: by part, what is alive.
        peak: by part, when most was alive.
    """

    def __init__(self, device: torch.device, heap: Heap | None = None) -> None:
        super().__init__()
        self._part = PASSING
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._device = device.type
        self._heap = heap
        self._storages: dict[int, tuple[str, int, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.equal.default:  # of values, which nobody knows: as if foretold
            return True
        scratch = self._scratch(func, args)
        if func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor):
            rows, weights, groups = args[:3]  # without values it knows bfloat16 alone
            shape = (len(rows), weights.shape[-1])
            result = rows.new_empty(shape if weights.dim() == 3 else (len(groups), *shape))
        else:
            result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device.type == self._device:
                self.add(value, self._part)
        del scratch
        return result

    def _scratch(self, func: Any, args: Any) -> Tensor | None:
        """Make what a CPU's kernel makes within itself, where that is as large as its argument."""
        if self._device != "cpu" or func not in COPYING:
            return None
        if func is torch.ops.aten.bmm.default and args[1].shape[2] > 1:
            return None
        scratch = torch.empty_like(args[0])
        self.add(scratch, self._part)
        return scratch

    def add(self, tensor: Tensor, part: str) -> None:
        """Count a tensor's storage as of this part, if it is not counted yet."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        reference = weakref.ref(storage, lambda _: self._drop(key))
        self._storages[key] = (part, size, reference)
        if self._heap is not None:
            self._heap.take(key, size)
        self.now[part] += size
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def begin(self, part: str) -> None:
        """Count what is made from now on as of this part."""
        self._part = part

    def move(self, tensor: Tensor, part: str) -> None:
        """Count a tensor's storage as of another part."""
        self.add(tensor, part)
        key = tensor.untyped_storage()._cdata
        old, size, *rest = self._storages[key]
        self._storages[key] = (part, size, *rest)
        self.now[old] -= size
        self.now[part] += size

    def forget_peak(self) -> None:
        """Let the peak begin anew, from what is alive now."""
        self.peak = self.now.copy()

    def _drop(self, key: int) -> None:
        part, size, _ = self._storages.pop(key)
        self.now[part] -= size
        if self._heap is not None:
            self._heap.give(key)
