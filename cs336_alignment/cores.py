"""How many cores this process may use."""

from __future__ import annotations

import os


def count_cores() -> int:
    """Count the cores that the system lets this process run on."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(allowed(0)) if allowed else os.cpu_count() or 1
