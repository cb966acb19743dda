"""The support matrix on two real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT, Sft
from tests.options import support

pytestmark = pytest.mark.distributed


def test_every_row_trains_the_same_on_two_processes(sft: Sft, tmp_path: Path) -> None:
    result = tmp_path / "errors.json"
    worker = ROOT / "tests" / "distributed" / "worker_options.py"
    done = sft(str(worker), str(result), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(result.read_text())
    assert report["world"] == 2
    for row in support():
        assert row.cells["processes"] == "yes"
        found = report["errors"][row.name]
        layouts = 3 - (row.cells["flat_shared_prefix"] == "no")
        assert len(found) == layouts * (1 + (row.cells["fsdp2"] == "yes"))
        for batching, error in found.items():
            # Muon iterates in bfloat16
            limit = 1e-2 if "optimizer=muon" in row.overrides else 1e-11
            assert error <= limit, (row.name, batching, error)
