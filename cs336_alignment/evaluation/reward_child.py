"""What runs a user's reward function, where it can be killed: a program of its own.

It reads a line of JSON from standard input for each response and writes one to standard output, and
ends when standard input closes, or by the system's hand when the run that started it is gone. What
the function prints goes to standard error.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE = 5.0  # seconds beyond the limit after which this process ends itself, if nobody did


def find(path: str) -> tuple[Callable[[str, str], Any], dict[str, Any]]:
    """Import `package.module:function`; returns it and the file it is from, with its hash."""
    module_name, _, names = path.partition(":")
    module = importlib.import_module(module_name)
    function: Any = module
    for name in names.split("."):
        function = getattr(function, name)
    if not callable(function):
        raise TypeError(f"{names} is a {type(function).__name__}, no function")
    file = getattr(module, "__file__", None)
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
    return function, {"file": file, "sha256": digest}


def plain(value: Any) -> Any:
    """Turn a number of numpy or torch into Python's."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def describe(failure: BaseException) -> str:
    """Name an exception in a line."""
    first = (str(failure).splitlines() or [""])[0]
    return f"it raised {type(failure).__name__}" + (f": {first}" if first else "")


def main() -> None:
    """Answer until nobody asks any more."""
    questions = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    # The function may read standard input and print: neither is part of the conversation.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    setup = json.loads(questions.readline())
    sys.path[:] = setup["sys_path"]
    from cs336_alignment.orphans import end_with

    if not end_with(setup["parent"]):
        os._exit(0)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content, default=plain).encode() + b"\n")
        answers.flush()

    try:
        function, source = find(setup["function"])
    except BaseException as failure:
        answer({"error": describe(failure)})
        return
    answer({"source": source})
    for line in questions:
        question = json.loads(line)
        # Python need not run for this one: it also ends a function that never comes back to it.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, setup["seconds"] + PATIENCE)
        try:
            answer({"value": function(question["response"], question["ground_truth"])})
        except BaseException as failure:
            answer({"error": describe(failure)})
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
