"""Responses kept on disk as they come, so that an evaluation that was stopped goes on.

One line a chunk of responses. A line that a kill cut short is passed over: its chunk is generated
anew, whole, so that every response is generated among the same others as without the stop, and is
the same to the last bit. Where nobody here decides what a response is generated among, at a server,
each is kept as it comes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from cs336_alignment.evaluation.sampling import Generation, Generator, Request, Sampling
from cs336_alignment.files import telling

FOLDER = "responses"
CHUNK_BATCHES = 4  # more would be lost at a stop, fewer would wait for their slowest too often


class KeptResponses:
    """The responses of one model with one sampling, from this and earlier processes.

    Args:
        folder: where they lie; other models' may lie beside them.
        identity: names all that decides what the model answers to a request: weights, tokenizer,
            sampling, precision.
        process: number of this process, which appends to a file of its own and reads all.

    Attributes:
        kept: how many were there at the start.
    """

    def __init__(self, folder: Path, identity: str, process: int) -> None:
        fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._path = folder / f"{fingerprint}-{process}.jsonl"
        self._known: dict[str, Generation] = {}
        for path in sorted(folder.glob(f"{fingerprint}-*.jsonl")):
            self._read(path)
        self.kept = len(self._known)

    def _read(self, path: Path) -> None:
        with path.open("rb") as file:
            for line in file:
                with suppress(ValueError, TypeError, KeyError):  # cut short by a kill
                    for key, fields in json.loads(line).items():
                        ids = tuple(fields.pop("token_ids"))
                        self._known[key] = Generation(**fields, token_ids=ids)

    def get(self, request: Request) -> Generation | None:
        """Give the response to a request, if it was generated before."""
        return self._known.get(_key(request))

    def add(self, requests: Sequence[Request], generations: Sequence[Generation]) -> None:
        """Keep a chunk, on the disk when this returns.

        Raises:
            UserError: the disk is full or failing (74).
        """
        chunk = {_key(r): asdict(g) for r, g in zip(requests, generations, strict=True)}
        line = json.dumps(chunk, ensure_ascii=True).encode() + b"\n"
        hint = "make room and run the same command again: it goes on from what is kept"
        with telling("R306", f"cannot keep responses in {self._path}", hint):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab+") as file:
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    line = b"\n" + line  # after what a kill cut short
                file.write(line)
                file.flush()
                os.fsync(file.fileno())


class KeptGenerator:
    """A `Generator` that asks another one only for what is not kept yet.

    Args:
        generator: what generates.
        kept: where its responses are kept.
        batch_size: responses that it has in the making at once; None: each is kept by itself.
    """

    def __init__(
        self, generator: Generator, kept: KeptResponses, *, batch_size: int | None
    ) -> None:
        self._generator = generator
        self._kept = kept
        self._chunk = None if batch_size is None else CHUNK_BATCHES * batch_size

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        advance: Callable[[int], None] = lambda _: None,
        on_done: Callable[[int, Generation], None] = lambda _, __: None,
    ) -> list[Generation]:
        """Generate what is missing; see `Generator`."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        found: dict[int, Generation] = {}
        size = self._chunk or max(1, len(order))
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            have = {i: kept for i in chunk if (kept := self._kept.get(requests[i])) is not None}
            found |= have
            if missing := [i for i in chunk if i not in have]:
                wanted = [requests[i] for i in missing]
                generations = self._generate(wanted, sampling, advance)
                found |= zip(missing, generations, strict=True)
            for i in chunk:
                on_done(i, found[i])
            advance(len(have))
        return [found[i] for i in range(len(requests))]

    def _generate(
        self, wanted: Sequence[Request], sampling: Sampling, advance: Callable[[int], None]
    ) -> list[Generation]:
        if self._chunk is None:

            def keep(number: int, generation: Generation) -> None:
                self._kept.add([wanted[number]], [generation])

            return self._generator.generate(wanted, sampling, advance=advance, on_done=keep)
        generations = self._generator.generate(wanted, sampling, advance=advance)
        self._kept.add(wanted, generations)
        return generations


def forget(folder: Path) -> None:
    """Remove kept responses, once the results that they belong to are written."""
    shutil.rmtree(folder, ignore_errors=True)


def _key(request: Request) -> str:
    text = f"{request.seed} {' '.join(map(str, request.prompt_ids))}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]
