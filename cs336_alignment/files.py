"""Files that readers see whole or not at all, and the system's words when a disk refuses."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cs336_alignment.errors import UserError

OS_ERROR = re.compile(r"\(os error (\d+)\)")
READ_BYTES = 2**22


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of `path` at once, on the disk, when the block ends well.

    Raises:
        OSError: the disk refuses; the old file is then still there, and nothing else.
    """
    temporary = path.with_name(f".{path.name}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        flush_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Make a folder that takes the place of another at once, on the disk, when the block ends well.

    The names are those that the next attempt uses again, so that a kill leaves nothing for ever.

    Raises:
        OSError: the disk refuses; the old folder is then still there, and nothing else.
    """
    temporary = folder.with_name(f".{folder.name}.new")
    old = folder.with_name(f".{folder.name}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        flush_tree(temporary)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
        flush_folder(folder.parent)  # the new one is there for good before the old one goes
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a text file."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sha256_of(path: Path) -> str:
    """Hash a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def flush_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk: the names, not what the files hold."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> list[Path]:
    """Bring all files of a folder to the disk and give their paths."""
    paths = sorted(folder.rglob("*"))
    for path in paths:
        if path.is_dir():
            flush_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    return [path for path in paths if not path.is_dir()]


def free_mib(folder: Path) -> float:
    """Give the room on a folder's disk in MiB; 0 if the folder is gone."""
    try:
        return shutil.disk_usage(folder).free / 2**20
    except OSError:
        return 0.0


def system_error(failure: Exception) -> str | None:
    """Give the system's words if a failure comes from it, else None.

    The writers of tokenizers and safetensors are Rust's and raise no OSError.

    Example:
        >>> system_error(Exception("No space left on device (os error 28)"))
        'No space left on device'
    """
    if isinstance(failure, OSError):
        return failure.strerror or str(failure)
    found = OS_ERROR.search(str(failure))
    return None if found is None else os.strerror(int(found[1]))


@contextmanager
def telling(code: str, what: str, hint: str) -> Iterator[None]:
    """Make a UserError of what the system refuses within a block: `what`, and its words."""
    try:
        yield
    except Exception as failure:
        if isinstance(failure, UserError) or (reason := system_error(failure)) is None:
            raise
        raise UserError(code, f"{what}: {reason}", hint=hint) from failure
