"""The page of viewed examples: one HTML file that loads nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

from cs336_alignment.data.token_view import KINDS, ViewedExample
from cs336_alignment.files import write_text
from cs336_alignment.html_page import build_page


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
    data = page_data(examples, heading=heading, summary=summary)
    write_text(path, build_page(template, title=heading, data=data))


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
        groups = groupby(example.tokens, key=lambda token: (token.kind, token.weight))
        runs = [[KINDS.index(kind), weight, len(list(run))] for (kind, weight), run in groups]
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
