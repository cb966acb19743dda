"""The page holds exactly the examples, and nothing in them becomes markup or script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cs336_alignment.data.token_page import write_page
from cs336_alignment.data.token_view import KINDS, VISIBLE, ViewedExample, ViewedToken

HOSTILE = [
    "</script><img src=x onerror=alert(1)>", "<!--<script>", "-->", "]]>", "</title></head>", "\"'`&amp;&lt;",
    "\u2028\u2029\x00\x1b\r\n", "@@data@@ @@title@@", "\\u003c/script>", "\\", "</SCRIPT >", "\ud800", "🌈彩", "",
]  # fmt: skip
EXAMPLES = [
    ViewedExample(
        "row 3 · data/train.jsonl:4",
        (
            ViewedToken("<s>", 0, "special", 0.0),
            ViewedToken("User:", 7, "scaffold", 0.0),
            ViewedToken(" 1", 5, "context", 0.0),
            ViewedToken(" 1", 5, "trained", 0.25),
            ViewedToken(" 1", 5, "trained", 0.25),
            ViewedToken(" 1", 5, "trained", 1.0),
        ),
    ),
    ViewedExample("empty", ()),
    *(
        ViewedExample(text, (ViewedToken(text, 9, "trained"), ViewedToken("x", 8, "context")), (text,))
        for text in HOSTILE
    ),
]  # fmt: skip


class Page(HTMLParser):
    """Collects the tags with their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside = ""
        self.texts: dict[str, list[str]] = {"script": [], "title": []}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in self.texts:
            self.inside = tag
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[self.inside][-1] += data


def written(folder: Path, examples: list[ViewedExample], heading: str = "What is trained") -> str:
    path = folder / "page.html"
    write_page(path, examples, heading=heading, summary=[("rows", "3"), (heading, heading)])
    return path.read_text(encoding="utf-8")


def read_back(data: dict) -> list[ViewedExample]:
    examples = []
    for item in data["examples"]:
        parts = [
            (data["kinds"][kind], weight) for kind, weight, n in item["runs"] for _ in range(n)
        ]
        pieces = [data["pieces"][place] for place in item["tokens"]]
        tokens = tuple(
            ViewedToken(text, token_id, kind, weight)
            for (token_id, text), (kind, weight) in zip(pieces, parts, strict=True)
        )
        examples.append(ViewedExample(item["title"], tokens, tuple(item["findings"])))
    return examples


def test_the_page_holds_the_examples(tmp_path: Path) -> None:
    page = Page(written(tmp_path, EXAMPLES))
    data = json.loads(page.texts["script"][0])
    assert read_back(data) == EXAMPLES
    assert data["heading"] == "What is trained" and data["summary"][0] == ["rows", "3"]
    assert data["kinds"] == list(KINDS)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_equal_pieces_are_held_once(tmp_path: Path) -> None:
    tokens = tuple(ViewedToken(" the", 3, "context") for _ in range(5000))
    text = written(tmp_path, [ViewedExample("a", tokens)] * 20)
    assert len(text) < len(written(tmp_path, [])) + 20 * 5000 * 2 + 2000


@pytest.mark.parametrize("heading", HOSTILE)
def test_nothing_in_the_data_becomes_markup(tmp_path: Path, heading: str) -> None:
    empty = Page(written(tmp_path, [], "plain"))
    text = written(tmp_path, EXAMPLES, heading)
    page = Page(text)
    assert page.tags == empty.tags
    assert [dict(attrs) for tag, attrs in page.tags if tag == "script"] == [
        {"id": "data", "type": "application/json"}, {},
    ]  # fmt: skip
    data = page.texts["script"][0]
    assert data.isascii() and not set(data) & set("<>&")
    assert json.loads(data)["heading"] == heading
    # HTML itself turns \r into \n and knows no NUL, so the title's blanks are not compared.
    wanted = heading.replace("\ud800", "?").split()
    assert page.texts["title"][0].split() == wanted


def test_the_page_loads_nothing_and_runs_its_one_script(tmp_path: Path) -> None:
    text = written(tmp_path, EXAMPLES)
    page = Page(text)
    assert not re.search(
        r"https?:|url\(|@import|innerHTML|insertAdjacentHTML|document\.write|eval\(",
        page.texts["script"][1],
    )
    for tag, attributes in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "base"}
        assert not {"src", "srcset", "style"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"url\(|@import", style)
    policy = next(
        a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(page.texts["script"][1].encode()).digest()).decode()
    assert policy is not None
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_page_and_terminal_make_the_same_signs_visible(tmp_path: Path) -> None:
    script = Page(written(tmp_path, [])).texts["script"][1]
    found = re.search(r"const UNSEEN = /(.*)/g;", script)
    assert found is not None
    unseen = re.compile(found[1])
    assert {code for code in range(0x10000) if unseen.fullmatch(chr(code))} == set(VISIBLE)


def test_a_refused_write_leaves_the_old_page(tmp_path: Path) -> None:
    old = written(tmp_path, EXAMPLES[:1])
    bad = ViewedExample("a", (ViewedToken("x", 1, "trained", float("nan")),))
    with pytest.raises(ValueError):
        written(tmp_path, [bad])
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == old
    with pytest.raises(OSError):
        write_page(tmp_path / "none" / "page.html", [], heading="a", summary=[])
