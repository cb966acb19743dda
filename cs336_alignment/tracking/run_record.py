"""What a run's folder holds, read as it stands: complete, still training, or failed early."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cs336_alignment.tracking.metrics import read_metrics
from cs336_alignment.tracking.run_clock import RUN_SECONDS

CONFIG = "config.yaml"
STATUS = "status.json"
MANIFEST = "manifest.json"
LEDGER = "data_ledger.json"
METRICS = "metrics.jsonl"
GENERATIONS = "generations"


@dataclass(frozen=True)
class RunRecord:
    """A run's own files; what is missing is empty.

    Attributes:
        folder: of the run.
        status: `status.json`.
        config: `config.yaml`, flattened to `section.key`.
        manifest: `manifest.json`.
        ledger: `data_ledger.json`.
        rows: of `metrics.jsonl`.
        troubles: a line for each file that is there and cannot be read.
    """

    folder: Path
    status: Mapping[str, Any]
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    ledger: Mapping[str, Any]
    rows: list[dict[str, Any]]
    troubles: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The run's name: that of its folder."""
        return self.folder.resolve().name


def is_run(folder: Path) -> bool:
    """Tell whether a folder holds a run, even one that failed before its first step."""
    return any((folder / name).is_file() for name in (CONFIG, STATUS, METRICS))


def read_run(folder: Path) -> RunRecord:
    """Read a run. Nothing is locked or written, and a process may be training in the folder."""
    troubles: list[str] = []

    def read(name: str, parse: Callable[[Path], Any], nothing: Any) -> Any:
        path = folder / name
        try:
            return parse(path)
        except FileNotFoundError:
            return nothing
        except (OSError, ValueError, TypeError, yaml.YAMLError) as failure:
            troubles.append(f"{name} cannot be read: {failure}")
            return nothing

    return RunRecord(
        folder,
        read(STATUS, _read_json, {}),
        dict(_flatten(read(CONFIG, _read_yaml, {}))),
        read(MANIFEST, _read_json, {}),
        read(LEDGER, _read_json, {}),
        read(METRICS, read_metrics, []),
        tuple(troubles),
    )


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _read_yaml(path: Path) -> dict[str, Any]:
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("it holds no config")
    return value


def _flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        items += _flatten(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return items


def running_seconds(rows: list[dict[str, Any]]) -> float | None:
    """Give how long a run took, all its parts together; None if it logged nothing.

    Evaluations note the time of all parts; where there is none, it is the time from the first line
    to the last, with the first step's own.
    """
    if not rows:
        return None
    for row in reversed(rows):
        if row.get(RUN_SECONDS) is not None:
            return float(row[RUN_SECONDS] + rows[-1]["time"] - row["time"])
    return float(rows[-1]["time"] - rows[0]["time"] + (rows[0].get("perf/step_seconds") or 0.0))
