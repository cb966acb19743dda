"""Rows from where they lie: files of several kinds, folders, the hub, the built-in task."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cs336_alignment.data import arithmetic
from cs336_alignment.data.json_rows import read_json, read_json_lines
from cs336_alignment.data.row import Row
from cs336_alignment.data.table_rows import read_csv, read_parquet
from cs336_alignment.errors import ExitStatus, Place, UserError

BUILTIN = "builtin:"
HUB_SPEC = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+|[\w.-]+)(:(?P<config>[\w.-]*))?(:(?P<split>[\w.-]+))?"
    r"(@(?P<revision>[\w./-]+))?"
)
ARITHMETIC_ROWS = {"train": 20_000, "test": 1_000}
COMPRESSED = (".gz", ".zst")
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
SAVED_BY_DATASETS = ("state.json", "dataset_info.json", "dataset_dict.json")
SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val", "dev", "eval")}
SPLIT_NAME = re.compile(r"(?:^|[._-])(train|test|validation|valid|val|dev|eval)(?=[._-]|\d|$)")
DATASET_ROWS = 256  # at a time

__all__ = ["Row", "Source", "open_source"]


@dataclass(frozen=True)
class Source:
    """A source that was found, not yet read.

    Attributes:
        path: as the user gave it.
        fingerprint: sha256 of the content.
        revision: the hub's commit, if one was named.
        read: yields its rows, see `rows`.
    """

    path: str
    fingerprint: str
    revision: str | None
    read: Callable[[], Iterator[Row | UserError]]

    def rows(self) -> Iterator[Row | UserError]:
        """Yield the rows in order, streamed, as often as asked; an error stands for a row that
        cannot be read.

        Raises:
            UserError: the source cannot be read on (65, 66).
        """
        return self.read()


def open_source(path: str, *, seed: int, default_split: str) -> Source:
    """Find a source.

    Args:
        path: a file, a glob, or a folder of files, whose endings say what they are; a folder saved
            by `datasets`; a hub id `name[:config[:split]][@revision]`; or `builtin:arithmetic`.
        seed: of the built-in task's problems.
        default_split: of a source that has splits, if none is named.

    Raises:
        UserError: it does not exist (66), or is of a kind that is not read (65).
    """
    if path.startswith(BUILTIN):
        return _builtin(path, seed, default_split)
    local = Path(path).expanduser()
    if local.is_dir():
        if any((local / name).is_file() for name in SAVED_BY_DATASETS):
            return _with_datasets(path, default_split)
        found = [p for p in sorted(local.iterdir()) if p.is_file() and ending_of(p) in ENDINGS]
        if not found:
            raise _unknown_kind(local, "a folder without such files")
        return _files(path, _of_split(found, default_split, path))
    if glob.has_magic(path) and not local.exists():
        matches = sorted(glob.glob(str(local), recursive=True))
        if not matches:
            raise _missing(f"nothing matches {path}")
        return _files(path, [Path(match) for match in matches if Path(match).is_file()])
    if local.exists() or ending_of(local) in ENDINGS:
        return _files(path, [local])
    if HUB_SPEC.fullmatch(path) is None or local.suffix == ".txt":
        raise _missing(f"there is no file or folder {path}")
    return _with_datasets(path, default_split)


def ending_of(path: Path) -> str:
    """Give what a file's name says of its kind, without the compression.

    Example:
        >>> ending_of(Path("a.tar.jsonl.gz"))
        '.jsonl'
    """
    stem = path.with_suffix("") if path.suffix in COMPRESSED else path
    return stem.suffix


def _of_split(files: Sequence[Path], split: str, folder: str) -> Sequence[Path]:
    """Choose a split's files of a folder whose file names tell them apart; else all are it.

    Raises:
        UserError: there are splits, and this one is not among them (66).
    """
    named = {file: found[1] for file in files if (found := SPLIT_NAME.search(file.name.lower()))}
    if not named:
        return files
    wanted = SPLITS.get(split, (split,))
    chosen = [file for file, name in named.items() if name in wanted]
    if not chosen:
        raise UserError(
            "D109",
            f"{folder} has no files of the split {split}",
            ExitStatus.NOT_FOUND,
            expected=f"a file name with {' or '.join(wanted)}",
            got=", ".join(file.name for file in files[:5]),
            hint="name the file itself",
        )
    return chosen


def _builtin(path: str, seed: int, default_split: str) -> Source:
    name, _, split = path.removeprefix(BUILTIN).partition(":")
    split = split or default_split
    if name != "arithmetic" or split not in ARITHMETIC_ROWS:
        raise UserError(
            "D102",
            f"there is no built-in data {path}",
            ExitStatus.NOT_FOUND,
            expected="builtin:arithmetic, builtin:arithmetic:train or builtin:arithmetic:test",
        )
    rows = arithmetic.generate_rows(split, ARITHMETIC_ROWS[split], seed)
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    placed = [Row(dict(row), Place(path, number)) for number, row in enumerate(rows, start=1)]
    return Source(path, digest, None, lambda: iter(placed))


def _files(path: str, files: Sequence[Path]) -> Source:
    for file in files:
        if not file.is_file():
            raise _missing(f"there is no file {file}")
        if ending_of(file) not in ENDINGS:
            raise _unknown_kind(file, file.suffix or "a file without ending")
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256")
        except OSError as failure:
            raise _unreadable(file, failure) from failure
        # The ending too: it says how the bytes are read.
        digest.update(content.digest() + ending_of(file).encode())

    def read() -> Iterator[Row | UserError]:
        for file in files:
            yield from _read_file(file)

    return Source(path, digest.hexdigest(), None, read)


def _read_file(path: Path) -> Iterator[Row | UserError]:
    kind = ending_of(path)
    if kind == ".parquet":
        yield from read_parquet(path)
        return
    try:
        with closing(_open(path)) as file:
            if kind == ".json":
                yield from read_json(file, path)
            elif kind in (".csv", ".tsv"):
                yield from read_csv(file, path, "," if kind == ".csv" else "\t")
            else:
                yield from read_json_lines(file, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as failure:
        raise _broken_stream(path, failure) from failure
    except OSError as failure:
        if path.suffix in COMPRESSED:
            raise _broken_stream(path, failure) from failure
        raise _unreadable(path, failure) from failure


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import io

        import pyarrow as pa  # comes with `datasets`

        stream = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
        return io.BufferedReader(stream, 2**20)
    return path.open("rb")


def _with_datasets(path: str, default_split: str) -> Source:
    folder = Path(path).expanduser()
    is_folder = folder.is_dir()
    match = None if is_folder else HUB_SPEC.fullmatch(path)
    split = match["split"] if match is not None and match["split"] else default_split
    revision = match["revision"] if match is not None else None
    import datasets

    try:
        if match is None:
            data: Any = datasets.load_from_disk(str(folder))
            if isinstance(data, dict):
                data = data[split]
        else:
            data = datasets.load_dataset(
                match["repo"], match["config"] or None, split=split, revision=revision
            )
    except Exception as failure:  # every kind of network, hub and format trouble ends here
        reason = (str(failure) or type(failure).__name__).splitlines()[0]
        raise UserError(
            "D105",
            f"cannot load {path} with `datasets`: {reason}",
            ExitStatus.NOT_FOUND,
            hint="check name, config and split (name[:config[:split]][@revision]); offline, only "
            "what is in the local cache can be loaded",
        ) from failure
    digest = hashlib.sha256(f"{data._fingerprint}:{split}:{revision}".encode())
    for file in sorted(folder.rglob("*.arrow")) if is_folder else []:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())

    def read() -> Iterator[Row | UserError]:
        number = 0
        for batch in data.iter(batch_size=DATASET_ROWS):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield Row(dict(zip(batch, values, strict=True)), Place(path, number))

    return Source(path, digest.hexdigest(), revision, read)


def _missing(message: str) -> UserError:
    return UserError(
        "D101",
        message,
        ExitStatus.NOT_FOUND,
        hint="data.train_path and data.eval_path take a file, a glob, a folder or a hub id "
        f"(name[:config[:split]][@revision]); paths are relative to {Path.cwd()}",
    )


def _unknown_kind(path: Path, what: str) -> UserError:
    return UserError(
        "D103",
        f"{what} is not a format that is read",
        ExitStatus.BAD_DATA,
        place=Place(path),
        expected=", ".join(ENDINGS) + ", those of text also with .gz or .zst",
    )


def _unreadable(path: Path, failure: OSError) -> UserError:
    return UserError(
        "D104", f"cannot read {path}: {failure.strerror or failure}", ExitStatus.NOT_FOUND
    )


def _broken_stream(path: Path, failure: Exception) -> UserError:
    return UserError(
        "D106",
        f"the compressed file breaks off or is damaged: {failure}",
        ExitStatus.BAD_DATA,
        place=Place(path),
    )
