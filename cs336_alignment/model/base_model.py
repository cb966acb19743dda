"""Which model an adapter belongs to: its name, and the sha256 of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cs336_alignment.errors import Place, UserError
from cs336_alignment.files import write_json

ADAPTER_CONFIG = "adapter_config.json"
BASE = "base_model.json"


@dataclass(frozen=True)
class Base:
    """The model that an adapter is made for.

    Attributes:
        name: a folder or hub id.
        revision: of the hub repository.
        sha256: of its weights as loaded, see `weights_sha256`; None before they are.
        quantize: how they are held, since that changes the hash.
    """

    name: str
    revision: str | None
    sha256: str | None
    quantize: str | None = None

    def save(self, folder: Path) -> None:
        """Write it beside an adapter."""
        write_json(folder / BASE, asdict(self))

    def refuse_another(self, folder: Path, model_name: str | None) -> None:
        """Refuse an adapter that was made for another model.

        Args:
            folder: of the adapter.
            model_name: of the base model by the adapter's own word, for one that has no hash.

        Raises:
            UserError: it was (78).
        """
        if self.sha256 is None:
            return
        found = _read_json(folder / BASE) if (folder / BASE).is_file() else {}
        if found.get("quantize") == self.quantize and "sha256" in found:
            same, was = found["sha256"] == self.sha256, f"sha256 {found['sha256'][:16]}"
        elif found or not model_name:
            return  # held in other bits: the shapes alone can tell
        else:  # the place may differ, the name should not
            same, was = _last(model_name) == _last(self.name), model_name
        if not same:
            raise UserError(
                "M121",
                f"the adapter was trained on another base model than {self.name}",
                place=Place(folder),
                expected=was,
                got=f"sha256 {self.sha256[:16]}" if found else self.name,
                hint="the model it was trained on has to be there, unchanged"
                if found
                else f"if it is the same model, write its name into {folder / ADAPTER_CONFIG}",
            )


def weights_sha256(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Hash the names and bits of all parameters, in the order of `named_parameters`."""
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        data = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def unfit(folder: Path, reason: str) -> UserError:
    """Build the error for an adapter that does not fit (78)."""
    return UserError(
        "M127",
        "the adapter does not fit the model",
        place=Place(folder),
        got=reason,
        hint="it belongs to another base model, or another tool's options made it",
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as failure:
        raise unfit(path.parent, f"{path.name} cannot be read: {failure}") from failure


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
