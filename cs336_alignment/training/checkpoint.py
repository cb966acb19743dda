"""Checkpoints: written whole or not at all, and read into a module and its optimizer.

A checkpoint is a directory `step-000100`: weights under their Hugging Face names, configuration and
tokenizer (so it loads as a model folder), the optimizer's state, the trainer's state, and
`manifest.json`, written last. Of a model with adapters it holds these alone and loads as an
adapter's folder. It is assembled in a temporary directory, flushed to disk and renamed
in one operation. Where several processes hold a part of the weights each, each writes its own into
`sharded/`, in place of the two large files.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cs336_alignment.errors import UserError
from cs336_alignment.files import flush_folder, free_mib, system_error, write_json
from cs336_alignment.model.adapter_files import refuse_another_base
from cs336_alignment.model.adapters import is_adapted
from cs336_alignment.training.checkpoint_folders import (
    OPTIMIZER,
    SHARDED,
    STATE,
    TEMPORARY,
    folder_of,
    mark_latest,
    seal,
)
from cs336_alignment.training.optimizer import allocate_state
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.safetensors_file import write_safetensors
from cs336_alignment.training.shards import Pieces, part_of, write_parts
from cs336_alignment.training.snapshot import (
    Snapshot,
    TrainState,
    module_tensors,
    optimizer_tensors,
    weights_file,
)


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
    what = f"{folder} holds the state of another optimizer"
    _refuse_other_shapes(moments, places, what, "give another run_name")
    for name, place in places.items():
        moments.read(name, part_of(place))
    return state


def restore_weights(folder: Path, module: nn.Module) -> TrainState:
    """Load the weights alone of a verified checkpoint into a module, in place.

    Raises:
        UserError: names or shapes are not those of this module (74), or its adapters were trained
            on another base model (78).
    """
    weights, own = Pieces(_files(folder, weights_file(module))), module_tensors(module)
    hint = "give another run_name, or the model the run was started with"
    _refuse_other_shapes(weights, own, f"{folder} holds weights of another model", hint)
    if is_adapted(module):
        refuse_another_base(folder, module)
    for name, tensor in own.items():
        weights.read(name, part_of(tensor))
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return TrainState(**state["progress"])


def _refuse_other_shapes(
    pieces: Pieces, places: Mapping[str, Tensor], what: str, hint: str
) -> None:
    if pieces.shapes != {name: tuple(place.shape) for name, place in places.items()}:
        raise UserError("R205", what, hint=hint)


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
        seal(temporary, manifest)
        if final.is_dir():  # the run began before it: it was damaged, or could not be read
            final.rename(replaced)
        temporary.rename(final)
        flush_folder(checkpoints)
        flush_folder(checkpoints.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        latest = snapshot.state.step
        mark_latest(checkpoints, latest, best=best, keep=keep, damaged=damaged)

    try:
        if team is None:
            begin()
            files = {snapshot.weights_file: snapshot.weights, OPTIMIZER: snapshot.moments}
            for name, tensors in files.items():
                manifest[name] = write_safetensors(temporary / name, tensors)
            finish()
        else:
            team.on_main(begin)
            own = team.on_each(lambda: _write_own(temporary, snapshot, team))
            for files in team.gather(own):
                manifest.update(files)
            team.on_main(finish)
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
            expected=f"{needed / 2**20:,.1f} MiB"
            + ("" if team is None else f", in a folder that all {team.count} processes write to"),
            got=f"{free_mib(checkpoints.parent):,.1f} MiB free",
            hint="make room and run the same command again; "
            "the checkpoints before this one are intact",
        ) from failure
    return final


def _write_own(
    folder: Path, snapshot: Snapshot, team: Processes
) -> dict[str, dict[str, int | str]]:
    """Write what this process holds of a checkpoint; gives size and hash of each file by name."""
    own = {}
    for kind, tensors in ("model", snapshot.weights), ("optimizer", snapshot.moments):
        name = f"{SHARDED}/{kind}-{team.index + 1:05d}-of-{team.count:05d}.safetensors"
        own[name] = write_parts(folder / name, tensors, snapshot.starts)
        with (folder / name).open("rb") as file:  # on the disk of the machine that wrote it
            os.fsync(file.fileno())
    return own
