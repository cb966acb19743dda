"""Prepared data on disk: Arrow that is mapped, not read, and a note of what it was made of."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cs336_alignment.data.dataset import Chunk
from cs336_alignment.data.encode import Encoded
from cs336_alignment.files import sha256_of, write_json

DATA = "data.arrow"
NOTE = "prepared.json"
DIGEST = "data_sha256"  # in the note
SCHEMA = pa.schema([
    ("input_ids", pa.list_(pa.int32())),
    ("spans", pa.list_(pa.int32())),  # start, end, start, end …
    ("span_weights", pa.list_(pa.float32())),
    ("example_weight", pa.float32()),
    ("place", pa.string()),
    ("ground_truth", pa.string()),
    ("choices", pa.list_(pa.string())),
    ("row_hash", pa.uint64()),
    ("prompt_hash", pa.uint64()),
])  # fmt: skip


class Store:
    """A prepared source, open for reading.

    Args:
        folder: with the data.

    Attributes:
        chunks: the examples.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with pa.memory_map(str(folder / DATA)) as file:
            reader = pa.ipc.open_file(file)
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self.chunks = [_to_chunk(batch) for batch in self._batches]

    @property
    def note(self) -> dict[str, Any]:
        """What was written beside the data when it was complete."""
        return json.loads((self._folder / NOTE).read_text(encoding="utf-8"))

    @property
    def lengths(self) -> NDArray[np.integer[Any]]:
        """(N,) tokens of each example."""
        return np.concatenate([chunk.lengths for chunk in self.chunks])

    def place(self, number: int) -> str:
        """Say where one example's row stands."""
        for batch in self._batches:
            if number < len(batch):
                return str(batch.column("place")[number].as_py())
            number -= len(batch)
        raise IndexError(number)

    def column(self, name: str) -> Iterator[Any]:
        """Yield a column's values example by example, without holding all."""
        for batch in self._batches:
            yield from batch.column(name).to_pylist()

    def hashes(self, name: str) -> NDArray[np.uint64]:
        """(N,) `row_hash`, of each example's tokens, or `prompt_hash`, of those before its last
        trained stretch.
        """
        return np.concatenate([_view(batch.column(name), np.uint64) for batch in self._batches])


class StoreWriter:
    """Writes a prepared source batch by batch into a folder that is there.

    Args:
        folder: of the store to be; `finish` makes it one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer = pa.ipc.new_file(str(folder / DATA), SCHEMA)

    def write(self, done: Encoded) -> None:
        """Append a batch."""
        if not done.rows:
            return
        self._writer.write_batch(pa.record_batch([
            _ragged([row.input_ids for row in done.rows], pa.int32()),
            _ragged([row.spans.reshape(-1) for row in done.rows], pa.int32()),
            _ragged([row.span_weights for row in done.rows], pa.float32()),
            pa.array([row.example_weight for row in done.rows], pa.float32()),
            pa.array(done.places, pa.string()),
            pa.array(done.ground_truths, pa.string()),
            pa.array(done.choices, pa.list_(pa.string())),
            _array(done.hashes[:, 0], pa.uint64()),
            _array(done.hashes[:, 1], pa.uint64()),
        ], schema=SCHEMA))  # fmt: skip

    def close(self) -> Store:
        """End the data and open them for reading; `finish` is still to come."""
        self._writer.close()
        return Store(self._folder)

    def finish(self, note: dict[str, Any]) -> None:
        """Seal the closed store."""
        write_json(self._folder / NOTE, {**note, DIGEST: sha256_of(self._folder / DATA)})


def check_store(folder: Path) -> str | None:
    """Look whether a store is there and whole: None if it is, "" if there is none, else what is
    wrong with it.
    """
    if not folder.exists():
        return ""
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        return None if sha256_of(folder / DATA) == note[DIGEST] else f"{DATA} differs"
    except (OSError, ValueError, LookupError, TypeError) as failure:
        return str(failure) or type(failure).__name__


@contextmanager
def locked(folder: Path, tell_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a store against other processes: one prepares, the rest wait and find it done.

    Args:
        folder: of the store.
        tell_waiting: called before waiting, if another process holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder.with_name(folder.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell_waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _ragged(parts: list[NDArray[Any]], kind: pa.DataType) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int32)
    return pa.ListArray.from_arrays(
        _array(offsets, pa.int32()), _array(np.concatenate(parts), kind)
    )


def _array(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    """Show numpy to Arrow without a copy; `pa.array` would import pandas first, half a second."""
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(kind, len(values), [None, buffer])


def _to_chunk(batch: pa.RecordBatch) -> Chunk:
    ids, spans, weights = (batch.column(name) for name in ("input_ids", "spans", "span_weights"))
    return Chunk(
        _view(ids.values, np.int32),
        _view(ids.offsets, np.int32),
        _view(spans.values, np.int32).reshape(-1, 2),
        _view(weights.offsets, np.int32),
        _view(weights.values, np.float32),
        _view(batch.column("example_weight"), np.float32),
    )


def _view(array: pa.Array, dtype: type[np.generic]) -> NDArray[Any]:
    """See an array without nulls as numpy; `to_numpy` would import pandas first, half a second."""
    values = np.frombuffer(array.buffers()[1], dtype) if len(array) else np.zeros(0, dtype)
    return values[array.offset : array.offset + len(array)]
