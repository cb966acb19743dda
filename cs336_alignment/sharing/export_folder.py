"""The folder of an export: it appears whole, says what it was made of, and is not written over."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cs336_alignment.errors import UserError
from cs336_alignment.files import replacing_folder, sha256_of, write_json
from cs336_alignment.tracking.console import Console
from cs336_alignment.training.export import telling_full_disk

NOTE = "export.json"


@contextmanager
def making(target: Path, made_of: dict[str, Any], console: Console) -> Iterator[Path | None]:
    """Give the folder to fill, which takes its name when the block ends well.

    Args:
        target: its name.
        made_of: all that decides what comes out. It is kept in `export.json`, with what the block
            adds to it and with the sha256 of every file but the card, which people may edit.
        console: is told what is found.

    Yields:
        The folder; None: the target is there, whole, and made of the same.

    Raises:
        UserError: the target is something else, or another export is at work beside it (73); the
            disk refuses (74).
    """
    wanted = json.loads(json.dumps(made_of))
    with telling_full_disk(target), _alone(target.parent):
        if target.exists():
            found = read_json(target / NOTE)
            if any(found.get(key) != value for key, value in wanted.items()):
                raise UserError(
                    "R360",
                    f"{target} is there, and is something else",
                    hint="remove it, or choose another place: export.output_dir=…",
                )
            if (reason := _damage(target, found.get("files", {}))) is None:
                console.note(f"export   {target} is there and whole: nothing to do")
                yield None
                return
            console.warn(f"{target} is damaged ({reason}) and made anew")
        with replacing_folder(target) as folder:
            yield folder
            files = {
                path.relative_to(folder).as_posix(): [path.stat().st_size, sha256_of(path)]
                for path in sorted(folder.rglob("*"))
                if path.is_file() and path.name != "README.md"
            }
            write_json(folder / NOTE, {**made_of, "files": files})


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a folder; {} if there is none that can be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _damage(folder: Path, files: Mapping[str, Any]) -> str | None:
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or sha256_of(path) != digest:
            return f"{name} is missing or differs from its sha256"
    return None if files else f"{NOTE} lists no file"


@contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """Hold a folder against other exports into it."""
    parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as failure:
            raise UserError(
                "R102",
                f"another export is writing into {parent}",
                hint="wait for it and run the same command again",
            ) from failure
        yield
    finally:
        os.close(descriptor)
