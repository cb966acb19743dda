"""Rows come out of their source unchanged and with their place; what cannot be read is named."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from cs336_alignment.data.sources import SourceRead, read_source
from cs336_alignment.errors import ExitStatus, UserError

GOOD = b'{"prompt": "p", "response": "r"}'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for a data set, beside a cache that no other test has filled."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def read(path: Path | str, split: str = "train") -> SourceRead:
    return read_source(str(path), seed=0, default_split=split)


def lines_of(result: SourceRead) -> list[int | None]:
    return [row.place.line for row in result.rows]


def test_a_row_is_read_as_it_stands(path: Path) -> None:
    row = {"prompt": " a\n{b} 'ü' 😀\u0000 ", "response": "\\n", "extra": [1, None, {"x": 2.5}]}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    result = read(path)
    assert result.errors == [] and result.revision is None
    assert result.rows[0].fields == row
    assert str(result.rows[0].place) == f"{path}:1"


@pytest.mark.parametrize(
    "text", ["2024-01-31", "2024-01-31T12:00:00", "12:30", "007", "1e5", "true", "nan"]
)
def test_text_that_looks_like_something_else_stays_text(path: Path, text: str) -> None:
    row = json.dumps({"prompt": text, "response": text})
    path.write_text(f"{row}\n{row}\n")
    assert [r.fields for r in read(path).rows] == [{"prompt": text, "response": text}] * 2


BOM = b"\xef\xbb\xbf"
ACCEPTED = {
    "no newline at the end": (GOOD, [1]),
    "byte order mark": (BOM + GOOD + b"\n", [1]),
    "CRLF": (GOOD + b"\r\n" + GOOD + b"\r\n", [1, 2]),
    "blank lines": (b"\n \t\n" + GOOD + b"\n\r\n" + GOOD + b"\n\n", [3, 5]),
    "byte order mark, CRLF and blank lines": (BOM + b"\r\n" + GOOD + b"\r\n\r\n" + GOOD, [2, 4]),
    # these end lines for str.splitlines, but not for JSON Lines
    "line separators in text": (
        b'{"prompt": "a\xe2\x80\xa8b\xc2\x85", "response": "r"}\n' + GOOD,
        [1, 2],
    ),
    "empty": (b"", []),
    "byte order mark alone": (BOM, []),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted_keeps_its_physical_line(path: Path, name: str) -> None:
    content, lines = ACCEPTED[name]
    path.write_bytes(content)
    result = read(path)
    assert result.errors == []
    assert lines_of(result) == lines
    assert all(row.fields["response"] == "r" for row in result.rows)


BROKEN = {
    "no JSON": (b"hello", "broken JSON at column 1"),
    "no comma": (b'{"prompt": "p" "response": "r"}', "broken JSON at column 16"),
    "single quotes": (b"{'prompt': 'p'}", "broken JSON at column 2"),
    "two objects": (GOOD + GOOD, "broken JSON at column 33: Extra data"),
    "control character": (b'{"prompt": "a\x00b"}', "broken JSON at column 14"),
    "pretty-printed": (b"{", "broken JSON at column"),
    "invalid UTF-8": (b'{"prompt": "\xff"}', "invalid UTF-8 at byte 13"),
    "UTF-16": ("{}".encode("utf-16"), "invalid UTF-8 at byte 1"),
    "duplicate key": (b'{"prompt": "p", "response": "r", "prompt": "q"}', 'key "prompt" appears twice'),
    "list": (b'["p", "r"]', "not a JSON object"),
    "string": (b'"p"', "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "too deep": (b'{"prompt": ' + b"[" * 200_000, "broken JSON"),
    "number of 5000 digits": (b'{"prompt": ' + b"1" * 5000 + b"}", "broken JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_line_that_cannot_be_read_is_named(path: Path, name: str) -> None:
    line, message = BROKEN[name]
    path.write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD + b"\n")
    result = read(path)
    assert lines_of(result) == [1, 4], "its neighbours are read"
    (error,) = result.errors
    assert message in error.message
    assert str(error.place) == f"{path}:3"
    assert (error.code, error.status) == ("D201", 65)
    assert len(str(error)) < 500, "no data in the log"


def test_a_truncated_last_line_is_named(path: Path) -> None:
    path.write_bytes(GOOD + b"\n" + GOOD[:-5])
    result = read(path)
    assert lines_of(result) == [1]
    assert str(result.errors[0].place) == f"{path}:2"


def test_every_broken_line_is_collected(path: Path) -> None:
    lines = [GOOD if number % 3 else b"{" for number in range(1, 101)]
    path.write_bytes(b"\n".join(lines))
    result = read(path)
    assert [error.place.line for error in result.errors if error.place] == list(range(3, 101, 3))
    assert len(result.rows) + len(result.errors) == 100


def test_fingerprint_is_that_of_the_bytes(path: Path, tmp_path: Path) -> None:
    content = BOM + GOOD + b"\r\n\r\n" + GOOD
    path.write_bytes(content)
    assert read(path).fingerprint == hashlib.sha256(content).hexdigest()
    other = tmp_path / "copy.jsonl"
    other.write_bytes(content)
    assert read(other).fingerprint == read(path).fingerprint


def test_a_home_folder_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(GOOD)
    monkeypatch.setenv("HOME", str(path.parent))
    assert len(read("~/rows.jsonl").rows) == 1


@pytest.mark.parametrize(
    "missing", ["nowhere.jsonl", "no/where.jsonl", "nowhere.parquet", "./a b", "/nowhere/at/all"]
)
def test_a_missing_file_is_66(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no file") as caught:
        read(missing)
    assert (caught.value.code, caught.value.status) == ("D101", ExitStatus.NOT_FOUND)
    assert missing in caught.value.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_66(path: Path) -> None:
    path.write_bytes(GOOD)
    path.chmod(0)
    with pytest.raises(UserError, match="Permission denied") as caught:
        read(path)
    assert caught.value.status == 66


def test_a_kind_that_is_not_read_is_65(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(GOOD)
    with pytest.raises(UserError, match=r"\.txt is not a format") as caught:
        read(path)
    assert caught.value.status == 65


def test_builtin_rows() -> None:
    train, test = read("builtin:arithmetic"), read("builtin:arithmetic", split="test")
    assert (len(train.rows), len(test.rows)) == (20_000, 1_000)
    assert read("builtin:arithmetic:test").fingerprint == test.fingerprint
    assert train.fingerprint != test.fingerprint
    assert str(test.rows[0].place) == "builtin:arithmetic:1"
    for name in ("builtin:poetry", "builtin:arithmetic:dev"):
        with pytest.raises(UserError, match="no built-in data") as caught:
            read(name)
        assert caught.value.status == 66


ROWS = [{"prompt": f"p{i}", "response": f"00{i}"} for i in range(3)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "save_to_disk", "splits saved to disk"])
def test_a_folder_goes_through_datasets(folder: Path, kind: str) -> None:
    data = datasets.Dataset.from_list(ROWS)
    if kind == "jsonl":
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "parquet":
        data.to_parquet(folder / "train.parquet")
    elif kind == "save_to_disk":
        data.save_to_disk(folder)
    else:
        datasets.DatasetDict(train=data).save_to_disk(folder)
    result = read(folder)
    assert [row.fields for row in result.rows] == ROWS
    assert [str(row.place) for row in result.rows] == [f"{folder}:{i}" for i in (1, 2, 3)]
    assert result.errors == [] and result.fingerprint == read(folder).fingerprint != ""


@pytest.mark.parametrize("kind", ["empty", "no such split"])
def test_a_folder_without_the_rows_is_66(folder: Path, kind: str) -> None:
    if kind != "empty":
        (folder / "train.jsonl").write_bytes(GOOD)
    with pytest.raises(UserError, match="cannot load") as caught:
        read(folder, split="test")
    assert (caught.value.code, caught.value.status) == ("D105", 66)


def test_a_hub_id_offline_is_one_clear_error(tmp_path: Path) -> None:
    """In another process, because the libraries look at the environment when they are imported."""
    names = ["someone/nothing", "someone/nothing:main:train@v1", "nothing"]
    script = """
import json, sys
from cs336_alignment.data.sources import read_source
from cs336_alignment.errors import UserError
for name in sys.argv[1:]:
    try:
        read_source(name, seed=0, default_split="train")
    except UserError as error:
        print(json.dumps([error.code, error.status, str(error)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *names], capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stderr == ""
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        code, status, text = json.loads(line)
        assert (code, status) == ("D105", 66)
        first, hint = text.splitlines()
        assert name in first and "OfflineModeIsEnabled" in first and "offline" in hint


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("openai/gsm8k", ("openai/gsm8k", None, "train", None)),
        ("openai/gsm8k:main", ("openai/gsm8k", "main", "train", None)),
        ("openai/gsm8k:main:test", ("openai/gsm8k", "main", "test", None)),
        ("openai/gsm8k::test", ("openai/gsm8k", None, "test", None)),
        ("openai/gsm8k:main:test@abc", ("openai/gsm8k", "main", "test", "abc")),
        ("openai/gsm8k@refs/pr/1", ("openai/gsm8k", None, "train", "refs/pr/1")),
        ("squad", ("squad", None, "train", None)),
    ],
)
def test_a_hub_id_names_config_split_and_revision(
    name: str, asked: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load_dataset(
        repo: str, config: str | None, *, split: str, revision: str | None
    ) -> datasets.Dataset:
        calls.append((repo, config, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    result = read(name)
    assert calls == [asked]
    assert result.revision == asked[3] and str(result.rows[2].place) == f"{name}:3"
