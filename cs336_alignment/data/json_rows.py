"""JSON Lines and JSON, read by hand: `datasets`' reader changes data and tells no line numbers."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from cs336_alignment.data.row import Row, wrong
from cs336_alignment.errors import Place, UserError, describe

SPACE = re.compile(r"[ \t\r\n]*")
SURROGATE = re.compile("[\ud800-\udfff]")
LINE = "one JSON object a line"
ARRAY = '[{…}, {…}] or {"data": [{…}]}'
MOST_ROW_BYTES = 2**26
MAX_NAME_CHARS = 80
bad_row = partial(wrong, "D201")


class _Decoder:
    """Decodes JSON, and keeps in mind a key that an object has twice: `json` would drop one."""

    def __init__(self) -> None:
        decoder = json.JSONDecoder(object_pairs_hook=self._to_object)
        self.decode, self.raw_decode = decoder.decode, decoder.raw_decode
        self._twice: str | None = None

    def _to_object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) != len(pairs) and self._twice is None:
            self._twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        return row

    def take_twice(self) -> str | None:
        """Give the key that was there twice since this was last asked."""
        name, self._twice = self._twice, None
        return name


def read_json_lines(file: IO[bytes], path: Path) -> Iterator[Row | UserError]:
    """Yield the rows of a `.jsonl` file, one line in memory at a time; blank lines are skipped.

    Args:
        file: its bytes, decompressed.
        path: for places.
    """
    decoder = _Decoder()
    for number, line in enumerate(iter(lambda: file.readline(MOST_ROW_BYTES), b""), start=1):
        place = Place(path, number)
        if len(line) == MOST_ROW_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):  # its rest, a part in memory at a time
                line = file.readline(MOST_ROW_BYTES)
            yield too_large(place)
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line or line.isspace():
            continue
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as failure:
            message = f"invalid UTF-8 at byte {failure.start + 1} of the line"
            is_wide = line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            hint = "this is UTF-16: save the file as UTF-8" if is_wide else None
            yield bad_row(message, place, "UTF-8 text", hint=hint)
            continue
        yield _row(text, place, decoder)


def too_large(place: Place) -> UserError:
    """Refuse a row that is too large to be one."""
    hint = "divide it, or set data.on_bad_row=drop (drops are counted)"
    expected = f"at most {MOST_ROW_BYTES >> 20} MiB"
    return wrong("D215", "the row is too large to be an example", place, expected, hint=hint)


def _row(text: str, place: Place, decoder: _Decoder) -> Row | UserError:
    decoder.take_twice()
    try:
        value = decoder.decode(text)
    except json.JSONDecodeError as failure:
        # Where a line breaks off, json points behind its end: at the next one.
        column = min(failure.pos, len(text.rstrip("\r\n"))) + 1
        hint = "a JSON array goes into a file called .json" if text.startswith("[") else None
        return bad_row(f"broken JSON at column {column}: {failure.msg}", place, LINE, hint=hint)
    except (ValueError, RecursionError) as failure:
        return bad_row(f"broken JSON: {failure}", place, LINE)
    return _checked(value, place, decoder.take_twice(), _has_surrogate_escape(text))


def _checked(value: Any, place: Place, twice: str | None, has_escape: bool) -> Row | UserError:
    if twice is not None:
        return bad_row(f'broken JSON: key "{_shown(twice)}" appears twice', place, "each key once")
    if not isinstance(value, dict):
        got = _shown(describe(value), None)
        return bad_row("it is not a JSON object", place, "a JSON object", found=got)
    if has_escape and (name := _with_surrogate(value)) is not None:
        name = _shown(name)
        return bad_row(
            f"{name} holds half of a surrogate pair, which is no character",
            Place(place.path, place.line, name), "Unicode text",
        )  # fmt: skip
    return Row(value, place)


def _has_surrogate_escape(text: str) -> bool:
    """Only an escape can bring half a character into a text that was UTF-8."""
    return "\\ud" in text or "\\uD" in text


def _with_surrogate(row: dict[str, Any]) -> str | None:
    """Give the field that holds a lone surrogate, deep in it or not."""
    for name, field in row.items():
        parts: list[Any] = [name, field]  # no recursion: a row may be as deep as json reads
        while parts:
            part = parts.pop()
            if isinstance(part, dict):
                parts += [*part.keys(), *part.values()]
            elif isinstance(part, list):
                parts += part
            elif isinstance(part, str) and SURROGATE.search(part):
                return name
    return None


def read_json(file: IO[bytes], path: Path) -> Iterator[Row | UserError]:
    """Yield the rows of a `.json` file: an array of objects, or an object with one such array.

    The whole file is in memory meanwhile.

    Args:
        file: its bytes, decompressed.
        path: for places; a row's line is that on which its object begins.

    Raises:
        UserError: there is no array of objects, or the JSON is broken: where the next row begins
            cannot be known then (65).
    """
    content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        line = failure.object.count(b"\n", 0, failure.start) + 1
        column = failure.start - failure.object.rfind(b"\n", 0, failure.start)
        message = f"invalid UTF-8 at byte {column} of the line"
        raise bad_row(message, Place(path, line), "UTF-8 text") from failure
    del content
    try:
        yield from _elements(text, path)
    except json.JSONDecodeError as failure:
        message = f"broken JSON at column {failure.colno}: {failure.msg}"
        raise bad_row(message, Place(path, failure.lineno), ARRAY) from failure


def _elements(text: str, path: Path) -> Iterator[Row | UserError]:
    decoder, has_escape = _Decoder(), _has_surrogate_escape(text)
    at, is_whole = _find_array(text, path)
    line, counted = 1, 0
    is_open = text[at : at + 1] != "]"
    while is_open:
        line, counted = line + text.count("\n", counted, at), at
        value, at = _decode_at(decoder.raw_decode, text, at)
        yield _checked(value, Place(path, line), decoder.take_twice(), has_escape)
        at = _skip(text, at)
        is_open = text[at : at + 1] != "]"
        if is_open:
            at = _behind(text, at, ",")
    rest = _skip(text, at + 1)
    if is_whole and rest != len(text):
        raise json.JSONDecodeError("Extra data behind the array", text, rest)


def _find_array(text: str, path: Path) -> tuple[int, bool]:
    """Give where the first element of the array of rows is, and whether the array is the file."""
    at = _skip(text, 0)
    first = text[at : at + 1]
    if first == "[":
        return _skip(text, at + 1), True
    arrays, end = _arrays_of(text, at) if first == "{" else ({}, at)
    rest = _skip(text, end)
    is_line = first == "{" and "\n" not in text[at:end]
    if rest != len(text) and first == "{" and not (is_line and text[rest] == "{"):
        raise json.JSONDecodeError("Extra data behind the object", text, rest)
    if rest != len(text) or not arrays:
        raise _no_array("the file holds no array of objects", path, is_line)
    if len(arrays) > 1:
        names = ", ".join(_shown(name) for _, name in sorted(arrays.items())[:5])
        raise _no_array(f"the file holds several arrays of objects: {names}", path)
    return next(iter(arrays)), False


def _arrays_of(text: str, at: int) -> tuple[dict[int, str], int]:
    """Find the arrays of objects in an object.

    Returns:
        The names of such values by the place of their first element, and where the object ends.
    """
    # With int, a number too long for Python would be told at the array, not at its row.
    decode = json.JSONDecoder(parse_int=float).raw_decode
    arrays: dict[int, str] = {}
    at = _skip(text, at + 1)
    is_open = text[at : at + 1] != "}"
    while is_open:
        if text[at : at + 1] != '"':
            raise json.JSONDecodeError("Expecting a name in double quotes", text, at)
        name, at = decode(text, at)
        begin = _behind(text, at, ":")
        value, at = _decode_at(decode, text, begin)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            arrays[_skip(text, begin + 1)] = name
        at = _skip(text, at)
        is_open = text[at : at + 1] != "}"
        if is_open:
            at = _behind(text, at, ",")
    return arrays, at + 1


def _decode_at(
    decode: Callable[[str, int], tuple[Any, int]], text: str, at: int
) -> tuple[Any, int]:
    """Decode a value; what is too long or too deep for json is told like what is broken."""
    try:
        return decode(text, at)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as failure:
        raise json.JSONDecodeError(str(failure), text, at) from failure


def _behind(text: str, at: int, mark: str) -> int:
    """Give where it goes on behind a mark that must stand here."""
    at = _skip(text, at)
    if text[at : at + 1] != mark:
        raise json.JSONDecodeError(f"Expecting '{mark}' delimiter", text, at)
    return _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    assert found is not None  # it matches nothing, too
    return found.end()


def _no_array(message: str, path: Path, is_lines: bool = False) -> UserError:
    hint = "one object a line is JSON Lines: call it .jsonl" if is_lines else None
    return UserError("D107", message, place=Place(path), expected=ARRAY, hint=hint)


def _shown(name: str, length: int | None = MAX_NAME_CHARS) -> str:
    """Make a key fit to print: short, and without halves of characters, which no file takes."""
    return name[:length].encode("utf-8", "backslashreplace").decode()
