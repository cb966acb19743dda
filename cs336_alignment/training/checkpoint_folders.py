"""The folders of checkpoints: their files' names, which of them are whole, and which may go.

A checkpoint is whole if every file is as its manifest says, which is written last.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from cs336_alignment.files import flush_tree, sha256_of, write_json
from cs336_alignment.model.adapter_files import ADAPTER_WEIGHTS

MANIFEST = "manifest.json"
INDEX = "index.json"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
SHARDED = "sharded"
SHARD = re.compile(rf"{SHARDED}/(?:model|optimizer)-\d{{5}}-of-(\d{{5}})\.safetensors")
STATE = "trainer_state.json"
NAME = re.compile(r"step-(\d{6,})")
TEMPORARY = ".tmp-"


def folder_of(checkpoints: Path, step: int) -> Path:
    """Give the folder of a step's checkpoint, which need not be there."""
    return checkpoints / f"step-{step:06d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """List the checkpoint folders, whole or not, in no order."""
    if not checkpoints.is_dir():
        return []
    return [path for path in checkpoints.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]


def saved_steps(checkpoints: Path) -> set[int]:
    """Give the steps that have a checkpoint, whole or not."""
    return {_step_of(folder) for folder in list_checkpoints(checkpoints)}


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


def seal(folder: Path, manifest: dict[str, dict[str, int | str]]) -> None:
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


def mark_latest(
    checkpoints: Path, latest: int, *, best: int | None, keep: int, damaged: Collection[Path] = ()
) -> None:
    """Name the latest and the best checkpoint in the index, and delete the oldest beyond `keep`.

    Args:
        checkpoints: the run's folder of checkpoints.
        latest: the newest step that has a checkpoint; later ones are left alone.
        best: the step whose checkpoint stays, whatever its age; None: there is none.
        keep: newest checkpoints that stay besides.
        damaged: checkpoints that do not count and go.
    """
    name = None if best is None else folder_of(checkpoints, best).name
    index = {"latest": folder_of(checkpoints, latest).name, "best": name}
    write_json(checkpoints / INDEX, index)
    # What does not verify must not push out what does. A later one is of that kind, too, or this
    # run would have begun there.
    whole = [
        folder
        for folder in list_checkpoints(checkpoints)
        if _step_of(folder) <= latest and (folder not in damaged or _step_of(folder) == latest)
    ]
    gone = [folder for folder in damaged if _step_of(folder) != latest]
    old = [f for f in sorted(whole, key=_step_of)[:-keep] if _step_of(f) != best]
    for folder in (*gone, *old):
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(checkpoints: Path) -> None:
    """Delete half-written checkpoints of a killed process; call it only while holding the run's
    lock.
    """
    for path in checkpoints.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
    (checkpoints / f".{INDEX}").unlink(missing_ok=True)


def _step_of(folder: Path) -> int:
    match = NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])
