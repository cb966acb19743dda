"""T11, T12: 200 files with one bad row, made from seeds, and searches for more."""

from __future__ import annotations

import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from cs336_alignment import cli
from cs336_alignment.config import ALL_KEYS, DataConfig, LintConfig
from cs336_alignment.data.json_rows import read_json, read_json_lines
from cs336_alignment.data.row import Row
from cs336_alignment.data.splits import prepare_run
from cs336_alignment.errors import ExitStatus, UserError, UserErrors
from cs336_alignment.model.loading import load_tokenizer
from cs336_alignment.model.source import resolve_model
from tests.faults.tally import Tally

LINT = LintConfig(**dict.fromkeys(vars(LintConfig()), "off"))
FILES = 200

# From a good row's bytes and a source of chance to a bad one's.
Spoil = Callable[[bytes, random.Random], bytes]


def replacing(field: str, value: str) -> Spoil:
    """Put a JSON text in place of a field's value."""

    def spoil(row: bytes, rng: random.Random) -> bytes:
        fields = json.loads(row)
        parts = [
            f"{json.dumps(k)}: {value if k == field else json.dumps(v)}" for k, v in fields.items()
        ]
        return ("{" + ", ".join(parts) + "}").encode()

    return spoil


def without(field: str) -> Spoil:
    return lambda row, rng: json.dumps(
        {k: v for k, v in json.loads(row).items() if k != field}
    ).encode()


def insert(raw: bytes) -> Spoil:
    """Put bytes somewhere inside the response's text."""

    def spoil(row: bytes, rng: random.Random) -> bytes:
        start = row.index(b'"response": "') + len(b'"response": "')
        place = rng.randrange(start, len(row) - 2)
        return row[:place] + raw + row[place:]

    return spoil


SPOILT: dict[str, Spoil] = {
    "cut off": lambda row, rng: row[: rng.randrange(1, len(row) - 1)],
    "its beginning lost": lambda row, rng: row[rng.randrange(1, len(row) - 1) :],
    "a quote inside": insert(b'"'),
    "a control character": insert(b"\x00"),
    "a tab unescaped": insert(b"\t"),
    "no UTF-8": insert(b"\xff"),
    "half a UTF-8 character": insert(b"\xc3"),
    "half a surrogate pair": insert(b"\\ud83d"),
    "an unknown escape": insert(b"\\q"),
    "a list": lambda row, rng: b"[" + row + b"]",
    "two rows on a line": lambda row, rng: row + b" " + row,
    "a comma behind": lambda row, rng: row + b",",
    "a comma at the end": lambda row, rng: row[:-1] + b",}",
    "a number": lambda row, rng: str(rng.random()).encode(),
    "null": lambda row, rng: b"null",
    "single quotes": lambda row, rng: row.replace(b'"', b"'"),
    "a key twice": lambda row, rng: row[:-1] + b', "response": "again"}',
    "response null": replacing("response", "null"),
    "response a number": replacing("response", "3"),
    "response NaN": replacing("response", "NaN"),
    "response true": replacing("response", "true"),
    "response a list": replacing("response", '["a"]'),
    "response an object": replacing("response", '{"a": 1}'),
    "response empty": replacing("response", '""'),
    "response blank": replacing("response", '" \\t\\n"'),
    "response missing": without("response"),
    "prompt null": replacing("prompt", "null"),
    "prompt a number": replacing("prompt", "1e999"),
    "prompt missing": without("prompt"),
    "prompt a list of numbers": replacing("prompt", "[1, 2]"),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve_model("builtin:arithmetic", None, False))


def one_bad_row(seed: int) -> tuple[str, bytes, int]:
    """Make a file; returns the kind of its bad row, its content and the bad row's line."""
    rng = random.Random(seed)
    kind = list(SPOILT)[seed % len(SPOILT)]
    good = [
        json.dumps({"prompt": f"q{i}", "response": "an answer " * rng.randint(1, 4)}).encode()
        for i in range(rng.randint(2, 12))
    ]
    # Not the first row: the format is seen from that one.
    bad = rng.randrange(1, len(good))
    newline = rng.choice([b"\n", b"\r\n"])
    content, line, where = rng.choice([b"", b"\xef\xbb\xbf"]), 0, 0
    for index, row in enumerate(good):
        blanks = rng.choice([0, 0, 1, 3])
        content += newline * blanks
        line += blanks + 1
        if index == bad:
            row, where = SPOILT[kind](row, rng), line
        content += row + (newline if index < len(good) - 1 or rng.random() < 0.5 else b"")
    return kind, content, where


@pytest.mark.fault("T11 T12 files with one bad row, from seeds")
def test_every_bad_row_is_named_with_its_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, tally: Tally
) -> None:
    for seed in range(FILES):
        kind, content, line = one_bad_row(seed)
        path = tmp_path / f"{seed}.jsonl"
        path.write_bytes(content)
        config = DataConfig(str(path), lint=LINT, cache_dir=str(tmp_path / "cache"), num_workers=1)
        with tally.point(f"seed {seed}, {kind}"):
            try:
                prepare_run(config, tokenizer, seed=0)
            except UserErrors as caught:
                assert caught.status == ExitStatus.BAD_DATA
                assert [e.place and e.place.line for e in caught.errors] == [line], str(caught)
            else:
                raise AssertionError("it was accepted")


# Searches, for ten minutes together.

SEARCH = settings(
    max_examples=200, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20,
)  # fmt: skip
PIECES = st.lists(
    st.binary(max_size=8)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.sampled_from(
        [b"\n", b"\r\n", b"\r", b"{", b"}", b"[", b"]", b'"', b"\\", b"\\u", b"\xef\xbb\xbf", b"\x00",
         b'{"prompt": "a", "response": "b"}', b",", b":", b"1e999", b"-", b"9" * 5000]
    ),
    max_size=30,
).map(b"".join)  # fmt: skip


def search(check: Callable[..., None], strategy: Any, seconds: float, tally: Tally) -> None:
    """Try examples for so long; a failing one is lost, with what hypothesis shrank it to."""
    end = time.monotonic() + seconds

    @SEARCH
    @given(strategy)
    def search_on(value: Any) -> None:
        tally.tried += 1
        check(value)

    while time.monotonic() < end and not tally.lost:  # other examples each time
        try:
            search_on()
        except Exception as failure:
            notes = "\n".join(getattr(failure, "__notes__", ()))
            tally.lost.append(f"{failure!r}\n{notes}")


def read_both(tmp_path: Path, raw: bytes) -> None:
    for reader in (read_json_lines, read_json):
        lines = 1 + raw.count(b"\n") + raw.count(b"\r")
        try:
            for row in reader(io.BytesIO(raw), tmp_path / "x.jsonl"):
                place = row.place
                assert place is not None and place.line is not None and 1 <= place.line <= lines
                assert isinstance(row, UserError) or isinstance(row.fields, dict)
                if isinstance(row, Row):
                    json.dumps(row.fields, ensure_ascii=False).encode()
                else:
                    str(row).encode()
        except UserError as error:
            assert error.status == ExitStatus.BAD_DATA


WORDS = st.sampled_from(
    ["null", "true", "-1", "0", "1", "1e400", "nan", "[]", "{}", "[1,2]", "{a: b}", "''", "'\"'", "${seed}",
     "${oc.env:NOWHERE}", "${nothing.here}", "???", "a,b", "x y", "ä", "1e-5", ".5", "99999999999999999999"]
) | st.text(max_size=6)  # fmt: skip
OVERRIDES = st.lists(
    st.tuples(
        st.sampled_from(["", "", "", "+", "++", "~"]),
        st.sampled_from([*ALL_KEYS, "experiment", "model", "trainer", "data", "logger", "nothing", "data.nothing"])
        | st.text(max_size=5),
        st.just("=") | st.sampled_from(["", "==", " = "]),
        WORDS,
    ).map("".join).filter(lambda word: "hydra" not in word and not word.startswith("-")),
    max_size=4,
)  # fmt: skip


@pytest.mark.parametrize("seconds", [5, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.timeout(400)
@pytest.mark.fault("T12 bytes that hypothesis makes up, both readers")
def test_no_bytes_bring_a_reader_down(seconds: float, tmp_path: Path, tally: Tally) -> None:
    search(lambda raw: read_both(tmp_path, raw), PIECES, seconds, tally)


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(5, marks=pytest.mark.slow), pytest.param(300, marks=pytest.mark.long)],
)
@pytest.mark.timeout(400)
@pytest.mark.fault("overrides that hypothesis makes up")
def test_no_override_brings_the_command_line_down(
    seconds: float, tmp_path: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cs336_alignment.training.run.train", lambda *_: ExitStatus.DONE)

    def check(overrides: list[str]) -> None:
        status = cli.run(["train", "model.name_or_path=m", "data.train_path=d", *overrides])
        error = capsys.readouterr().err
        assert status in (0, 2, 78), (status, error)
        assert "Traceback" not in error
        assert (error.count("error[") >= 1) == (status != 0)

    search(check, OVERRIDES, seconds, tally)
    assert not list(tmp_path.iterdir())
