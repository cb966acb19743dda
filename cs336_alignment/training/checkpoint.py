"""Checkpoints: written whole or not at all, verified by sha256 before they are believed.

A checkpoint is a directory `step-000100`: weights under their Hugging Face names, configuration and
tokenizer (so it loads as a model folder), the optimizer's state, the trainer's state, and
`manifest.json`, written last. Of a model with adapters it holds these alone and loads as an
adapter's folder. It is assembled in a temporary directory, flushed to disk and renamed
in one operation.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.files import (
    flush_folder,
    flush_tree,
    free_mib,
    sha256_of,
    system_error,
    write_json,
)
from cs336_alignment.model.lora import (
    ADAPTER_WEIGHTS,
    adapter_tensors,
    is_adapted,
    refuse_another_base,
)
from cs336_alignment.training.optimizer import allocate_state
from cs336_alignment.training.safetensors_file import write_safetensors

MANIFEST = "manifest.json"
INDEX = "index.json"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"
NAME = re.compile(r"step-(\d{6,})")
TEMPORARY = ".tmp-"


@dataclass
class TrainState:
    """Where a run stands. All that can be derived from the step is derived, not stored.

    Attributes:
        step: optimizer steps completed.
        tokens_seen: prompt and response tokens of all examples so far.
        response_tokens_seen: trained tokens so far.
        skipped_steps: steps left out for a loss spike.
        recent_losses: token means of the last steps, in nats, newest last.
    """

    step: int = 0
    tokens_seen: int = 0
    response_tokens_seen: int = 0
    skipped_steps: int = 0
    recent_losses: list[float] = field(default_factory=list)


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Give the parameters (a tied one once) and persistent buffers of a module by name; of one with
    adapters what is trained alone.
    """
    if is_adapted(module):
        return adapter_tensors(module)
    persistent = module.state_dict()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
    return {**dict(module.named_parameters()), **buffers}


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Give the optimizer's state as `kind:parameter name` → tensor, `kind.part:…` where a state is
    of several.
    """
    return {
        f"{kind}{part}:{name}": tensor
        for name, parameter in module.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
        for part, tensor in _parts(value)
    }


def _parts(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Take a tensor of several (8-bit codes and their scales, say) apart."""
    if not hasattr(value, "__tensor_flatten__"):
        yield "", value
        return
    for part in value.__tensor_flatten__()[0]:
        yield f".{part}", getattr(value, part)


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds of the training itself.

    Attributes:
        state: of the run, its own copy.
        weights: parameter or buffer name → tensor.
        moments: the optimizer's, see `optimizer_tensors`.
        weights_file: where the weights go.
    """

    state: TrainState
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    weights_file: str = WEIGHTS

    @staticmethod
    def of(state: TrainState, module: nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
        """Look at the tensors where they are: right only as long as nothing trains on."""
        return Snapshot(
            copy.deepcopy(state), module_tensors(module), optimizer_tensors(module, optimizer),
            _weights_file(module),
        )  # fmt: skip

    def copied(self, into: Snapshot | None) -> Snapshot:
        """Copy the tensors into this machine's memory: into those of an earlier copy if given."""
        old = Snapshot(self.state, {}, {}) if into is None else into
        return Snapshot(
            self.state, _copied(self.weights, old.weights), _copied(self.moments, old.moments),
            self.weights_file,
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        """Of all tensors together."""
        tensors = (*self.weights.values(), *self.moments.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _weights_file(module: nn.Module) -> str:
    return ADAPTER_WEIGHTS if is_adapted(module) else WEIGHTS


def _copied(tensors: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    copies = {}
    for name, tensor in tensors.items():
        place = old.get(name)
        if place is None:
            place = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda"
            )
        copies[name] = place.copy_(tensor.detach())
    return copies


def restore(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Load a verified checkpoint into a module and its optimizer, in place.

    Raises:
        UserError: names or shapes are not those of this module (74).
    """
    state = restore_weights(folder, module)
    moments = load_file(folder / OPTIMIZER)
    if moments:
        allocate_state(optimizer)
    places = optimizer_tensors(module, optimizer)
    if moments.keys() != places.keys() or any(moments[n].shape != places[n].shape for n in places):
        raise UserError(
            "R205",
            f"{folder} holds the state of another optimizer",
            ExitStatus.IO,
            hint="give another run_name",
        )
    for name, place in places.items():
        place.copy_(moments[name])
    return state


def restore_weights(folder: Path, module: nn.Module) -> TrainState:
    """Load the weights alone of a verified checkpoint into a module, in place.

    Raises:
        UserError: names or shapes are not those of this module (74), or its adapters were trained
            on another base model (78).
    """
    file, own = folder / _weights_file(module), module_tensors(module)
    weights = load_file(file) if file.is_file() else {}
    if weights.keys() != own.keys() or any(weights[n].shape != own[n].shape for n in own):
        raise UserError(
            "R205",
            f"{folder} holds weights of another model",
            ExitStatus.IO,
            hint="give another run_name, or the model the run was started with",
        )
    if is_adapted(module):
        refuse_another_base(folder, module)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return TrainState(**state["progress"])


def save_checkpoint(
    checkpoints: Path,
    snapshot: Snapshot,
    *,
    extra: Mapping[str, Any],
    save_sidecars: Callable[[Path], None],
    keep: int,
    damaged: Collection[Path] = (),
    best: int | None = None,
) -> Path:
    """Write a checkpoint, make it the latest, and delete the oldest beyond `keep`.

    Args:
        checkpoints: the run's folder of checkpoints.
        snapshot: what is saved; its state goes into `trainer_state.json` as `progress`.
        extra: more of `trainer_state.json` (versions, hashes).
        save_sidecars: writes small files (config, tokenizer) into the directory it is given.
        keep: checkpoints that stay, at least 1.
        damaged: checkpoints that do not count and go, now that there is another one.
        best: the step whose checkpoint stays besides.

    Raises:
        UserError: the disk is full or failing (74); the checkpoints before this one are intact.
    """
    final = folder_of(checkpoints, snapshot.state.step)
    temporary = checkpoints / f"{TEMPORARY}{final.name}-{os.getpid()}"
    replaced = checkpoints / f"{TEMPORARY}old-{final.name}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        if free_mib(checkpoints) * 2**20 < snapshot.bytes:  # before a slow disk finds out
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_sidecars(temporary)
        manifest = {
            snapshot.weights_file: write_safetensors(
                temporary / snapshot.weights_file, snapshot.weights
            ),
            OPTIMIZER: write_safetensors(temporary / OPTIMIZER, snapshot.moments),
        }
        write_json(temporary / STATE, {"progress": asdict(snapshot.state), **extra})
        _seal(temporary, manifest)
        if final.is_dir():  # the run began before it: it was damaged, or could not be read
            final.rename(replaced)
        temporary.rename(final)
        flush_folder(checkpoints)
        flush_folder(checkpoints.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        _write_index(checkpoints, snapshot.state.step, best)
        _rotate(checkpoints, snapshot.state.step, keep, damaged, best)
    except Exception as failure:
        if not final.is_dir() and replaced.is_dir():
            with contextlib.suppress(OSError):
                replaced.rename(final)
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        if (reason := system_error(failure)) is None:
            raise
        raise UserError(
            "R206",
            f"cannot write the checkpoint {final}: {reason}",
            ExitStatus.IO,
            expected=f"{snapshot.bytes / 2**20:,.1f} MiB",
            got=f"{free_mib(checkpoints.parent):,.1f} MiB free",
            hint="make room and run the same command again; "
            "the checkpoints before this one are intact",
        ) from failure
    return final


def mark_best(checkpoints: Path, best: int, *, latest: int, keep: int) -> None:
    """Name the best checkpoint in the index; the one that was it goes if it is beyond `keep`.

    Args:
        checkpoints: the run's folder of checkpoints.
        best: its step.
        latest: the newest step that has a checkpoint; later ones are left alone.
        keep: newest checkpoints that stay besides.
    """
    _write_index(checkpoints, latest, best)
    _rotate(checkpoints, latest, keep, (), best)


def folder_of(checkpoints: Path, step: int) -> Path:
    """Give the folder of a step's checkpoint, which need not be there."""
    return checkpoints / f"step-{step:06d}"


def saved_steps(checkpoints: Path) -> set[int]:
    """Give the steps that have a checkpoint, whole or not."""
    return {_step_of(folder) for folder in list_checkpoints(checkpoints)}


def _write_index(checkpoints: Path, latest: int, best: int | None) -> None:
    name = None if best is None else folder_of(checkpoints, best).name
    index = {"latest": folder_of(checkpoints, latest).name, "best": name}
    write_json(checkpoints / INDEX, index)


def _seal(folder: Path, manifest: dict[str, dict[str, int | str]]) -> None:
    """Bring a folder to the disk, with a manifest of all its files."""
    for path in flush_tree(folder):
        name = path.relative_to(folder).as_posix()
        if name not in manifest:
            manifest[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_json(folder / MANIFEST, manifest)


def verify(folder: Path) -> str | None:
    """Check a checkpoint against its manifest; None if it is whole, else why not."""
    try:
        return _verify(folder)
    except OSError as failure:
        return f"it cannot be read ({failure.strerror or failure})"


def _verify(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValueError:
        return f"{MANIFEST} is not JSON"
    if (
        not isinstance(manifest, dict)
        or not {OPTIMIZER, STATE} <= manifest.keys()
        or not {WEIGHTS, ADAPTER_WEIGHTS} & manifest.keys()
    ):
        return f"{MANIFEST} does not list every file of a checkpoint"
    for name, entry in manifest.items():
        if not isinstance(entry, dict) or name.startswith("/") or ".." in Path(name).parts:
            return f"{MANIFEST} has an entry that is no file of this folder"
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.get("bytes"):
            return f"{name} has {path.stat().st_size} bytes, not {entry.get('bytes')}"
        if sha256_of(path) != entry.get("sha256"):
            return f"{name} differs from its sha256"
    return None


def find_latest(checkpoints: Path) -> tuple[Path | None, dict[Path, str]]:
    """Find the newest checkpoint that verifies.

    Returns:
        Its folder, or None; and each newer one that was passed over with a line that says why.
    """
    skipped: dict[Path, str] = {}
    for folder in sorted(list_checkpoints(checkpoints), reverse=True, key=_step_of):
        reason = verify(folder)
        if reason is None:
            return folder, skipped
        skipped[folder] = f"{folder}: {reason}"
    return None, skipped


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """List the checkpoint folders, whole or not, in no order."""
    if not checkpoints.is_dir():
        return []
    return [path for path in checkpoints.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]


def remove_leftovers(checkpoints: Path) -> None:
    """Delete half-written checkpoints of a killed process; call it only while holding the run's
    lock.
    """
    if checkpoints.is_dir():
        for path in checkpoints.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)
        (checkpoints / f".{INDEX}").unlink(missing_ok=True)


def _rotate(
    checkpoints: Path, step: int, keep: int, damaged: Collection[Path], best: int | None
) -> None:
    # What does not verify must not push out what does. A later one is of that kind, too, or this
    # run would have begun there.
    whole = [
        folder
        for folder in list_checkpoints(checkpoints)
        if _step_of(folder) <= step and (folder not in damaged or _step_of(folder) == step)
    ]
    gone = [folder for folder in damaged if _step_of(folder) != step]
    old = [f for f in sorted(whole, key=_step_of)[:-keep] if _step_of(f) != best]
    for folder in (*gone, *old):
        shutil.rmtree(folder, ignore_errors=True)


def _step_of(folder: Path) -> int:
    match = NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])
