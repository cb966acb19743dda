"""Rows from where they lie: JSON Lines on disk, the hub, or the built-in task; each with its
place.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cs336_alignment.data import arithmetic
from cs336_alignment.errors import ExitStatus, Place, UserError, describe

BUILTIN = "builtin:"
HUB_SPEC = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+|[\w.-]+)(:(?P<config>[\w.-]*))?(:(?P<split>[\w.-]+))?"
    r"(@(?P<revision>[\w./-]+))?"
)
ARITHMETIC_ROWS = {"train": 20_000, "test": 1_000}


@dataclass(frozen=True)
class Row:
    """One row as it was found: its fields and where it stands."""

    fields: dict[str, Any]
    place: Place


@dataclass
class SourceRead:
    """What reading a source gave.

    Attributes:
        rows: the readable rows in the order of the source.
        errors: one for each row that could not be read.
        fingerprint: sha256 of the content that was read, the same for the same data.
        revision: the hub's commit, if the source is on the hub and named one.
    """

    rows: list[Row] = field(default_factory=list)
    errors: list[UserError] = field(default_factory=list)
    fingerprint: str = ""
    revision: str | None = None


def read_source(path: str, *, seed: int, default_split: str) -> SourceRead:
    """Read every row of a source.

    Args:
        path: a local `.jsonl` file; a local folder or hub id for `datasets`, written
            `name[:config[:split]][@revision]`; or `builtin:arithmetic`.
        seed: of the built-in task's problems.
        default_split: the split of a hub source or the built-in task if none is named.

    Raises:
        UserError: the source does not exist (66), or is of a kind that is not read (65).
    """
    if path.startswith(BUILTIN):
        return _read_builtin(path, seed, default_split)
    local = Path(path).expanduser()
    if local.is_file() or local.suffix in {".jsonl", ".json", ".csv", ".parquet"}:
        return _read_jsonl(local)
    return _read_with_datasets(path, default_split)


def _read_builtin(path: str, seed: int, default_split: str) -> SourceRead:
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
    return SourceRead(placed, fingerprint=digest)


def _read_jsonl(path: Path) -> SourceRead:
    if not path.is_file():
        raise UserError(
            "D101",
            f"there is no file {path}",
            ExitStatus.NOT_FOUND,
            hint="data.train_path and data.eval_path take a .jsonl file or a hub id; paths are "
            f"relative to the folder you stand in ({Path.cwd()})",
        )
    if path.suffix != ".jsonl":
        raise UserError(
            "D103",
            f"{path.suffix or 'a file without ending'} is not a format that is read",
            ExitStatus.BAD_DATA,
            place=Place(path),
            expected=".jsonl, one JSON object a line",
        )
    read, digest = SourceRead(), hashlib.sha256()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    continue
                place = Place(path, number)
                parsed = _parse_line(line, place)
                if isinstance(parsed, UserError):
                    read.errors.append(parsed)
                else:
                    read.rows.append(Row(parsed, place))
    except OSError as failure:
        raise UserError(
            "D104", f"cannot read {path}: {failure.strerror}", ExitStatus.NOT_FOUND
        ) from failure
    read.fingerprint = digest.hexdigest()
    return read


def _parse_line(line: bytes, place: Place) -> dict[str, Any] | UserError:
    def bad(message: str, expected: str, got: str | None = None) -> UserError:
        return UserError(
            "D201", message, ExitStatus.BAD_DATA, place=place, expected=expected, got=got
        )

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f'key "{twice}" appears twice')
        return row

    try:
        # Own reader: the JSON reader of `datasets` turns text that looks like a date into a
        # timestamp.
        row = json.loads(line.decode("utf-8"), object_pairs_hook=no_duplicates)
    except UnicodeDecodeError as failure:
        return bad(f"invalid UTF-8 at byte {failure.start + 1} of the line", "UTF-8 text")
    except json.JSONDecodeError as failure:
        return bad(
            f"broken JSON at column {failure.colno}: {failure.msg}", "one JSON object a line"
        )
    except (ValueError, RecursionError) as failure:
        return bad(f"broken JSON: {failure}", "one JSON object a line")
    if not isinstance(row, dict):
        return bad("the line is not a JSON object", "one JSON object a line", describe(row))
    return row


def _read_with_datasets(path: str, default_split: str) -> SourceRead:
    match = HUB_SPEC.fullmatch(path)
    is_folder = Path(path).expanduser().is_dir()
    if match is None and not is_folder:
        raise UserError(
            "D101",
            f"there is no file or folder {path}",
            ExitStatus.NOT_FOUND,
            hint="a hub id is name[:config[:split]][@revision], e.g. openai/gsm8k:main:train",
        )
    repo, config, split, revision = path, None, default_split, None
    if match is not None and not is_folder:
        repo, config = match["repo"], match["config"] or None
        split, revision = match["split"] or default_split, match["revision"]
    import datasets

    folder = Path(repo).expanduser()
    try:
        if is_folder and (folder / "state.json").is_file():  # written by Dataset.save_to_disk
            data = datasets.load_from_disk(str(folder))
        else:
            data = datasets.load_dataset(
                str(folder) if is_folder else repo, config, split=split, revision=revision
            )
    except Exception as failure:  # every kind of network, hub and format trouble ends here
        raise UserError(
            "D105",
            f"cannot load {path} with `datasets`: {_first_line(failure)}",
            ExitStatus.NOT_FOUND,
            hint="check name, config and split (name[:config[:split]][@revision]); offline, only "
            "what is in the local cache can be loaded",
        ) from failure
    digest = hashlib.sha256()
    rows = []
    for number, fields in enumerate(data, start=1):
        digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
        rows.append(Row(dict(fields), Place(path, number)))
    return SourceRead(rows, fingerprint=digest.hexdigest(), revision=revision)


def _first_line(failure: BaseException) -> str:
    return (str(failure) or type(failure).__name__).splitlines()[0]
