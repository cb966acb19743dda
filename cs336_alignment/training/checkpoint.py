"""Checkpoints: written whole or not at all, verified by sha256 before they are believed.

A checkpoint is a directory `step-000100`: weights under their Hugging Face names, configuration and
tokenizer (so it loads as a model folder), the optimizer's state, the trainer's state, and
`manifest.json`, written last. Of a model with adapters it holds these alone and loads as an
adapter's folder. It is assembled in a temporary directory, flushed to disk and renamed
in one operation. Where several processes hold a part of the weights each, each writes its own into
`sharded/`, in place of the two large files.
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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.files import (
    flush_folder,
    flush_tree,
    free_mib,
    sha256_of,
    system_error,
    write_json,
)
from cs336_alignment.model.adapter_files import ADAPTER_WEIGHTS, refuse_another_base
from cs336_alignment.model.adapters import adapter_tensors, base_tensors, is_adapted
from cs336_alignment.training.optimizer import allocate_state
from cs336_alignment.training.safetensors_file import write_safetensors
from cs336_alignment.training.shards import Part, Pieces, part_of, write_parts

if TYPE_CHECKING:  # it imports what loads sharded weights
    from cs336_alignment.training.parallel import Processes

MANIFEST = "manifest.json"
INDEX = "index.json"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
SHARDED = "sharded"
SHARD = re.compile(rf"{SHARDED}/(?:model|optimizer)-\d{{5}}-of-(\d{{5}})\.safetensors")
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
    return adapter_tensors(module) if is_adapted(module) else base_tensors(module)


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
    if isinstance(value, DTensor) or not hasattr(value, "__tensor_flatten__"):
        yield "", value
        return
    for part in value.__tensor_flatten__()[0]:
        yield f".{part}", getattr(value, part)


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds of the training itself.

    Attributes:
        state: of the run, its own copy.
        weights: parameter or buffer name → tensor; of a sharded one the rows of this process.
        moments: the optimizer's, see `optimizer_tensors`.
        starts: the first row of what is a part, by the name of either; 0 where none is given.
        weights_file: where the weights go.
    """

    state: TrainState
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    starts: Mapping[str, int] = field(default_factory=dict)
    weights_file: str = WEIGHTS

    @staticmethod
    def of(
        state: TrainState, module: nn.Module, optimizer: torch.optim.Optimizer, index: int = 0
    ) -> Snapshot:
        """Look at the tensors where they are: right only as long as nothing trains on. Those that
        all processes hold are the main process's to keep; `index` says which this is.
        """
        parts: list[dict[str, Part]] = []
        for tensors in (module_tensors(module), optimizer_tensors(module, optimizer)):
            of_each = {name: part_of(tensor) for name, tensor in tensors.items()}
            # What is whole has all its rows: of others' parts this process has fewer, or none.
            parts.append({
                name: part for name, part in of_each.items()
                if index == 0 or (part.rows.numel() and part.start)
            })  # fmt: skip
        weights, moments = ({name: part.rows for name, part in held.items()} for held in parts)
        starts = {name: part.start for held in parts for name, part in held.items()}
        return Snapshot(copy.deepcopy(state), weights, moments, starts, _weights_file(module))

    def copied(self, into: Snapshot | None) -> Snapshot:
        """Copy the tensors into this machine's memory: into those of an earlier copy if given."""
        old = Snapshot(self.state, {}, {}) if into is None else into
        return Snapshot(
            self.state, _copied(self.weights, old.weights), _copied(self.moments, old.moments),
            self.starts, self.weights_file,
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
    moments = Pieces(_files(folder, OPTIMIZER))
    if moments.shapes:
        allocate_state(optimizer)
    places = optimizer_tensors(module, optimizer)
    if moments.shapes != {name: tuple(place.shape) for name, place in places.items()}:
        raise UserError(
            "R205",
            f"{folder} holds the state of another optimizer",
            ExitStatus.IO,
            hint="give another run_name",
        )
    for name, place in places.items():
        moments.read(name, part_of(place))
    return state


def restore_weights(folder: Path, module: nn.Module) -> TrainState:
    """Load the weights alone of a verified checkpoint into a module, in place.

    Raises:
        UserError: names or shapes are not those of this module (74), or its adapters were trained
            on another base model (78).
    """
    weights, own = Pieces(_files(folder, _weights_file(module))), module_tensors(module)
    if weights.shapes != {name: tuple(tensor.shape) for name, tensor in own.items()}:
        raise UserError(
            "R205",
            f"{folder} holds weights of another model",
            ExitStatus.IO,
            hint="give another run_name, or the model the run was started with",
        )
    if is_adapted(module):
        refuse_another_base(folder, module)
    for name, tensor in own.items():
        weights.read(name, part_of(tensor))
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return TrainState(**state["progress"])


def _files(folder: Path, name: str) -> list[Path]:
    """Name the files of a checkpoint that hold what an unsharded one holds in one."""
    whole, kind = folder / name, "optimizer" if name == OPTIMIZER else "model"
    shards = (folder / SHARDED).glob(f"{kind}-*.safetensors")
    return [whole] if whole.is_file() else sorted(shards)


def save_checkpoint(
    checkpoints: Path,
    snapshot: Snapshot,
    *,
    extra: Mapping[str, Any],
    save_sidecars: Callable[[Path], None],
    keep: int,
    damaged: Collection[Path] = (),
    best: int | None = None,
    team: Processes | None = None,
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
        team: processes that each hold a part of it, all of which call this; None: this one has all.

    Raises:
        UserError: the disk is full or failing (74); the checkpoints before this one are intact.
    """
    final = folder_of(checkpoints, snapshot.state.step)
    number = os.getpid() if team is None else team.agree(os.getpid())
    temporary = checkpoints / f"{TEMPORARY}{final.name}-{number}"
    replaced = checkpoints / f"{TEMPORARY}old-{final.name}-{number}"
    needed = snapshot.bytes if team is None else sum(team.gather(snapshot.bytes))
    manifest: dict[str, dict[str, int | str]] = {}

    def begin() -> None:
        temporary.mkdir(parents=True)
        if free_mib(checkpoints) * 2**20 < needed:  # before a slow disk finds out
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_sidecars(temporary)
        if team is not None:
            (temporary / SHARDED).mkdir()

    def finish() -> None:
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

    try:
        if team is None:
            begin()
            files = {snapshot.weights_file: snapshot.weights, OPTIMIZER: snapshot.moments}
            for name, tensors in files.items():
                manifest[name] = write_safetensors(temporary / name, tensors)
            finish()
        else:
            _write_together(temporary, snapshot, manifest, begin, finish, team)
    except Exception as failure:
        if team is None or team.is_main:
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
            expected=f"{needed / 2**20:,.1f} MiB"
            + ("" if team is None else f", in a folder that all {team.count} processes write to"),
            got=f"{free_mib(checkpoints.parent):,.1f} MiB free",
            hint="make room and run the same command again; "
            "the checkpoints before this one are intact",
        ) from failure
    return final


def _write_together(
    temporary: Path,
    snapshot: Snapshot,
    manifest: dict[str, dict[str, int | str]],
    begin: Callable[[], None],
    finish: Callable[[], None],
    team: Processes,
) -> None:
    """Write a checkpoint of which each process holds a part; all learn of any failure."""
    own: dict[str, dict[str, int | str]] = {}

    def write() -> None:
        for kind, tensors in ("model", snapshot.weights), ("optimizer", snapshot.moments):
            name = f"{SHARDED}/{kind}-{team.index + 1:05d}-of-{team.count:05d}.safetensors"
            own[name] = write_parts(temporary / name, tensors, snapshot.starts)
            with (temporary / name).open("rb") as file:  # on the disk of the machine that wrote it
                os.fsync(file.fileno())

    team.on_main(begin)
    team.on_each(write)
    for files in team.gather(own):
        manifest.update(files)
    team.on_main(finish)


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
    if not isinstance(manifest, dict) or not _is_complete(manifest):
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


def _is_complete(names: Collection[str]) -> bool:
    shards = [found for name in names if (found := SHARD.fullmatch(name))]
    if shards:
        return STATE in names and len(shards) == 2 * int(shards[0][1])
    return {OPTIMIZER, STATE} <= set(names) and bool({WEIGHTS, ADAPTER_WEIGHTS} & set(names))


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
