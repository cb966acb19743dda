"""Where a text says its final answer: after GSM8K's `####`, or in the last `\\boxed{}`."""

from __future__ import annotations

import re

FINAL_MARK = "####"
# GSM8K's end: a line of its own, the last one. A Markdown heading further up is none.
FINAL_LINE = re.compile(r"(?:\A|\n)[ \t]*####(?!#)[ \t]*([^\n]*)\s*\Z")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Give what the last `\boxed{…}` or `\fbox{…}` holds, with balanced braces.

    Args:
        text: a solution or a response.

    Returns:
        The stripped content (perhaps empty), of `\boxed 5` the next word; of nested boxes that of
        the innermost. None if there is no box, or the last one is never closed.

    Example:
        >>> last_boxed(r"so $\boxed{\frac{1}{2}}$.")
        '\\frac{1}{2}'
        >>> last_boxed(r"\boxed{1} and \boxed{2") is None
        True
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    rest = text[boxes[-1].end() :].lstrip(" ")
    if not rest.startswith("{"):
        bare = re.match(r"[^\s$.,;{}\\][^\s$,;{}\\]*", rest)
        return bare[0].rstrip(".") if bare else None
    depth = 0
    for brace in _BRACE.finditer(rest):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)  # \{ and \} are characters, no groups
        if depth == 0 and brace[0] == "}":
            return rest[1 : brace.start()].strip()
    return None
