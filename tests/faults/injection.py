"""Faults at a chosen operation of a writer: the process is killed, the power fails, the disk is full.

`run` forks, so that the fault ends the child alone, and counts every operation by which Python
changes a disk: opening for writing, writing, flushing, making and renaming and removing. The fault
strikes at the k-th; a write is done by half first. A series over k = 1, 2, 3 … ends where the work
ends before the fault comes.

Losing power is more than being killed, and comes after the last operation too: files written since
their last fsync are emptied, but for those that were only appended to: they go back to the length
that they had then. A disk may keep the names of the day or lose them as well: then renames whose
folder was not flushed since are undone.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cs336_alignment.errors import UserError

FAULTS = ("kill", "power", "power and names", "full")
KILLED = 137
MOST_OPERATIONS = 2000  # of one piece of work: a series that goes on for ever is a mistake


@dataclass(frozen=True)
class Outcome:
    """How the child ended.

    Attributes:
        reached: whether the fault struck.
        error: a UserError that the work raised, as (code, status, text).
        failure: the traceback of anything else that it raised.
    """

    reached: bool
    error: tuple[str, int, str] | None = None
    failure: str | None = None


def series(work: Callable[[], object], fault: str) -> Iterator[tuple[int, Outcome]]:
    """Run the work again and again, with the fault one operation later each time, until it ends
    without; the caller puts the disk right between two runs. The last outcome is not `reached`.
    """
    for k in range(1, MOST_OPERATIONS):
        outcome = run(work, fault, k)
        yield k, outcome
        if not outcome.reached:
            return
    raise AssertionError(f"{MOST_OPERATIONS} operations and no end")


def run(work: Callable[[], object], fault: str, k: int) -> Outcome:
    """Run the work in a child and let the fault strike at its k-th operation."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        disk = _Disk(fault, k)
        error = failure = None
        try:
            disk.install()
            work()
            if disk.count + 1 == k and fault.startswith("power"):
                disk.operation(creates=True)
        except UserError as raised:
            error = (raised.code, int(raised.status), str(raised))
        except BaseException:
            failure = traceback.format_exc()
        os.write(writer, pickle.dumps(Outcome(disk.struck, error, failure)))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == KILLED:
        return Outcome(reached=True)
    assert status == 0, f"the child ended with {status}"
    outcome: Outcome = pickle.loads(said)
    return outcome


@dataclass
class _Disk:
    fault: str
    strike_at: int
    count: int = 0
    struck: bool = False
    dirty: set[str] = field(default_factory=set)  # written since the last fsync
    lengths: dict[str, int] = field(default_factory=dict)  # of files at their last fsync
    renames: list[tuple[str, str, bytes | None]] = field(default_factory=list)  # not yet flushed

    def install(self) -> None:
        """Put every operation of this process under count."""
        open_as_before = io.open

        def open_counted(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return open_as_before(file, mode, *args, **options)
            self.operation(creates=True)
            if "a" not in mode:  # what was there may be written over
                self.lengths.pop(os.path.abspath(file), None)
            raw = _CountedFile(file, mode.replace("b", "").replace("t", ""))
            raw.disk = self
            if 0 in (*args[:1], options.get("buffering")):  # a line of metrics is one write
                return raw
            buffered = io.BufferedWriter(raw)
            if "b" in mode:
                return buffered
            return io.TextIOWrapper(buffered, encoding=options.get("encoding") or "utf-8")

        builtins.open = io.open = open_counted  # type: ignore[assignment]
        for name, creates in (
            ("mkdir", True),
            ("unlink", False),
            ("remove", False),
            ("rmdir", False),
        ):
            setattr(os, name, self._counted(getattr(os, name), creates))
        for name in ("rename", "replace"):
            setattr(os, name, self._counted_rename(getattr(os, name)))
        fsync = os.fsync

        def fsync_counted(descriptor: int) -> None:
            self.operation(creates=True)
            fsync(descriptor)
            self.flushed(os.readlink(f"/proc/self/fd/{descriptor}"))

        os.fsync = fsync_counted  # type: ignore[assignment]

    def _counted(self, function: Any, creates: bool) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            # Making a folder that is there fails without touching the disk, full or not.
            if not (creates and os.path.isdir(args[0])):
                self.operation(creates=creates)
            return function(*args, **options)

        return counted

    def _counted_rename(self, function: Any) -> Any:
        def counted(source: Any, target: Any, **options: Any) -> None:
            self.operation(creates=True)
            before, after = os.path.abspath(source), os.path.abspath(target)
            old = None
            if os.path.isfile(after):
                with io.FileIO(after) as file:
                    old = file.readall()
            function(source, target, **options)
            moved = {path for path in self.dirty if path == before or path.startswith(before + "/")}
            self.dirty -= moved
            self.dirty |= {after + path[len(before) :] for path in moved}
            self.lengths.pop(after, None)
            for path in [p for p in self.lengths if p == before or p.startswith(before + "/")]:
                self.lengths[after + path[len(before) :]] = self.lengths.pop(path)
            self.renames.append((before, after, old))

        return counted

    def flushed(self, path: str) -> None:
        """What this file or folder holds will be there after a loss of power."""
        self.dirty.discard(path)
        if os.path.isfile(path):
            self.lengths[path] = os.path.getsize(path)
        self.renames = [r for r in self.renames if os.path.dirname(r[1]) != path]

    def operation(self, *, creates: bool, half: Callable[[], object] = lambda: None) -> None:
        """Count an operation that is about to be done; `half` does a part of it."""
        if self.fault == "full" and not creates:
            return  # removing needs no room
        self.count += 1
        if self.count < self.strike_at or (self.struck and self.fault == "full"):
            return
        self.struck = True
        half()
        if self.fault == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.fault.startswith("power"):
            self.lose(names=self.fault != "power")
        os._exit(KILLED)

    def lose(self, *, names: bool) -> None:
        """Take away what no flush has brought to the disk, renames too if asked to."""
        for path in self.dirty:
            if os.path.exists(path):
                os.truncate(path, min(self.lengths.get(path, 0), os.path.getsize(path)))
        for before, after, old in reversed(self.renames if names else []):
            if not os.path.exists(after) or not os.path.isdir(os.path.dirname(before)):
                continue
            _RENAME(after, before)
            if old is not None:
                with io.FileIO(after, "w") as file:
                    file.write(old)


_RENAME = os.rename


class _CountedFile(io.FileIO):
    disk: _Disk

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.disk.operation(
            creates=True, half=lambda: io.FileIO.write(self, view[: len(view) // 2])
        )
        self.disk.dirty.add(os.path.abspath(os.fsdecode(self.name)))
        return io.FileIO.write(self, view)


def folder_names(folder: Path) -> list[str]:
    """List a folder, sorted; [] if there is none."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
