"""The page of viewed examples: one HTML file that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

from cs336_alignment.data.token_view import KINDS, ViewedExample
from cs336_alignment.files import replacing

PLACE = re.compile(r"@@(title|script_hash|data)@@")
SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def write_page(
    path: Path,
    examples: Sequence[ViewedExample],
    *,
    heading: str,
    summary: Sequence[tuple[str, str]],
) -> None:
    """Write a page on which a person goes through examples token by token.

    Args:
        path: the HTML file, replaced at once.
        examples: in the order in which they are shown at first.
        heading: of the page.
        summary: names and values under the heading.

    Raises:
        OSError: the disk refuses.
    """
    template = (resources.files("cs336_alignment") / "assets" / "inspect.html").read_text("utf-8")
    script = SCRIPT.search(template)
    assert script is not None
    # The page's policy lets this one script run, so nothing in the data ever could.
    digest = hashlib.sha256(script[1].encode("utf-8")).digest()
    parts = {
        "title": html.escape(heading.encode("utf-8", "replace").decode("utf-8")),
        "script_hash": base64.b64encode(digest).decode("ascii"),
        "data": _inert_json(page_data(examples, heading=heading, summary=summary)),
    }
    # All at once: a text of the data that looks like a place is not filled in turn.
    page = PLACE.sub(lambda place: parts[place[1]], template)
    with replacing(path) as file:
        file.write(page.encode("utf-8"))


def page_data(
    examples: Sequence[ViewedExample], *, heading: str, summary: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Give what the page holds: each different (id, text) once, kinds and weights as runs.

    Returns:
        `heading`, `summary`, `kinds`, `pieces` as [id, text], and `examples` with `title`,
        `findings`, `tokens` (places in `pieces`) and `runs` ([place in `kinds`, weight, tokens]).
    """
    places: dict[tuple[int, str], int] = {}
    shown = []
    for example in examples:
        tokens = [
            places.setdefault((token.token_id, token.text), len(places)) for token in example.tokens
        ]
        runs = [
            [KINDS.index(kind), weight, len(list(run))]
            for (kind, weight), run in groupby(
                example.tokens, key=lambda token: (token.kind, token.weight)
            )
        ]
        shown.append(
            {
                "title": example.title,
                "findings": list(example.findings),
                "tokens": tokens,
                "runs": runs,
            }
        )
    return {
        "heading": heading,
        "summary": [list(pair) for pair in summary],
        "kinds": list(KINDS),
        "pieces": [list(piece) for piece in places],
        "examples": shown,
    }


def _inert_json(value: Any) -> str:
    """Write JSON that ends no script and opens no tag: in ASCII, with <, > and & as escapes.

    The parser of HTML looks for `</script` and `<!--` in the text itself, whatever it means as
    JSON; all three signs occur in strings alone, where an escape is the same sign.
    """
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"})
