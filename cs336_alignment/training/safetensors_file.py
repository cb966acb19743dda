"""The safetensors format, streamed: one tensor in memory at a time, hashed on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], more: Mapping[str, str] | None = None
) -> dict[str, int | str]:
    """Write tensors in the safetensors format, one at a time, and give size and sha256 of the file.

    The library's own writer wants all bytes at once or hides the system's error text; this one
    streams, and a full disk is an OSError. The caller brings the file to the disk. The format: 8
    bytes of little-endian header length, a JSON header, the data. `more` goes into the header.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(more or {})}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for tensor in tensors.values():
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(data)
            digest.update(data)
    return {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}
