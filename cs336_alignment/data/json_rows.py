"""JSON Lines and JSON, read by hand: `datasets`' reader changes data and tells no line numbers."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from cs336_alignment.data.row import Row
from cs336_alignment.errors import ExitStatus, Place, UserError, describe

SPACE = re.compile(r"[ \t\r\n]*")
SURROGATE = re.compile("[\ud800-\udfff]")
LINE = "one JSON object a line"


def read_json_lines(file: IO[bytes], path: Path) -> Iterator[Row | UserError]:
    """Yield the rows of a `.jsonl` file, one line in memory at a time; blank lines are skipped.

    Args:
        file: its bytes, decompressed.
        path: for places.
    """
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        place = Place(path, number)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as failure:
            message = f"invalid UTF-8 at byte {failure.start + 1} of the line"
            yield _bad(message, place, "UTF-8 text")
            continue
        yield _row(text, place)


def _row(text: str, place: Place) -> Row | UserError:
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as failure:
        return _bad(f"broken JSON at column {failure.colno}: {failure.msg}", place, LINE)
    except (ValueError, RecursionError) as failure:
        return _bad(f"broken JSON: {failure}", place, LINE)
    return _checked(value, place, "\\ud" in text or "\\uD" in text)


def _checked(value: Any, place: Place, may_hold_surrogates: bool) -> Row | UserError:
    if not isinstance(value, dict):
        return _bad("it is not a JSON object", place, "a JSON object", describe(value))
    # Only an escape can bring half a character into a text that was UTF-8.
    if may_hold_surrogates and (name := _with_surrogate(value)) is not None:
        return _bad(
            f"{name} holds half of a surrogate pair, which is no character",
            Place(place.path, place.line, name), "Unicode text",
        )  # fmt: skip
    return Row(value, place)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'key "{twice}" appears twice')
    return row


def _with_surrogate(row: dict[str, Any]) -> str | None:
    """Give the field that holds a lone surrogate, deep in it or not."""

    def holds(value: Any) -> bool:
        if isinstance(value, str):
            return SURROGATE.search(value) is not None
        if isinstance(value, dict):
            return any(holds(v) or holds(k) for k, v in value.items())
        return isinstance(value, list) and any(holds(v) for v in value)

    return next((name for name, value in row.items() if holds(value) or holds(name)), None)


def read_json(file: IO[bytes], path: Path) -> Iterator[Row | UserError]:
    """Yield the rows of a `.json` file: an array of objects, or an object with one such array.

    The whole file is in memory meanwhile. After an element that cannot be read the rest cannot be
    found.

    Args:
        file: its bytes, decompressed.
        path: for places; a row's line is that on which its object begins.

    Raises:
        UserError: there is no array of objects (65).
    """
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        yield _bad(f"invalid UTF-8 at byte {failure.start + 1}", Place(path), "UTF-8 text")
        return
    decoder = json.JSONDecoder(object_pairs_hook=_no_duplicates)
    at, line, counted = _find_array(text, path), 1, 0
    while True:
        at = _skip(text, at)
        if text[at : at + 1] == "]":
            return
        line, counted = line + text.count("\n", counted, at), at
        place = Place(path, line)
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as failure:
            place = Place(path, failure.lineno)
            yield _bad(
                f"broken JSON at column {failure.colno}: {failure.msg}", place, "a JSON object"
            )
            return
        except (ValueError, RecursionError) as failure:
            yield _bad(f"broken JSON: {failure}", place, "a JSON object")
            return
        yield _checked(value, place, True)
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            place = Place(path, line + text.count("\n", counted, at))
            yield _bad("broken JSON: the array goes on without a comma", place, "`,` or `]`")
            return


def _skip(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    assert found is not None  # it matches nothing, too
    return found.end()


def _find_array(text: str, path: Path) -> int:
    """Give where the elements of the array of rows begin."""
    at = _skip(text, 0)
    if text[at : at + 1] == "[":
        return at + 1
    # An object with one array: {"data": [ … ]}; names of other keys do not matter.
    found = re.compile(r'\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\[').match(text, at)
    if found is not None:
        first = _skip(text, found.end())
        if text[first : first + 1] in ("{", "]"):
            return first
    lines = [line for line in text.splitlines()[:2] if line.strip()]
    is_lines = all(line.lstrip().startswith("{") for line in lines) and bool(lines)
    raise UserError(
        "D107",
        "the file holds no array of objects",
        ExitStatus.BAD_DATA,
        place=Place(path),
        expected='[{…}, {…}] or {"data": [{…}]}',
        hint="one object a line is JSON Lines: call it .jsonl" if is_lines else None,
    )


def _bad(message: str, place: Place, expected: str, got: str | None = None) -> UserError:
    return UserError("D201", message, ExitStatus.BAD_DATA, place=place, expected=expected, got=got)
