"""Rows come out of their source unchanged and with their place; what cannot be read is named."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import os
import subprocess
import sys
import tracemalloc
from datetime import datetime
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from cs336_alignment.data.row import Row
from cs336_alignment.data.sources import open_source
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


class Result:
    """A source, read to its end."""

    def __init__(self, path: str, split: str) -> None:
        source = open_source(path, seed=0, default_split=split)
        found = list(source.rows())
        assert found == list(source.rows()) or any(isinstance(f, UserError) for f in found)
        self.rows = [row for row in found if isinstance(row, Row)]
        self.errors = [error for error in found if isinstance(error, UserError)]
        self.fingerprint, self.revision = source.fingerprint, source.revision


def read(path: Path | str, split: str = "train") -> Result:
    return Result(str(path), split)


def lines_of(result: Result) -> list[int | None]:
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
@pytest.mark.fault("T13 dates and digits that stay text")
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
@pytest.mark.fault("T12 lines that are no JSON, no UTF-8, cut off, doubled keys")
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
    "pretty-printed": (b"{", "broken JSON at column 2:"),
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
@pytest.mark.fault("T12 lines that are no JSON, no UTF-8, cut off, doubled keys")
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


@pytest.mark.fault("T12 lines that are no JSON, no UTF-8, cut off, doubled keys")
def test_a_truncated_last_line_is_named(path: Path) -> None:
    path.write_bytes(GOOD + b"\n" + GOOD[:-5])
    result = read(path)
    assert lines_of(result) == [1]
    assert str(result.errors[0].place) == f"{path}:2"


@pytest.mark.fault("T12 lines that are no JSON, no UTF-8, cut off, doubled keys")
def test_every_broken_line_is_collected(path: Path) -> None:
    lines = [GOOD if number % 3 else b"{" for number in range(1, 101)]
    path.write_bytes(b"\n".join(lines))
    result = read(path)
    assert [error.place.line for error in result.errors if error.place] == list(range(3, 101, 3))
    assert len(result.rows) + len(result.errors) == 100


def test_fingerprint_is_that_of_the_bytes(path: Path, tmp_path: Path) -> None:
    content = BOM + GOOD + b"\r\n\r\n" + GOOD
    path.write_bytes(content)
    other = tmp_path / "copy.jsonl"
    other.write_bytes(content)
    before = read(other).fingerprint
    other.write_bytes(content)  # at another time
    assert read(other).fingerprint == before
    other.write_bytes(content + b"\n")
    assert read(other).fingerprint != before
    other.write_bytes(content)
    # Places of rows show the name, so it counts.
    assert read(other).fingerprint != read(path).fingerprint
    whole = [tmp_path / "two" / name for name in ("a.jsonl", "b.jsonl")]
    whole[0].parent.mkdir()
    seen = set()
    for first, second in ((GOOD, GOOD + b"\n"), (GOOD + b"\n", GOOD)):
        whole[0].write_bytes(first)
        whole[1].write_bytes(second)
        seen.add(read(whole[0].parent).fingerprint)
    assert len(seen) == 2


def test_a_home_folder_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(GOOD)
    monkeypatch.setenv("HOME", str(path.parent))
    assert len(read("~/rows.jsonl").rows) == 1


@pytest.mark.parametrize(
    "missing",
    [
        "nowhere.jsonl",
        "no/where.jsonl",
        "nowhere.parquet",
        "./a b",
        "/nowhere/at/all",
        "~nobody9/a.jsonl",
        "nowhere.csv.zst",
        "nowhere.parquet.gz",
        "",
    ],
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


def test_a_folder_without_permission_is_66(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)  # root may do everything
    with pytest.raises(UserError, match="Permission denied") as caught:
        read(tmp_path)
    assert (caught.value.code, caught.value.status) == ("D104", 66)
    with pytest.raises(UserError, match="too long") as caught:
        read("x" * 5000)
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


@pytest.mark.parametrize("kind", ["save_to_disk", "splits saved to disk"])
def test_a_folder_saved_by_datasets(folder: Path, kind: str) -> None:
    data = datasets.Dataset.from_list(ROWS)
    if kind == "save_to_disk":
        data.save_to_disk(folder)
    else:
        datasets.DatasetDict(train=data).save_to_disk(folder)
        with pytest.raises(UserError, match="no split test, but train") as caught:
            read(folder, split="test")
        assert (caught.value.code, caught.value.status) == ("D105", 66)
    result = read(folder)
    assert [row.fields for row in result.rows] == ROWS
    assert [str(row.place) for row in result.rows] == [f"{folder}:{i}" for i in (1, 2, 3)]
    assert result.errors == [] and result.fingerprint == read(folder).fingerprint != ""


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_saved_format_changes_nothing(folder: Path, kind: str) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "note": "a"}]
    data = datasets.Dataset.from_list(rows).with_format(kind, columns=["input_ids"])
    data.save_to_disk(folder)
    assert [row.fields for row in read(folder).rows] == rows


def test_saved_splits_of_which_validation_stands_for_test(folder: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=data.select([0]), validation=data.select([1])).save_to_disk(folder)
    assert [row.fields for row in read(folder, split="test").rows] == ROWS[1:2]


TEXTS = [
    "2024-01-31",
    "007",
    "1e5",
    "true",
    "NaN",
    "null",
    " a, b ",
    'say "hi"',
    "two\nlines",
    "ü 😀",
]
TABLE = [{"prompt": text, "response": text[::-1]} for text in TEXTS]


def compress(path: Path, raw: bytes) -> None:
    """Write bytes as the ending says."""
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as stream:
            stream.write(raw)
    else:
        path.write_bytes(gzip.compress(raw, 1) if path.suffix == ".gz" else raw)


def write_table(path: Path) -> list[int]:
    """Write the table in the format that the name says; gives the line of each row."""
    stem = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    lines = list(range(1, len(TABLE) + 1))
    if stem.suffix == ".parquet":
        datasets.Dataset.from_list(TABLE).to_parquet(path)
        return lines
    if stem.suffix in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(
            text, ["prompt", "response"], delimiter="," if stem.suffix == ".csv" else "\t"
        )
        writer.writeheader()
        lines = []
        for row in TABLE:
            lines.append(text.getvalue().count("\n") + 1)
            writer.writerow(row)
        content = "\ufeff" + text.getvalue()
    elif stem.suffix == ".json":
        content = "[\n" + ",\n".join(json.dumps(row, indent=1) for row in TABLE) + "\n]"
        lines = [2 + 4 * i for i in range(len(TABLE))]
    else:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TABLE)
    compress(path, content.encode())
    return lines


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"])
@pytest.mark.fault("T13 dates and digits that stay text")
def test_every_container_gives_the_same_text(kind: str, compression: str, tmp_path: Path) -> None:
    if kind == "parquet" and compression:
        pytest.skip("Parquet has compression of its own")
    path = tmp_path / f"rows.{kind}{compression}"
    lines = write_table(path)
    result = read(path)
    assert result.errors == [] and [row.fields for row in result.rows] == TABLE
    assert lines_of(result) == lines


def test_globs_and_folders_read_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in (2, 10, 1):
        (tmp_path / f"data/part-{number:02}.jsonl").write_text(json.dumps({"n": number}))
    (tmp_path / "data/more.csv").write_text("n\n7\n")
    (tmp_path / "data/notes.md").write_text("nothing")
    assert [r.fields["n"] for r in read(tmp_path / "data/*.jsonl").rows] == [1, 2, 10]
    assert [r.fields["n"] for r in read(tmp_path / "data").rows] == ["7", 1, 2, 10]
    (tmp_path / "data/.part-00.jsonl").write_text('{"n": "hidden"}')
    (tmp_path / "data/in/ner").mkdir(parents=True)
    (tmp_path / "data/in/ner/x.jsonl").write_text('{"n": 3}')
    assert [r.fields["n"] for r in read(tmp_path / "data").rows] == ["7", 1, 2, 10]
    assert [r.fields["n"] for r in read(tmp_path / "**/*.jsonl").rows] == [3, 1, 2, 10]
    for nothing in ("data/*.parquet", "data/i?"):  # the latter is a folder
        with pytest.raises(UserError, match="nothing matches") as caught:
            read(tmp_path / nothing)
        assert (caught.value.code, caught.value.status) == ("D101", 66)


def test_a_folder_with_splits_gives_the_one_that_is_asked_for(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"name": name}))
    assert [r.fields["name"][:8] for r in read(tmp_path).rows] == ["train-00"] * 2
    assert [r.fields["name"][:8] for r in read(tmp_path, split="test").rows] == ["test-000"]
    (tmp_path / "test-00000-of-00001.jsonl").unlink()
    with pytest.raises(UserError, match="no files of the split test") as caught:
        read(tmp_path, split="test")
    assert caught.value.status == 66


def test_files_of_no_split_beside_those_of_splits_are_not_left_out_silently(tmp_path: Path) -> None:
    for name in ("train", "test", "more"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"name": name}))
    with pytest.raises(UserError, match="splits and others beside them") as caught:
        read(tmp_path)
    assert (caught.value.code, caught.value.status) == ("D112", 66)
    assert caught.value.got is not None and "more.jsonl" in caught.value.got
    (tmp_path / "more.jsonl").rename(tmp_path / "dataset_infos.json")  # describes, has no rows
    assert [r.fields["name"] for r in read(tmp_path).rows] == ["train"]


BROKEN_FILES = {
    "rows.json": [
        ("{", "D201"), ('{"a": {"b": 1}}', "D107"), ("3", "D107"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n', "D107"),
        ('[{"a": 1}, {"a": }]', "D201"), ('[{"a": 1} {"a": 2}]', "D201"), ('[{"a": 1}', "D201"),
        ('[{"a": 1},]', "D201"), ('[{"a": 1}] [{"a": 2}]', "D201"), ('{"data": [{"a": 1}]', "D201"),
        ('{"data": [{"a": 1}], "more": [{"a": 2}]}', "D107"), ('{"data": []}', "D107"),
        ('{"data": [{"a": 1}]}\n{"data": [{"a": 2}]}\n', "D107"), ("", "D107"),
        ('{"data": [{"a": 1}]} 3', "D201"), ('{"n": 1 "data": []}', "D201"), ("{1: 2}", "D201"),
        ('["\ud800"]'.replace("\ud800", "\\ud800"), "D201"), ('[{"a": ' + "1" * 5000 + "}]", "D201"),
        ('{"data": [{"a": ' + "1" * 5000 + "}]}", "D201"), ("[" * 200_000, "D201"),
        ('{"a": ' + "[" * 200_000, "D201"), ("[\udcff]", "D201"),
        ('[{"a": 1}, 3]', "D201"), ('[{"a": 1, "a": 2}]', "D201"), ('[{"a": "\\ud800"}]', "D201"),
    ],
    "rows.csv": [
        ("a,a\n1,2\n", "D201"), ("a,\n1,2\n", "D201"), ("a,b\n1\n", "D201"),
        ("", "D201"), ("\n\n", "D201"), ("a,\udcff\n1,2\n", "D201"), ('a,b\n"1"2,3\n4,5\n', "D201"),
        ("a,b\n1,2,3\n", "D201"), ('a,b\n1,"2\n', "D201"), ("a,b\n1,\udcff\n", "D201"),
    ],
    "rows.parquet": [("PAR1 no", "D108"), ("", "D108")],
    "rows.jsonl.gz": [("no gzip", "D106"), ("", "D106")],
    "rows.jsonl.zst": [("no zstd", "D106"), ("", "D106")],
    "rows.parquet.gz": [("PAR1 no", "D103")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [(name, content, code) for name, cases in BROKEN_FILES.items() for content, code in cases],
)
def test_what_cannot_be_read_is_one_error(
    name: str, content: str, code: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    try:
        errors = read(path).errors
    except UserError as error:
        errors = [error]
    assert [error.code for error in errors] == [code]
    assert errors[0].status == 65 and errors[0].place is not None and name in str(errors[0].place)


@pytest.mark.parametrize(
    "name", ["rows.jsonl.gz", "rows.json.gz", "rows.csv.gz", "rows.jsonl.zst", "rows.csv.zst"]
)
def test_a_stream_that_breaks_off_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    rows = {"csv": b"a,b\n" + b"1,2\n" * 9999, "json": b"[" + GOOD + (b"," + GOOD) * 9999 + b"]"}
    compress(path, rows.get(name.split(".")[1], (GOOD + b"\n") * 9999))
    read(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="breaks off") as caught:
        read(path)
    assert (caught.value.code, caught.value.status) == ("D106", 65)
    assert str(caught.value.place) == str(path)


def test_what_follows_on_a_compressed_stream_is_read(tmp_path: Path) -> None:
    for ending in ("gz", "zst"):
        path = tmp_path / f"rows.jsonl.{ending}"
        compress(path, GOOD + b"\n")
        path.write_bytes(path.read_bytes() * 3)  # as `cat a.gz b.gz` and parallel compressors do
        assert lines_of(read(path)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ('[\n\n{"n": 1},\r\n {"n":\n2}\n,{"n": 3}]', [3, 4, 6]),
        ('\ufeff{"data": [\n{"n": 1}, {"n": 2},\n{"n": 3}]}', [2, 2, 3]),
        ('{"version": [1],\n"rows":\n[{"n": 1},\n{"n": 2}, {"n": 3}],\n"n": "]"}\n', [3, 4, 4]),
        ("[]", []),
        (" [ ]\n", []),
    ],
)
def test_json_rows_keep_the_line_on_which_they_begin(
    content: str, lines: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content.encode())
    result = read(path)
    assert [row.fields["n"] for row in result.rows] == [1, 2, 3][: len(lines)]
    assert lines_of(result) == lines and result.errors == []


def test_json_goes_on_behind_a_row_that_is_no_good(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"n": 1},\n{"n": 2, "n": 3},\n4,\n{"n": "\\ud800"},\n{"n": 5}]')
    result = read(path)
    assert lines_of(result) == [1, 5]
    assert [error.place.line for error in result.errors if error.place] == [2, 3, 4]


@pytest.mark.parametrize("name", ["rows.json", "rows.csv"])
def test_what_cannot_be_read_on_is_no_bad_row(name: str, tmp_path: Path) -> None:
    """A bad row may be skipped, by `data.on_bad_row=skip`, but not all that lies behind it."""
    path = tmp_path / name
    path.write_text(
        '[{"n": 1},\n{"n": 2},\n {"n" 3},\n{"n": 4}]' if "json" in name else 'n\n1\n"2"2\n4\n'
    )
    with pytest.raises(UserError, match="broken") as caught:
        read(path)
    assert str(caught.value.place) == f"{path}:3"
    assert name == "rows.csv" or "column 7" in caught.value.message


def test_a_number_too_long_is_told_at_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"data": [\n{"n": 1},\n{"n": %s}]}' % ("1" * 5000))
    with pytest.raises(UserError, match="broken JSON at column 1: Exceeds the limit") as caught:
        read(path)
    assert str(caught.value.place) == f"{path}:3"


def test_json_lines_called_json_say_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"messages": [{"role": "user"}]}\n' * 2)
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.code == "D107" and "call it .jsonl" in str(caught.value)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_depth_is_no_trouble_of_ours(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for depth in (400, 900, 950, 975, 990, 1000, 1100):
        deep = "[" * depth + "]" * depth
        path.write_text(
            f'{"[" * path.name.endswith(".json")}{{"a": {deep}, "b": "\\ud83d\\ude00"}}{"]" * path.name.endswith(".json")}'
        )
        try:
            result = read(path)
        except UserError as error:
            assert error.code == "D201" and depth > 400
        else:
            assert len(result.rows) + len(result.errors) == 1 and (result.rows or depth > 400)


def test_names_in_errors_are_short_and_can_be_written(path: Path) -> None:
    long = "x" * 10**6
    names = ["\\ud800", long, "a"]
    lines = [f'{{"{name}": 1, "{name}": 2}}' for name in names] + ['{"\\ud800": 1}', '"\\ud800"']
    path.write_text("\n".join([*lines, f'{{"{long}": "\\udfff"}}']))
    result = read(path)
    assert len(result.errors) == 6 and result.rows == []
    for error in result.errors:
        assert len(str(error.message).encode()) < 200


@pytest.mark.parametrize("text", ["\\ud800", "a\\uDFFFb", "\\ude00\\ud83d"])
@pytest.mark.parametrize(
    "row", ['{"a": "%s"}', '{"a": [1, {"b": "%s"}]}', '{"%s": 1}', '{"a": {"%s": 1}}']
)
@pytest.mark.fault("T12 lines that are no JSON, no UTF-8, cut off, doubled keys")
def test_half_a_character_is_named(path: Path, row: str, text: str) -> None:
    path.write_text('{"a": "\\ud83d\\ude00 \\\\ud800"}\n' + row % text)
    result = read(path)
    assert [r.fields["a"] for r in result.rows] == ["😀 \\ud800"]
    (error,) = result.errors
    assert "surrogate" in error.message and error.place is not None and error.place.line == 2


def test_csv_places_and_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b'\xef\xbb\xbf"a",b\r\n\r\n1,"x\r\n\r\ny"\r\n2,\xff\r\n3\r\n\r\n4,"\xc3\xbc\n",\r\n"",5\r\n'
    )
    result = read(path)
    assert [(r.place.line, r.fields) for r in result.rows] == [
        (3, {"a": "1", "b": "x\r\n\r\ny"}), (11, {"a": "", "b": "5"}),
    ]  # fmt: skip
    found = [(e.place.line, e.message) for e in result.errors if e.place]
    assert found == [
        (6, "invalid UTF-8 in the row"), (7, "the row has 1 cells"), (9, "the row has 3 cells"),
    ]  # fmt: skip


def test_parquet_values_stay_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    when = datetime(2024, 1, 31, 12)
    table = {
        "a": ["007", "2024-01-31"],
        "t": [when, None],
        "m": [[{"role": "user"}], []],
        "n": [1.5, 2],
    }
    parquet.write_table(pa.table(table), path)
    assert [row.fields for row in read(path).rows] == [
        {"a": "007", "t": when, "m": [{"role": "user"}], "n": 1.5},
        {"a": "2024-01-31", "t": None, "m": [], "n": 2},
    ]


def test_a_value_of_parquet_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    raw = pa.array([b"ok", b"\xff", b"ok"] * 200)
    days = pa.array([0] * 599 + [10**9], pa.date32())
    texts = pa.Array.from_buffers(pa.string(), 600, raw.buffers())
    parquet.write_table(pa.table({"a": texts, "d": days}), path)
    result = read(path)
    assert lines_of(result) == [n for n in range(1, 600) if n % 3 != 2]
    assert str(result.errors[0].place) == f'{path}:2, field "a"'
    assert str(result.errors[-1].place) == f'{path}:600, field "d"'


def test_a_table_with_repeated_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table([["x"], ["y"]], names=["a", "a"]), path)
    with pytest.raises(UserError, match="repeated names") as caught:
        read(path)
    assert (caught.value.code, caught.value.status) == ("D201", 65)


def test_parquet_is_streamed_within_a_row_group(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    texts = [os.urandom(450).hex() for _ in range(30_000)]
    parquet.write_table(pa.table({"prompt": texts}), path, row_group_size=10**6)
    script = """
import sys, pyarrow as pa
from cs336_alignment.data.sources import open_source
rows = open_source(sys.argv[1], seed=0, default_split="train").rows()
print(sum(1 for _ in rows), pa.default_memory_pool().max_memory())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    count, peak = map(int, done.stdout.split())
    assert count == 30_000 and peak < 1.2e7  # of 27 MB


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
def test_large_rows_of_tables_are_read_a_few_at_a_time(kind: str, tmp_path: Path) -> None:
    table = {"prompt": ["a"] * 60, "response": [f"{i:02d}" + "x" * 2_000_000 for i in range(60)]}
    path = tmp_path / "rows.parquet"
    if kind == "parquet":
        parquet.write_table(pa.table(table), path, row_group_size=10**6)
    else:
        path = tmp_path / "saved"
        datasets.Dataset.from_dict(table).save_to_disk(str(path))
    rows = open_source(str(path), seed=0, default_split="train").rows()
    tracemalloc.start()
    numbers = [row.fields["response"][:2] for row in rows if isinstance(row, Row)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numbers == [text[:2] for text in table["response"]] and peak < 8e7  # of 120 MB


@pytest.mark.parametrize("kind", ["jsonl", "csv", "jsonl.gz", "jsonl.zst"])
def test_rows_are_streamed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}"
    text = "x" * 9000
    line = f'{{"prompt": "a", "response": "{text}"}}\n' if "json" in kind else f"a,{text}\n"
    raw = ("" if "json" in kind else "prompt,response\n").encode() + line.encode() * 3000
    compress(path, raw)
    rows = open_source(str(path), seed=0, default_split="train").rows()
    tracemalloc.start()
    count = sum(1 for _ in rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000 and peak < 3e6  # of 27 MB


@pytest.mark.fault("T14 a row of 20 MB")
def test_a_row_of_twenty_megabytes(path: Path) -> None:
    path.write_bytes(
        json.dumps({"prompt": "a", "response": "word " * 4_000_000}).encode() + b"\n" + GOOD
    )
    tracemalloc.start()
    rows = iter(open_source(str(path), seed=0, default_split="train").rows())
    first, second = next(rows), next(rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(first, Row) and isinstance(second, Row)
    assert len(first.fields["response"]) == 20_000_000 and peak < 1e8


@pytest.mark.fault("T28 a hub that cannot be reached")
def test_a_hub_id_offline_is_one_clear_error(tmp_path: Path) -> None:
    """In another process, because the libraries look at the environment when they are imported."""
    names = ["someone/nothing", "someone/nothing:main:train@v1", "nothing"]
    script = """
import json, sys
from cs336_alignment.data.sources import open_source
from cs336_alignment.errors import UserError
for name in sys.argv[1:]:
    try:
        open_source(name, seed=0, default_split="train")
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


def test_test_and_validation_rows_are_not_mixed(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"name": name}))
    assert [r.fields["name"] for r in read(tmp_path, split="test").rows] == ["test"]
    (tmp_path / "test.jsonl").unlink()
    assert [r.fields["name"] for r in read(tmp_path, split="test").rows] == ["validation"]


def test_what_is_read_of_a_folder_and_what_is_not_is_said(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "notes.txt", "c.jsonl.bz2"):
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "more").mkdir()
    (tmp_path / ".hidden").write_bytes(GOOD)
    notes = open_source(str(tmp_path), seed=0, default_split="train").notes
    assert notes == ("  2 files: a.jsonl, b.jsonl", "  not read: c.jsonl.bz2, more/, notes.txt")
    found = open_source(str(tmp_path / "*.jsonl"), seed=0, default_split="train").notes
    assert found == notes[:1]
    assert open_source(str(tmp_path / "a.jsonl"), seed=0, default_split="train").notes == ()


@pytest.mark.fault("T12 a file that is written to while it is read")
def test_a_file_that_changes_while_it_is_read_is_refused(path: Path) -> None:
    path.write_bytes(GOOD + b"\n" + GOOD)
    rows = open_source(str(path), seed=0, default_split="train").rows()
    next(rows)
    with path.open("ab") as file:
        file.write(b"\n" + GOOD)
    with pytest.raises(UserError, match="was changed while it was read") as caught:
        list(rows)
    assert (caught.value.code, caught.value.status) == ("D113", ExitStatus.BAD_DATA)


@pytest.mark.parametrize(
    ("name", "header", "sign"),
    [("a.csv", b"prompt;response", "`;`"), ("a.csv", b"prompt\tresponse", "tabs"),
     ("a.tsv", b"prompt,response", "`,`")],
)  # fmt: skip
def test_cells_divided_by_another_sign(name: str, header: bytes, sign: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(header + b"\na" + header[6:7] + b"b\n")
    with pytest.raises(UserError, match=f"seem to be divided by {sign}"):
        read(tmp_path / name)


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
def test_fields_that_a_struct_lacks_stay_absent(kind: str, folder: Path) -> None:
    """Arrow gives all structs of a column the same fields, and null where there was none."""
    calls = [
        {"name": "f", "arguments": {"a": 1}},
        {"name": "g", "arguments": {"b": [{"c": "x"}, {"d": 0}]}},
    ]
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": calls}]}
    ]
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        assert pa.Table.from_pylist(rows).to_pylist() != rows
        source: Path = folder / "rows.parquet"
    else:
        source = folder / "saved"
        datasets.Dataset.from_list(rows).save_to_disk(str(source))
    assert [row.fields for row in read(source).rows] == rows


@pytest.mark.parametrize("size", [99, 100, 101, 350])
@pytest.mark.fault("T14 a row beyond the largest size")
def test_a_row_beyond_the_largest_size_is_named_alone(
    size: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cs336_alignment.data.json_rows.MOST_ROW_BYTES", 100)
    row = b'{"prompt": "p", "response": "' + b"r" * (size - 31) + b'"}'
    assert len(row) == size
    path.write_bytes(b"\n".join([GOOD, row, GOOD]))
    result = read(path)
    if size < 100:  # with its line break
        assert lines_of(result) == [1, 2, 3]
        return
    (error,) = result.errors
    assert (error.code, error.status, str(error.place)) == ("D215", 65, f"{path}:2")
    assert lines_of(result) == [1, 3]
