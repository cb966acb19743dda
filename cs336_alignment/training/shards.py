"""Parts of tensors: which rows a process holds of each, written to safetensors files and read again
by any number of processes.

The files are those of the safetensors storage of torch.distributed.checkpoint, whose
`HuggingFaceStorageReader` reads them: each says in its header where its parts begin. They are
written here, since its own writer hides the system's error text, hashes nothing, and plans by
collectives in which a failure of one process is a wait of the others.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from cs336_alignment.training.safetensors_file import write_safetensors

OFFSETS = "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class Part:
    """Some rows of a tensor.

    Attributes:
        rows: those that this process holds, where they are; all of them if it holds all.
        start: the first of them, counted in the whole tensor.
        shape: of the whole tensor.
    """

    rows: Tensor
    start: int
    shape: tuple[int, ...]


def part_of(tensor: Tensor) -> Part:
    """Give what this process holds of a tensor: of a sharded one its rows, which may be none."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Part(tensor, 0, tuple(tensor.shape))
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    each = -(-rows // mesh.size())  # as torch.chunk cuts: the last ones have less, or nothing
    return Part(tensor.to_local(), min(each * mesh.get_local_rank(), rows), tuple(tensor.shape))


def whole_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Give named tensors one after the other, sharded ones gathered: all processes take part."""
    for name, tensor in tensors:
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write_parts(
    path: Path, tensors: Mapping[str, Tensor], starts: Mapping[str, int]
) -> dict[str, int | str]:
    """Write parts of tensors, one at a time; gives size and sha256 of the file.

    Args:
        path: of the file.
        tensors: the rows.
        starts: the first row of each in the whole tensor; 0 where none is given.
    """
    offsets = {
        name: {"saved_offsets": [starts.get(name, 0), *[0] * (rows.ndim - 1)][: rows.ndim]}
        for name, rows in tensors.items()
    }
    return write_safetensors(path, tensors, {OFFSETS: json.dumps(offsets)})


@dataclass(frozen=True)
class _Piece:
    start: int
    shape: tuple[int, ...]
    file: Any


class Pieces:
    """The tensors that some safetensors files hold together, in whole or in parts.

    Args:
        files: of one kind; opened, and read where something is asked for.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._pieces: dict[str, list[_Piece]] = defaultdict(list)
        for path in files:
            file = safe_open(path, framework="pt")
            offsets = json.loads((file.metadata() or {}).get(OFFSETS, "{}"))
            for name in file.keys():  # noqa: SIM118  it is no dictionary
                start = (offsets.get(name, {}).get("saved_offsets") or [0])[0]
                shape = tuple(file.get_slice(name).get_shape())
                self._pieces[name].append(_Piece(start, shape, file))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.start)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """The shapes of the whole tensors; None for one that lacks rows, or has some twice."""
        return {name: _shape(pieces) for name, pieces in self._pieces.items()}

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        """Tell whether a tensor is there with this shape, in a floating-point format of 16 bits or
        more: fewer want scales.
        """
        pieces = self._pieces.get(name, [])
        formats = {piece.file.get_slice(name).get_dtype() for piece in pieces}
        return self.shapes.get(name) == shape and formats <= {"F64", "F32", "F16", "BF16"}

    @torch.no_grad()
    def read(self, name: str, part: Part) -> None:
        """Fill a part, in place, with the rows that are its own."""
        first, last = part.start, part.start + (len(part.rows) if part.shape else 0)
        for piece in self._pieces[name]:
            if not part.shape:
                part.rows.copy_(piece.file.get_tensor(name))
                continue
            start, end = max(first, piece.start), min(last, piece.start + piece.shape[0])
            if start < end:
                rows = piece.file.get_slice(name)[start - piece.start : end - piece.start]
                part.rows[start - first : end - first].copy_(rows)


def _shape(pieces: Sequence[_Piece]) -> tuple[int, ...] | None:
    head = pieces[0].shape
    rows = 0
    for piece in pieces:
        if piece.start != rows or piece.shape[1:] != head[1:]:
            return None
        rows += piece.shape[0] if head else 0
    return (rows, *head[1:]) if head else ()
