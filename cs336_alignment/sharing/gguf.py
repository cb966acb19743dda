"""GGUF, the format of llama.cpp: made by its own converter, which must be installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cs336_alignment.errors import UserError

CONVERTERS = ("convert_hf_to_gguf.py", "convert_hf_to_gguf", "convert-hf-to-gguf")
QUANTIZER = "llama-quantize"
OUT_TYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
MAGIC = b"GGUF"
NOTE_SECONDS = 60.0
HINT = (
    "llama.cpp brings it: clone its repository, `pip install -r requirements.txt` there, and put "
    "the folder on PATH or give export.gguf_converter=…/convert_hf_to_gguf.py"
)


@dataclass(frozen=True)
class Tools:
    """The programs of llama.cpp.

    Attributes:
        converter: from a Hugging Face folder to a GGUF file.
        quantizer: from one GGUF file to a smaller one; None: not asked for.
    """

    converter: Path
    quantizer: Path | None


def find_tools(converter: str | None, quantizes: bool) -> Tools:
    """Find the programs before anything is made.

    Args:
        converter: its path; None: it is on PATH.
        quantizes: whether the quantizer is needed, too.

    Raises:
        UserError: one of them is not installed (66).
    """
    if converter is not None:
        found: str | None = str(Path(converter).expanduser())
        if not Path(str(found)).is_file():
            raise _not_found(f"export.gguf_converter={converter}", "a file", HINT)
    else:
        found = next((path for path in map(shutil.which, CONVERTERS) if path), None)
    if found is None:
        raise _not_found("convert_hf_to_gguf.py", "a program on PATH", HINT)
    quantizer = shutil.which(QUANTIZER) if quantizes else None
    if quantizes and quantizer is None:
        hint = "build or install llama.cpp and put its programs on PATH; export.gguf_type=null"
        raise _not_found(QUANTIZER, "a program on PATH", f"{hint} leaves the weights as they are")
    return Tools(Path(found), None if quantizer is None else Path(quantizer))


def convert(
    tools: Tools, model: Path, target: Path, dtype: str, quantized: str | None,
    note: Callable[[str], None],
) -> None:  # fmt: skip
    """Make a GGUF file.

    Args:
        tools: of `find_tools`.
        model: a Hugging Face folder.
        target: the file.
        dtype: of the weights: fp32, bf16 or fp16.
        quantized: what the quantizer makes of them; None: nothing.
        note: prints a line, now and then while a program works.

    Raises:
        UserError: one of the programs fails (70).
    """
    whole = target if quantized is None else target.with_suffix(".whole")
    python = [sys.executable] if tools.converter.suffix == ".py" else []
    kind = OUT_TYPES[dtype]
    command = [*python, str(tools.converter), str(model)]
    _run([*command, "--outfile", str(whole), "--outtype", kind], whole, note)
    if quantized is not None:
        _run([str(tools.quantizer), str(whole), str(target), quantized], target, note)
        whole.unlink()
    with target.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise _failed(command, f"{target.name} is no GGUF file")


def _run(command: list[str], made: Path, note: Callable[[str], None]) -> None:
    begin = time.monotonic()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace",
    ) as program:  # fmt: skip
        try:
            while True:
                try:
                    out, error = program.communicate(timeout=NOTE_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    note(f"convert  still at work, {(time.monotonic() - begin) / 60:.0f} min")
        except BaseException:
            program.kill()
            raise
    if program.returncode or not made.is_file():
        said = (out + error).strip().splitlines()
        raise _failed(command, " / ".join(said[-3:]) or "it said nothing")


def _failed(command: list[str], why: str) -> UserError:
    program = next(word for word in command if word != sys.executable)
    return UserError(
        "R362",
        f"{Path(program).name} made no GGUF file",
        expected="exit status 0 and a file",
        got=why[-600:],
        hint="does llama.cpp know this architecture? A newer one may",
    )


def _not_found(what: str, expected: str, hint: str) -> UserError:
    return UserError(
        "R361",
        f"{what} is not there, and GGUF is made with it",
        expected=expected,
        hint=hint,
    )
