"""`metrics.jsonl` loses no digit, survives a kill, and is cut back exactly for a resumed run."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest

from cs336_alignment.tracking import metrics as module
from cs336_alignment.tracking.metrics import MetricsFile, read_metrics


def test_floats_read_back_bit_for_bit(tmp_path: Path) -> None:
    values = [
        0.1,
        1 / 3,
        1e-300,
        5e-324,
        -0.0,
        2.0**53 + 2,
        struct.unpack("f", b"\x01\x02\x03\x3f")[0],
    ]
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step, value in enumerate(values):
        file.write(step, {"train/loss": value})
    file.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(len(values)))
    assert [row["train/loss"].hex() for row in rows] == [value.hex() for value in values]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_lacks_becomes_null(tmp_path: Path, value: float) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(1, {"train/loss": value, "train/num_tokens": 7})
    file.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row["train/loss"] is None
    assert row["train/num_tokens"] == 7


def test_each_line_is_in_the_file_at_once_and_bears_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "time", lambda: 1234.5)
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(3, {"eval/loss": 2.5})
    # Read before any sync or close: a kill here would keep the line.
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 3, "time": 1234.5, "eval/loss": 2.5}\n'
    file.close()


def test_a_torn_last_line_is_left_out_and_then_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "time": 1.0}\n{"step": 2, "ti')
    assert [row["step"] for row in read_metrics(path)] == [1]
    file = MetricsFile(path)
    file.truncate_after(5)
    file.write(2, {"train/loss": 1.0})
    file.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 "):
        read_metrics(path)


def test_truncation_keeps_the_bytes_of_kept_lines_and_appends_after_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    # Spacing that json.dumps would not write shows whether lines are copied or written anew.
    kept = b'{"step":1,  "time": 1.50, "x": 1e0}\n{"time": 2, "step": 2}\n{"step": 2, "y": 1}\n'
    path.write_bytes(kept + b'{"step": 3, "time": 3}\n{"step": 4, "time": 4}\n')
    file = MetricsFile(path)
    file.truncate_after(2)
    assert path.read_bytes() == kept
    file.write(3, {})
    file.close()
    assert path.read_bytes().startswith(kept)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 2, 3]
    assert [child.name for child in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_begins_anew_drops_every_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "time": 1.0}\n')
    file = MetricsFile(path)
    file.truncate_after(-1)
    file.close()
    assert path.read_bytes() == b""


def test_a_kill_amid_truncation_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    old = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(old)
    file = MetricsFile(path)

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        file.truncate_after(1)
    assert path.read_bytes() == old


def test_a_line_that_the_disk_takes_in_pieces_is_written_whole(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    whole = file._file

    class Pieces:
        def write(self, data: bytes) -> int:
            return whole.write(data[:5])

    file._file = Pieces()  # type: ignore[assignment]
    file.write(1, {"train/loss": 0.25})
    whole.close()
    assert [row["train/loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0.25]
