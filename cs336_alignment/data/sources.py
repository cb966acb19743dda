"""Rows from where they lie: files of several kinds, folders, the hub, the built-in task."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
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
from cs336_alignment.data.table_rows import has_header, read_csv, read_dataset, read_parquet
from cs336_alignment.errors import Place, UserError, first_line
from cs336_alignment.files import sha256_of

BUILTIN = "builtin:"
HUB_SPEC = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+|[\w.-]+)(:(?P<config>[\w.-]*))?(:(?P<split>[\w.-]+))?"
    r"(@(?P<revision>[\w./-]+))?"
)
ARITHMETIC_ROWS = {"train": 20_000, "test": 1_000}
COMPRESSED = (".gz", ".zst")
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SAVED_BY_DATASETS = ("state.json", "dataset_dict.json")
NAMES_SHOWN = 5
# The hub's and other frameworks' descriptions of data sets beside them: no rows.
DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json")
SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val", "dev", "eval")}
SPLIT_NAME = re.compile(r"(?:^|[._-])(train|test|validation|valid|val|dev|eval)(?=[._-]|\d|$)")


@dataclass(frozen=True)
class Source:
    """A source that was found, not yet read.

    Attributes:
        path: as the user gave it.
        fingerprint: sha256 of the content.
        revision: the hub's commit, if one was named.
        rows: yields its rows in order, streamed, as often as asked; an error stands for a row that
            cannot be read. Raises UserError if the source cannot be read on (65, 66).
        notes: lines that say which files of a folder are read and which are left out.
    """

    path: str
    fingerprint: str
    revision: str | None
    rows: Callable[[], Iterator[Row | UserError]]
    notes: tuple[str, ...] = ()


def open_source(path: str, *, seed: int, default_split: str) -> Source:
    """Find a source.

    Args:
        path: a file, a glob, or a folder of files, whose endings say what they are; a folder saved
            by `datasets`; a hub id `name[:config[:split]][@revision]`; or `builtin:arithmetic`.
        seed: of the built-in task's problems.
        default_split: of a source that has splits, if none is named.

    Returns:
        The source; its content has been hashed, none of its rows read.

    Raises:
        UserError: it does not exist (66), or is of a kind that is not read (65).
    """
    if path.startswith(BUILTIN):
        return _builtin(path, seed, default_split)
    try:
        files = _find_files(path, default_split)
        if files is not None:
            return _files(path, files, _left_out(path, files))
    except OSError as failure:
        raise _unreadable(Path(path), failure) from failure
    return _with_datasets(path, default_split)


def _find_files(path: str, split: str) -> Sequence[Path] | None:
    """Give the files that a path means, in order; None where `datasets` is to load it."""
    local = Path(os.path.expanduser(path))  # Path's own raises where there is no such user
    if path and local.is_dir():
        inside = sorted(local.iterdir())
        if any(file.name in SAVED_BY_DATASETS for file in inside):
            return None
        found = [p for p in inside if ending_of(p) in ENDINGS and p.is_file() and p.name[0] != "."]
        found = [p for p in found if p.name not in DESCRIPTIONS]
        if not found:
            raise _unknown_kind(local, "a folder without such files")
        return _of_split(found, split, path)
    if glob.has_magic(path) and not local.exists():
        matches = sorted(glob.glob(str(local), recursive=True))
        files = [Path(match) for match in matches if os.path.isfile(match)]
        if not files:
            raise _missing(f"nothing matches {path}")
        return files
    if local.exists() or ending_of(local) in ENDINGS:
        return [local]
    if HUB_SPEC.fullmatch(path) is None or local.suffix in (".txt", *COMPRESSED):
        raise _missing(f"there is no file or folder {path}")
    return None


def ending_of(path: Path) -> str:
    """Give what a file's name says of its kind, without the compression of a text.

    Example:
        >>> ending_of(Path("a.tar.jsonl.gz")), ending_of(Path("a.parquet.gz"))
        ('.jsonl', '.gz')
    """
    stem = path.with_suffix("") if path.suffix in COMPRESSED else path
    return path.suffix if stem.suffix == ".parquet" else stem.suffix


def _of_split(files: Sequence[Path], split: str, folder: str) -> Sequence[Path]:
    """Choose a split's files of a folder whose file names tell them apart; else all are it.

    Raises:
        UserError: there are splits, and this one is not among them, or a file belongs to none (66).
    """
    named = {file: found[1] for file in files if (found := SPLIT_NAME.search(file.name.lower()))}
    if not named:
        return files
    if unnamed := [file.name for file in files if file not in named]:
        raise UserError(
            "D112",
            f"{folder} holds files of splits and others beside them",
            expected="either every file name with train, test, validation …, or none",
            got=f"{next(iter(named)).name} and {unnamed[0]}",
            hint=f"name the files that are meant, as a glob: '{folder}/*{ending_of(files[0])}'",
        )
    wanted = SPLITS.get(split, (split,))
    # One of these names, the first that is there: test and validation rows are two things.
    used = next((name for name in wanted if name in named.values()), None)
    chosen = [file for file, name in named.items() if name == used]
    if not chosen:
        raise UserError(
            "D109",
            f"{folder} has no files of the split {split}",
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
            expected="builtin:arithmetic, builtin:arithmetic:train or builtin:arithmetic:test",
        )
    rows = arithmetic.generate_rows(split, ARITHMETIC_ROWS[split], seed)
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    placed = [Row(dict(row), Place(path, number)) for number, row in enumerate(rows, start=1)]
    return Source(path, digest, None, lambda: iter(placed))


def _left_out(path: str, files: Sequence[Path]) -> tuple[str, ...]:
    """Say which files of a folder or glob are read, and what of the folder is not."""
    folder = Path(os.path.expanduser(path))
    if len(files) == 1 and not folder.is_dir():
        return ()
    names = [file.name for file in files]
    lines = [f"  {len(files)} file{'s' * (len(files) > 1)}: {_first(names)}"]
    others = [
        f"{entry.name}/" if entry.is_dir() else entry.name
        for entry in (sorted(folder.iterdir()) if folder.is_dir() else ())
        if entry not in files and entry.name[0] != "."
    ]
    return (*lines, *([f"  not read: {_first(others)}"] if others else ()))


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", …" if len(names) > NAMES_SHOWN else "")


def _files(path: str, files: Sequence[Path], notes: tuple[str, ...]) -> Source:
    for file in files:
        if not file.is_file():
            raise _missing(f"there is no file {file}")
        if ending_of(file) not in ENDINGS:
            raise _unknown_kind(file, file.suffix or "a file without ending")
    digest = hashlib.sha256()
    states = {}
    for file in files:
        states[file] = _state(file)
        # The name too: its ending says how the bytes are read, and places of rows show it.
        digest.update(f"{sha256_of(file)} {file}".encode())

    def read() -> Iterator[Row | UserError]:
        for file in files:
            yield from _read_file(file)
            if _state(file) != states[file]:
                raise UserError(
                    "D113",
                    f"{file} was changed while it was read",
                    hint="wait until what writes it is done, then run the command again",
                )

    bare = [file.name for file in files if ending_of(file) in DELIMITERS and not _has_header(file)]
    if bare:
        notes += (f"  without a header, read as question, A, B, C, D, answer: {_first(bare)}",)
    return Source(path, digest.hexdigest(), None, read, notes)


def _has_header(path: Path) -> bool:
    try:
        with closing(_open(path)) as file:
            return has_header(file, path, DELIMITERS[ending_of(path)])
    except (EOFError, zlib.error, OSError, UserError):  # whoever reads the rows is told
        return True


def _state(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read_file(path: Path) -> Iterator[Row | UserError]:
    kind = ending_of(path)
    if kind == ".parquet":
        yield from read_parquet(path)
        return
    try:
        with closing(_open(path)) as file:
            if kind == ".json":
                yield from read_json(file, path)
            elif kind in DELIMITERS:
                yield from read_csv(file, path, DELIMITERS[kind])
            else:
                yield from read_json_lines(file, path)
    except (EOFError, zlib.error, OSError) as failure:
        if isinstance(failure, OSError) and failure.errno is not None:  # the system's own
            raise _unreadable(path, failure) from failure
        message = f"the compressed file breaks off or is damaged: {failure}"
        raise UserError("D106", message, place=Place(path)) from failure


def _open(path: Path) -> IO[bytes]:
    if path.suffix in COMPRESSED and not path.stat().st_size:
        raise EOFError("it is empty")  # the decompressors take that for an empty text
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import pyarrow as pa  # comes with `datasets`

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), 2**20)
    return path.open("rb")


def _with_datasets(path: str, default_split: str) -> Source:
    folder = Path(path).expanduser()
    match = None if folder.is_dir() else HUB_SPEC.fullmatch(path)
    split = match["split"] if match is not None and match["split"] else default_split
    revision = match["revision"] if match is not None else None
    import datasets

    try:
        if match is None:
            data: Any = datasets.load_from_disk(str(folder))
            if isinstance(data, dict):
                found = next((s for s in SPLITS.get(split, (split,)) if s in data), None)
                if found is None:
                    raise LookupError(f"it has no split {split}, but {', '.join(data)}")
                data = data[found]
        else:
            name, config = match["repo"], match["config"] or None
            data = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as failure:  # every kind of network, hub and format trouble ends here
        raise UserError(
            "D105",
            f"cannot load {path} with `datasets`: {first_line(failure)}",
            hint="give the folder of one split inside it"
            if match is None
            else "check name, config and split (name[:config[:split]][@revision]); offline, only "
            "what is in the local cache can be loaded",
        ) from failure
    data = data.with_format(None)  # all columns, as plain values
    digest = hashlib.sha256(f"{data._fingerprint}:{split}:{revision}".encode())
    for file in sorted(folder.rglob("*.arrow")) if match is None else []:
        digest.update(sha256_of(file).encode())
    return Source(path, digest.hexdigest(), revision, lambda: read_dataset(data, path))


def _missing(message: str) -> UserError:
    return UserError(
        "D101",
        message,
        hint="data.train_path and data.eval_path take a file, a glob, a folder or a hub id "
        f"(name[:config[:split]][@revision]); paths are relative to {Path.cwd()}",
    )


def _unknown_kind(path: Path, what: str) -> UserError:
    return UserError(
        "D103",
        f"{what} is not a format that is read",
        place=Place(path),
        expected=", ".join(ENDINGS) + ", those of text also with .gz or .zst",
    )


def _unreadable(path: Path, failure: OSError) -> UserError:
    message = f"cannot read {failure.filename or path}: {failure.strerror or failure}"
    return UserError("D104", message)
