"""Numbers read exactly, quantities parted into value and unit, and lists into their items."""

from __future__ import annotations

import re
from fractions import Fraction

from cs336_alignment.evaluation.spelling import bracket_depths, split_commas

_INT = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?:[ ]\d{3})+|\d+)"
_NUM = rf"(?:{_INT}(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)(?:
        (?:(?P<whole>\d+)\s?)?\\frac\{{(?P<top>-?{_NUM})\}}\{{(?P<bottom>-?{_NUM})\}}
      | (?P<whole_>\d+)\ (?P<top_>\d+)/(?P<bottom_>\d+)
      | (?P<top__>{_NUM})/(?P<bottom__>-?{_NUM})
      | 10\^\{{(?P<exponent__>-?\d{{1,3}})\}}
      | (?P<number>{_NUM})
        (?:[eE](?P<exponent>[-+]?\d{{1,3}})|\*10\^\{{(?P<exponent_>-?\d{{1,3}})\}})?
    )""",
    re.VERBOSE,
)

_CURRENCY = re.compile(r"([-+]?)(?:(US\$|\$|€|£)|(USD|EUR|GBP) ) ?(?=[-+.\d\\(])", re.I)
_UNIT_NAMES = {
    **{"$": "dollar", "us$": "dollar", "usd": "dollar", "¢": "cent"},
    **{"€": "euro", "eur": "euro", "£": "pound", "gbp": "pound"},
    **{"%": "percent", "pct": "percent", "percentage": "percent"},
    **{"inche": "inch", "feet": "foot", "ft": "foot"},
}
# "5m" and "5x" are products; only these may touch their number, and only these letters stand alone
_GLUED = frozenset(
    re.findall(
        "[A-Za-z]+", "km cm mm nm kg mg ml mL lb lbs oz ft hr hrs min mins sec mph am pm usd"
    )
)
_LETTERS = frozenset("mgshlLNJWVKCF")
# words after a number that make it another number, or no number
_NOT_UNITS = frozenset(
    re.findall(
        "[a-z]+",
        "or and to than plus minus times over of is not was by point negative half halves "
        "third thirds quarter quarters fourth fourths fifth fifths sixth sixths eighth eighths "
        "tenth tenths hundredth hundredths thousandth thousandths "
        "hundred thousand million billion trillion dozen dozens squared cubed factorial",
    )
)
_UNIT = re.compile(
    r" ?/?(?:[%¢$€£]|[A-Za-z][A-Za-z'.]*(?:\^\{-?\d\})?"
    r"(?:[-/* ][A-Za-z][A-Za-z'.]*(?:\^\{-?\d\})?)*)"
)
_UNIT_START = re.compile(r"[ /%¢$€£A-Za-z]")


def _unit_name(text: str) -> str | None:
    """The canonical name of what follows a number, or None if that is no unit."""
    if not _UNIT.fullmatch(text):
        return None
    words = re.findall(r"[A-Za-z'.]+|[%¢$€£]", text)
    glued = text[0].isalpha()
    if len(words) > 5 or (glued and words[0] not in _GLUED):
        return None
    for word in words:
        if word.casefold() in _NOT_UNITS or re.fullmatch("[abcxyz]{1,2}", word):
            return None
        if len(word) == 1 and word.isalpha() and word not in _LETTERS:
            return None
    name = text.strip().casefold().replace(".", "")
    name = re.sub(r"(?<=[a-z]{2})s\b", "", name)
    return _UNIT_NAMES.get(name, name)


def peel_unit(text: str) -> tuple[str, str]:
    """Part a quantity into its bare value and its unit (empty if it has none)."""
    money = _CURRENCY.match(text)
    if money:
        unit = _UNIT_NAMES[(money[2] or money[3]).casefold()]
        value, suffix = peel_unit(money[1] + text[money.end() :])
        return (value, unit) if suffix in ("", unit) else (text, "")
    if not re.match(r"[-+.\d\\(\[{]", text):
        return text, ""
    for start in _UNIT_START.finditer(text):
        body, name = text[: start.start()], _unit_name(text[start.start() :])
        # "5 h" is five hours, but in "2\pi h" the letter is a factor
        ending = r"\d$" if re.fullmatch(" [A-Za-z]", text[start.start() :]) else r"[\d)}\].]$|\\pi$"
        if name is not None and re.search(ending, body):
            return body, name
    return text, ""


def exact(text: str) -> Fraction | None:
    """Read the number that the whole text spells, or None; exponents are short, so it is quick."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    group = {name.rstrip("_"): value for name, value in match.groupdict().items() if value}

    def read(name: str, default: str) -> Fraction:
        return Fraction(re.sub("[, ]", "", group.get(name, default)).rstrip("."))

    if "bottom" in group:
        if read("bottom", "1") == 0:
            return None
        value = read("whole", "0") + read("top", "0") / read("bottom", "1")
    else:
        value = read("number", "1") * Fraction(10) ** int(group.get("exponent", "0"))
    return -value if match["sign"] == "-" else value


def split_items(text: str) -> tuple[str, list[str]] | None:
    """Give brackets and items of a list, set, tuple, interval or union; None for anything else."""
    if exact(text) is not None:
        return None
    depths = bracket_depths(text)
    unions = [m for m in re.finditer(r"\\cup(?![A-Za-z])", text) if depths[m.start()] == 0]
    if unions:
        bounds = [0, *(i for m in unions for i in m.span()), len(text)]
        return "∪", [text[a:b].strip() for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
    body = re.match(r"(\\?[{(\[])(.*?)(\\?[})\]])$", text)
    if body and depths[-1] == 0 and min(depths[len(body[1]) - 1 : -1]) > 0:
        parts = split_commas(body[2])
        brackets = (body[1] + body[3]).replace("\\", "")
        is_list = len(parts) > 1 or body[1] == "\\{"
        return ("" if brackets == "{}" else brackets, parts) if is_list else None
    if len(signs := text.split("\\pm")) == 2 and "," not in text:  # the two that it stands for
        plus = "" if re.search(r"(?:^|[=(])$", signs[0]) else "+"
        return "", [signs[0] + plus + signs[1], signs[0] + "-" + signs[1]]
    parts = split_commas(re.sub(r",? (?:and|or) ", ", ", text))
    return ("", parts) if len(parts) > 1 else None
