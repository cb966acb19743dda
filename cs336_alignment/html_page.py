"""Pages of one HTML file that load nothing else, and in which data stays data."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from typing import Any

CODE_PLACE = re.compile(r"@@(style|script|library)@@")
PLACE = re.compile(r"@@(title|script_hash|data)@@")
SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def build_page(
    template: str, *, title: str, data: Any, code: Mapping[str, str] | None = None
) -> str:
    """Fill a template of this package.

    Args:
        template: with the places `@@title@@`, `@@script_hash@@` (in the page's policy) and
            `@@data@@`; each `<script>` without attributes is code.
        title: of the page.
        data: for JSON.
        code: files of this package for `@@style@@`, `@@script@@` and `@@library@@`, which are
            filled first.

    Raises:
        ValueError: the data holds NaN or infinities.
    """
    if code:
        template = CODE_PLACE.sub(lambda place: code[place[1]], template)
    # The page's policy lets these scripts run, so nothing in the data ever could.
    digests = [hashlib.sha256(text.encode("utf-8")).digest() for text in SCRIPT.findall(template)]
    assert digests
    parts = {
        "title": html.escape(title.encode("utf-8", "replace").decode("utf-8")),
        "script_hash": "' 'sha256-".join(base64.b64encode(d).decode("ascii") for d in digests),
        "data": inert_json(data),
    }
    # All at once: a text of the data that looks like a place is not filled in turn.
    return PLACE.sub(lambda place: parts[place[1]], template)


def inert_json(value: Any) -> str:
    """Write JSON that ends no script and opens no tag: in ASCII, with <, > and & as escapes.

    The parser of HTML looks for `</script` and `<!--` in the text itself, whatever it means as
    JSON; all three signs occur in strings alone, where an escape is the same sign.

    Raises:
        ValueError: there are NaN or infinities.
    """
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"})
