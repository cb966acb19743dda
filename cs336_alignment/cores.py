"""What this process may use of the machine: its cores, and memory that it asked for once."""

from __future__ import annotations

import ctypes
import os

# Parameters of glibc's mallopt(3), from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_GROW_BY = 64 * 2**20  # bytes


def count_cores() -> int:
    """Count the cores that the system lets this process run on."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Let glibc's allocator keep what is freed instead of handing it back to the system.

    As it comes, each tensor of some MiB is mapped anew and the system zeroes its pages again at
    every use, which costs a training step several percent (docs/performance.md, Memory). The peak
    stays, since every step asks for the same again.

    Returns:
        Whether it took effect. Another system or C library has no such setting, and whoever set
        glibc's own variables (`MALLOC_…`, `GLIBC_TUNABLES`) has chosen already.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option is None:
        return False
    # A threshold of -1 is never reached; without maps, everything comes from heaps that are kept.
    options = ((_TRIM_THRESHOLD, -1), (_TOP_PAD, _GROW_BY), (_MMAP_MAX, 0))
    return all(set_option(option, value) for option, value in options)
