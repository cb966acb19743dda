"""CSV and Parquet, a row or a batch at a time; text stays text."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cs336_alignment.data.row import Row
from cs336_alignment.errors import ExitStatus, Place, UserError

PARQUET_ROWS = 256  # at a time


def read_csv(file: IO[bytes], path: Path, delimiter: str) -> Iterator[Row | UserError]:
    """Yield the rows of a CSV file with a header; every value is the text that stands there.

    Args:
        file: its bytes, decompressed.
        path: for places; a row's line is that on which it begins.
        delimiter: between cells.
    """
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(
        io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True
    )
    header: list[str] | None = None
    line = 1
    while True:
        place = Place(path, line)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError as failure:
            yield _bad(f"invalid UTF-8: {failure.reason}", place, "UTF-8 text")
            return
        except csv.Error as failure:
            yield _bad(f"broken CSV: {failure}", place, "cells, quoted where they hold quotes")
            return
        line = reader.line_num + 1
        if not cells:
            continue
        if header is None:
            header = cells
            if len(set(header)) != len(header) or "" in header:
                raise _bad("the header has empty or repeated names", place, "names, each once")
        elif len(cells) == len(header):
            yield Row(dict(zip(header, cells, strict=True)), place)
        else:
            yield _bad(
                f"the row has {len(cells)} cells", place, f"{len(header)}, as the header has"
            )


def read_parquet(path: Path) -> Iterator[Row | UserError]:
    """Yield the rows of a Parquet file, a batch in memory at a time; places count rows from 1.

    Raises:
        UserError: it is no Parquet file (65).
    """
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=PARQUET_ROWS):
            for fields in batch.to_pylist():
                number += 1
                yield Row(fields, Place(path, number))
    except (pa.ArrowException, OSError) as failure:
        raise UserError(
            "D108",
            f"cannot read the Parquet file: {str(failure).splitlines()[0]}",
            ExitStatus.BAD_DATA,
            place=Place(path, number + 1),
        ) from failure


def _bad(message: str, place: Place, expected: str) -> UserError:
    return UserError("D201", message, ExitStatus.BAD_DATA, place=place, expected=expected)
