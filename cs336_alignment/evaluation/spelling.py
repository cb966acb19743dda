"""One spelling for each answer: wrappers, layout and synonyms gone, so that equal texts compare."""

from __future__ import annotations

import itertools
import re
import unicodedata

# ½ and its like, of which Unicode says that they are a number, a fraction slash and a number
_FRACTIONS = {
    char: f" {unicodedata.normalize('NFKC', char).replace(chr(0x2044), '/')}"
    for char in map(chr, (0xBC, 0xBD, 0xBE, *range(0x2150, 0x215F), 0x2189))
}
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–—‐‑﹣－", "-"),
        **dict.fromkeys("＋﹢", "+"),
        ";": ", ",
        **{letter: rf"\mathbb{{{plain}}}" for letter, plain in zip("ℝℤℕℚℂ", "RZNQC", strict=True)},
        **dict.fromkeys("\u00a0\u2009\u202f\t\n\r", " "),
        **{"×": "*", "·": "*", "÷": "/", "⁄": "/", "°": " degrees"},
        **_FRACTIONS,
        **{
            "π": r"\pi ",
            "∞": r"\infty ",
            "√": r"\sqrt ",
            "±": r"\pm ",
            "∪": r"\cup ",
            "∅": r"\emptyset ",
        },
        **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne "},
    }
)

# In this order: a later rule may rely on an earlier one.
_SPELLINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\$(?! )([^$]*[^$ \\])\$(?!\d)", r"\1"),  # inline math; "$5 and $6" is money
        (r"\\(?:displaystyle|textstyle|left|right|[bB]igg?[lr]?)(?![A-Za-z])", ""),
        (r"\\(?:bf|it|rm|large|Large)(?![A-Za-z])", ""),
        (r"(?:\\\\\s*)+$", ""),
        (r"(?<![\d'’.,])(\d{1,3})(?:['’](\d{3}))(?:['’](\d{3}))?(?![\d'’])", r"\1\2\3"),  # 1'000
        (r"\bper cent\b", "percent"),
        (r"(?<![A-Za-z\\])[Ii]nfinity(?![A-Za-z])", r"\\infty "),
        (r"(?<!\\)\\!", ""),  # 10,\!000
        (r"\{,\}(?=\d)", ","),  # 10{,}000
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~", " "),
        (r"\\([$%])", r"\1"),
        (r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])", " degrees"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d|(?=\{))", r"\\frac{\1}{\2}"),
        (r"(\\frac\{\d+\})\{\}(?=\{)", r"\1"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"\\(?:cdot|times)(?![A-Za-z])", "*"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\(le|ge|ne)q(?:slant)?(?![A-Za-z])", r"\\\1"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"(?<=[)\]]) ?U ?(?=[(\[])", r"\\cup "),
        (r"\\(?:varnothing|\{\s*\\\})", r"\\emptyset"),
        (r"\*\*", "^"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))", r"\\sqrt{\1\2}"),
        (r"(?<![A-Za-z\\])(sin|cos|tan|log|ln|exp)(?=\s*\()", r"\\\1"),
        (r"\^\s*(-?\d+|[A-Za-z])", r"^{\1}"),  # x^10 is never meant as (x^1)0
        (r"\^\s*\(([^()]*)\)", r"^{\1}"),
        (r"_\s*(\d+|[A-Za-z])", r"_{\1}"),
        (r" +", " "),
        (r" ?([-+*/^=<>]) ?", r"\1"),
        (r"([(\[{]) ", r"\1"),
        (r" ([)\]}])", r"\1"),
        (r"(\\[A-Za-z]+) (?![A-Za-z])", r"\1"),
    )
)

_WRAPPERS = (
    ("**", "**"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("*", "*"),
    ("__", "__"), ("`", "`"), ('"', '"'), ("“", "”"), (r"\boxed{", "}"), (r"\fbox{", "}"),
    ("{", "}"), ("(", ")"),
)  # fmt: skip


def bracket_depths(text: str) -> list[int]:
    """Count the brackets open after each character; `\\{` counts as `{`, `(1,2]` as balanced."""
    depth, depths = 0, []
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        depths.append(depth)
    return depths


def split_commas(text: str) -> list[str]:
    """Split at the commas outside brackets; in "1,234, 5" the first one separates thousands."""
    commas = [i for i, depth in enumerate(bracket_depths(text)) if depth == 0 and text[i] == ","]
    if any(text[i + 1 : i + 2] == " " for i in commas):
        commas = [i for i in commas if not re.match(r",\d{3}(?!\d)", text[i:])]
    bounds = [-1, *commas, len(text)]
    return [text[a + 1 : b].strip() for a, b in itertools.pairwise(bounds)]


def _unwrap(text: str) -> str:
    """Take off one layer that says nothing of the value: `$…$`, `\\boxed{…}`, `(…)`, `**…**`."""
    for opening, closing in _WRAPPERS:
        if not (text.startswith(opening) and text.endswith(closing)):
            continue
        if len(text) <= len(opening) + len(closing):
            continue
        inner = text[len(opening) : -len(closing)]
        depths = bracket_depths(inner)
        if opening == closing and opening in inner:
            continue  # "$5 or 6$" is one formula, "$5$ or $6$" is two
        if min(depths) < 0 or depths[-1] != 0 or inner.endswith("\\"):
            continue  # "(x+1)(x-1)": the first bracket is not closed by the last
        if opening in ("{", "(") and len(split_commas(inner)) > 1:
            continue  # a set or a tuple, not a grouping
        return inner
    return text


def _strip_layers(text: str) -> str:
    """Take off wrappers and final punctuation, in whatever order they come."""
    previous = None
    while text != previous:  # each round takes something away or is the last
        previous = text
        text = text.strip()
        if not text.endswith(("..", "…")):  # 0.333... is not 0.333
            text = re.sub(r"(?:(?<!\\)[.,;:?]|\s)+$", "", text)
        text = _unwrap(text)
    return text


def _group(sign: str, text: str, plain: dict[str, str]) -> str:
    return f"{sign}{{{''.join(plain[char] for char in text)}}}"


def normal_form(text: str) -> str:
    """Bring an answer into the one spelling that all comparisons expect."""
    text = re.sub(f"[{''.join(_RAISED)}]+", lambda m: _group("^", m[0], _RAISED), text)
    text = re.sub(f"[{''.join(_LOWERED)}]+", lambda m: _group("_", m[0], _LOWERED), text)
    text = _strip_layers(text.translate(_CHARACTERS))
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return _strip_layers(text)


def same_text(answer: str, truth: str) -> bool:
    """Tell whether two normal forms are the same text; outside LaTeX, case is no difference."""
    if "\\" in answer or "\\" in truth:
        return answer == truth  # \Delta is not \delta
    return answer.casefold() == truth.casefold()
