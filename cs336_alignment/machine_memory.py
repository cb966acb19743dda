"""The memory of this machine: how much there is, what this process may have of it, and has had."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Where version 2 and version 1 of Linux's control groups tell, below /sys/fs/cgroup: the limit,
# what is in use, and in memory.stat what of that are pages of files that the system can drop.
_GROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        total: that this process could have if no other ran, swap included.
        free: that it can have now without swapping.
    """

    total: int
    free: int

    def share(self, count: int) -> Memory:
        """Divide it among so many processes."""
        return Memory(self.total // count, self.free // count)


def found_memory(root: Path = Path("/")) -> Memory | None:
    """Read how much memory there is for this process: the machine's, or less if a control group
    (of a container, or a batch system) limits it.

    Args:
        root: of the file system.

    Returns:
        None where the system does not tell.
    """
    lines = re.findall(r"^(\w+):\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    kib = {name: int(number) for name, number in lines}
    if "MemTotal" not in kib:
        return None
    total, free = kib["MemTotal"] * 2**10, kib.get("MemAvailable", kib["MemFree"]) * 2**10
    for limit, used in _limits(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return Memory(total + kib.get("SwapTotal", 0) * 2**10, free)


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use of each control group that this process is in, those around it too."""
    places: dict[str, str] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, place = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            places["memory" if controllers else ""] = place.strip("/")
    for mount, limit_name, used_name, dropped_name in _GROUPS:
        top = root / "sys/fs/cgroup" / mount
        folder = top / places.get(mount, "")
        for group in (folder, *folder.parents):
            # "max" is no limit. Within a container the outer part of the path is not to be seen.
            with suppress(ValueError):
                limit, used = int(_read(group / limit_name)), int(_read(group / used_name))
                found = re.search(rf"^{dropped_name} (\d+)$", _read(group / "memory.stat"), re.M)
                yield limit, used - (int(found[1]) if found else 0)
            if group == top:
                break


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def resident_memory() -> int:
    """Give the bytes of this process that lie in memory now; 0 where the system does not tell."""
    return _of_status("VmRSS")


def reserved_memory() -> int:
    """Give the bytes of private memory that this process asked for, used or not: what counts for
    RLIMIT_DATA; 0 where the system does not tell.
    """
    return _of_status("VmData")


def peak_resident_memory() -> int:
    """Give the most that `resident_memory` has been, since `forget_peak`."""
    # Not ru_maxrss if that can be helped: it begins with what the parent had at the fork.
    if peak := _of_status("VmHWM"):
        return peak
    import resource  # not on every platform

    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts in bytes, others in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> bool:
    """Let the peak begin anew, from what is resident now; returns whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _of_status(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB", _read(Path("/proc/self/status")), re.MULTILINE)
    return int(found[1]) * 2**10 if found else 0
