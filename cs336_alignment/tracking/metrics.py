"""`metrics.jsonl`: the run's own record of its numbers. wandb is a view of it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cs336_alignment.files import replacing


class MetricsFile:
    """Appends one JSON object a line: `step`, `time` in Unix seconds, and the metrics.

    Floats are written so that they read back bit for bit; NaN and infinities, which JSON does not
    have, become null.

    Args:
        path: of the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Unbuffered: one line is one write, so a kill leaves at most one torn line, the last.
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step."""
        row = {"step": step, "time": time.time(), **{k: _finite(v) for k, v in metrics.items()}}
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        # A full disk takes a part of the line without an error; the write of the rest raises it.
        while line:
            line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Bring what was written to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps and a torn last line; kept lines stay byte for byte."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if (row := _parse(line)) is not None and row["step"] <= step]
        if len(kept) == len(lines):
            return
        with replacing(self.path) as file:
            file.writelines(kept)
        self._file.close()
        self._file = self.path.open("ab", buffering=0)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file; a torn last line is left out.

    Raises:
        ValueError: another line is not a JSON object with a step.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    rows = [_parse(line) for line in lines]
    if rows and rows[-1] is None:
        rows.pop()
    if None in rows:
        raise ValueError(f"{path}:{rows.index(None) + 1} is not a line of metrics")
    return [row for row in rows if row is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _finite(value: float) -> float | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
