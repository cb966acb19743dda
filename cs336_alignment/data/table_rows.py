"""CSV, Parquet and the tables of `datasets`, a row or a batch at a time; text stays text."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from cs336_alignment.data.choices import columns_without_header, subject_of
from cs336_alignment.data.json_rows import MOST_ROW_BYTES, SURROGATE, bad_row
from cs336_alignment.data.row import Row
from cs336_alignment.errors import Place, UserError, first_line

BATCH_ROWS = 256  # at a time, fewer if they are large
BATCH_BYTES = 2**25
BUFFER_BYTES = 2**20


def read_csv(file: IO[bytes], path: Path, delimiter: str) -> Iterator[Row | UserError]:
    """Yield the rows of a CSV file with a header; every value is the text that stands there.

    A file that begins with MMLU's row (question, four choices, letter) has no header; its rows get
    the names that they lack, and the file's name is their subject.

    Args:
        file: its bytes, decompressed.
        path: for places; a row's line is that on which it begins.
        delimiter: between cells.

    Raises:
        UserError: there is no sound header, or quotes are broken: where the next row begins cannot
            be known then (65).
    """
    records = _records(file, path, delimiter)
    head = list(islice(records, 2))
    if not head:
        raise bad_row("the file has no header", Place(path, 1), "a first line with names")
    header = columns_without_header(*(cells for _, cells in head))
    named = {} if header is None else {"subject": subject_of(path)}
    if header is None:
        place, cells = head.pop(0)
        header = _check_header(cells, place)
    for place, cells in chain(head, records):
        if any(not cell.isascii() and SURROGATE.search(cell) for cell in cells):
            yield bad_row("invalid UTF-8 in the row", place, "UTF-8 text")
        elif len(cells) != len(header):
            message = f"the row has {len(cells)} cells"
            yield bad_row(message, place, f"{len(header)}, as the header has")
        else:
            yield Row({**dict(zip(header, cells, strict=True)), **named}, place)


def has_header(file: IO[bytes], path: Path, delimiter: str) -> bool:
    """Tell whether a CSV file names its columns.

    Args:
        file: its bytes, decompressed.
        path: for places.
        delimiter: between cells.

    Raises:
        UserError: quotes are broken (65).
    """
    head = list(islice(_records(file, path, delimiter), 2))
    return not head or columns_without_header(*(cells for _, cells in head)) is None


def _records(file: IO[bytes], path: Path, delimiter: str) -> Iterator[tuple[Place, list[str]]]:
    """Yield the cells of each line that has some, and where it begins."""
    csv.field_size_limit(MOST_ROW_BYTES)
    # Bytes that are no UTF-8 become surrogates, so that they spoil no row but their own.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        place = Place(path, reader.line_num + 1)
        try:
            cells = next(reader, None)
        except csv.Error as failure:
            message, expected = f"broken CSV: {failure}", "cells, quoted where they hold quotes"
            raise bad_row(message, place, expected) from failure
        if cells is None:
            return
        if cells:
            yield place, cells


def _check_header(names: list[str], place: Place) -> list[str]:
    if any(SURROGATE.search(name) for name in names):
        raise bad_row("invalid UTF-8 in the header", place, "UTF-8 text")
    if len(set(names)) != len(names) or "" in names:
        raise bad_row("the header has empty or repeated names", place, "names, each once")
    if len(names) == 1 and (found := re.search(r"[;\t|,]", names[0])):
        sign = {"\t": "tabs"}.get(found[0], f"`{found[0]}`")
        raise bad_row(f"the cells seem to be divided by {sign}", place,
                      "commas, or tabs in a file called .tsv")  # fmt: skip
    return names


def read_parquet(path: Path) -> Iterator[Row | UserError]:
    """Yield the rows of a Parquet file, a batch in memory at a time; places count rows from 1.

    Args:
        path: of the file.

    Raises:
        UserError: it is no Parquet file, or a damaged one, or has repeated names (65).
    """
    import pyarrow as pa  # comes with `datasets`
    from pyarrow import parquet

    number = 0
    try:
        # pyarrow's defaults read a whole row group, which may be the whole file.
        with parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            if len(set(file.schema_arrow.names)) != len(file.schema_arrow.names):
                raise bad_row("the table has repeated names", Place(path), "names, each once")
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            largest = max((g.total_byte_size / max(1, g.num_rows) for g in groups), default=0)
            for batch in file.iter_batches(batch_size=_batch_rows(largest)):
                yield from _rows_of(batch, path, number)
                number += batch.num_rows
    except (pa.ArrowException, OSError) as failure:
        message = f"cannot read the Parquet file: {first_line(failure)}"
        raise UserError("D108", message, place=Place(path, number + 1)) from failure


def _batch_rows(row_bytes: float) -> int:
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(1, row_bytes))))


def _rows_of(batch: Any, path: Path, before: int) -> Iterator[Row | UserError]:
    try:
        rows = batch.to_pylist()
    except (ValueError, ArithmeticError, LookupError):  # a value that Python has not, or no UTF-8
        yield from _rows_one_by_one(batch, path, before)
        return
    for number, fields in enumerate(rows, start=before + 1):
        yield Row(_present(fields), Place(path, number))


def _rows_one_by_one(batch: Any, path: Path, before: int) -> Iterator[Row | UserError]:
    for index in range(batch.num_rows):
        fields, name = {}, None
        try:
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                fields[name] = column[index].as_py()
        except (ValueError, ArithmeticError, LookupError) as failure:
            place = Place(path, before + index + 1, name)
            yield bad_row(
                f"the value cannot be read: {failure}", place, "UTF-8 text, or a value in range"
            )
        else:
            yield Row(_present(fields), Place(path, before + index + 1))


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    """Give the fields of a row without the nulls within them.

    All structs of a column have the same fields, so Arrow fills with null what a message or a tool
    call does not have; a chat template would write these nulls as if they had been said.
    """
    return {name: _without_nulls(value) for name, value in fields.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_without_nulls(part) for part in value]
    return value


def read_dataset(data: Any, path: str) -> Iterator[Row]:
    """Yield the rows of a `datasets.Dataset`, a batch in memory at a time.

    Args:
        data: the dataset.
        path: for places, which count rows from 1.
    """
    number = 0
    for batch in data.iter(batch_size=_batch_rows(data.data.nbytes / max(1, len(data)))):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield Row(_present(dict(zip(batch, values, strict=True))), Place(path, number))
