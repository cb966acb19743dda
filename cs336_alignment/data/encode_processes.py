"""Rows cut into batches and encoded in order: here, or, of a large source, in processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from cs336_alignment.cores import count_cores
from cs336_alignment.data.encode import Encoded, Encoder
from cs336_alignment.data.json_rows import MOST_ROW_BYTES, too_large
from cs336_alignment.data.row import Row
from cs336_alignment.errors import UserError
from cs336_alignment.orphans import end_with

BATCH_ROWS = 1_000
BATCH_CHARACTERS = 2**22  # so that a batch of huge rows is no larger in memory than one of small
NUMBER_CHARACTERS = 8  # as much memory as a number of a list takes
ROWS_BEFORE_POOL = 8 * BATCH_ROWS  # below, starting processes costs more than they save


def _batches(rows: Iterable[Row | UserError]) -> Iterator[list[Row | UserError]]:
    batch: list[Row | UserError] = []
    characters = 0
    for row in rows:
        if isinstance(row, Row):
            characters += (size := _size(row.fields))
            row = row if size < MOST_ROW_BYTES else too_large(row.place)
        batch.append(row)
        if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _size(value: Any) -> int:
    """Estimate the characters of a value, those of a number as one token's."""
    size, parts = 0, [value]
    while parts:  # no recursion: a row may be deep
        part = parts.pop()
        if isinstance(part, str):
            size += len(part)
        elif isinstance(part, dict):
            parts += part.values()
        elif isinstance(part, list):
            if part and isinstance(part[0], int):
                size += NUMBER_CHARACTERS * len(part)
            else:
                parts += part
    return size


def encode_all(
    encoder: Encoder, rows: Iterable[Row | UserError], num_workers: int | None
) -> Iterator[Encoded]:
    """Encode rows in batches: the first ones here, the rest of a large source in processes.

    Args:
        encoder: for the source.
        rows: in order.
        num_workers: processes; None: one for each core.
    """
    batches, done, workers = _batches(rows), 0, num_workers or count_cores()
    for batch in batches:
        done += len(batch)
        yield encoder.encode(batch)
        if done >= ROWS_BEFORE_POOL and workers > 1:
            yield from _encode_in_processes(encoder, batches, workers)


def _encode_in_processes(
    encoder: Encoder, batches: Iterator[list[Row | UserError]], workers: int
) -> Iterator[Encoded]:
    # fork shares the tokenizer; where it is not safe (macOS), processes start anew and get a copy.
    method = "fork" if sys.platform == "linux" else "spawn"
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context(method), _begin_worker, (encoder, os.getpid())
    )
    waiting: deque[Future[Encoded]] = deque()
    try:
        with pool:
            for batch in batches:  # no process begins before the first
                waiting.append(pool.submit(_work, batch))
                if len(waiting) > 2 * workers:  # no more: memory must not grow with the source
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool as failure:
        raise UserError(
            "D311",
            "a process that tokenizes was killed: by the system for want of memory, most likely",
            hint="data.num_workers=1 takes least memory",
        ) from failure


_encoder: Encoder | None = None


def _begin_worker(encoder: Encoder, parent: int) -> None:
    global _encoder
    if not end_with(parent):
        os._exit(0)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has its core
    # Ctrl-C reaches the whole group; the parent ends its processes in good order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _encoder = encoder


def _work(batch: list[Row | UserError]) -> Encoded:
    assert _encoder is not None
    return _encoder.encode(batch)
