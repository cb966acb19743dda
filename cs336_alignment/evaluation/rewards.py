r"""Rewards: does a response keep the format, and is its answer mathematically the ground truth?

`answers_equal` asks three questions, cheapest first, and the first that can decide does:

1. Are the normal forms the same text? (`\boxed{}`, `$…$`, case, spacing, a final full stop gone)
2. Are both sides numbers? Then they are compared exactly as fractions: `0.333` is not `1/3`.
3. Does math-verify find the *whole* of both texts equal? It is never allowed to pick a number out
   of a text (its `parse("4x+10")` is 4), and never sees a power that it could not finish.

Tuples, intervals, sets and lists are compared item by item, units only if both sides have one.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

MAX_CHARS = 300
"""Longer answers are compared as text only: every step below would otherwise need its own bound."""

MAX_SECONDS = 1.5
"""Time for comparing one answer (main thread; in others only the guards below bound it)."""

_MAX_ITEMS = 12
_MAX_DEPTH = 8

# ---- step 1: one spelling for each thing ---------------------------------------------------------

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–—", "-"),
        **dict.fromkeys("\u00a0\u2009\u202f\t\n\r", " "),
        **{"×": "*", "·": "*", "÷": "/", "²": "^2", "³": "^3", "°": " degrees"},
        **{"½": " 1/2", "¼": " 1/4", "¾": " 3/4"},
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
        (r"(?<!\\)\\!", ""),  # 10,\!000
        (r"\{,\}(?=\d)", ","),  # 10{,}000
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~", " "),
        (r"\\([$%])", r"\1"),
        (r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))", " degrees"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\(?:cdot|times)(?![A-Za-z])", "*"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\(le|ge|ne)q(?:slant)?(?![A-Za-z])", r"\\\1"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"\\(?:varnothing|\{\s*\\\})", r"\\emptyset"),
        (r"\*\*", "^"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))", r"\\sqrt{\1\2}"),
        (r"(?<![A-Za-z\\])(sin|cos|tan|log|ln|exp)(?=\s*\()", r"\\\1"),
        (r"\^\s*(-?\d+|[A-Za-z])", r"^{\1}"),  # x^10 is never meant as (x^1)0
        (r"\^\s*\(([^()]*)\)", r"^{\1}"),
        (r" +", " "),
        (r" ?([-+*/^=<>]) ?", r"\1"),
        (r"([(\[{]) ", r"\1"),
        (r" ([)\]}])", r"\1"),
        (r"(\\[A-Za-z]+) (?![A-Za-z])", r"\1"),
    )
)

_WRAPPERS = (
    ("**", "**"),
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    (r"\boxed{", "}"),
    (r"\fbox{", "}"),
    ("{", "}"),
    ("(", ")"),
)


def _depths(text: str) -> list[int]:
    """Bracket depth after each character; `\\{` counts as `{`, and `(1,2]` as balanced."""
    depth, depths = 0, []
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        depths.append(depth)
    return depths


def _unwrap(text: str) -> str:
    """Take off one layer that says nothing of the value: `$…$`, `\\boxed{…}`, `(…)`, `**…**`."""
    for opening, closing in _WRAPPERS:
        if not (text.startswith(opening) and text.endswith(closing)):
            continue
        if len(text) <= len(opening) + len(closing):
            continue
        inner = text[len(opening) : -len(closing)]
        depths = _depths(inner)
        if opening in ("**", "$$", "$") and opening in inner:
            continue  # "$5 or 6$" is one formula, "$5$ or $6$" is two
        if min(depths) < 0 or depths[-1] != 0 or inner.endswith("\\"):
            continue  # "(x+1)(x-1)": the first bracket is not closed by the last
        if opening in ("{", "(") and len(_split_commas(inner)) > 1:
            continue  # a set or a tuple, not a grouping
        return inner
    return text


def _strip_layers(text: str) -> str:
    """Take off wrappers and final punctuation, in whatever order they come."""
    previous = None
    while text != previous:  # each round takes something away or is the last
        previous = text
        text = _unwrap(re.sub(r"(?:(?<!\\)[.,;:?]|\s)+$", "", text.strip()))
    return text


def _normal_form(text: str) -> str:
    """One spelling of an answer for the comparisons below: wrappers, layout and synonyms gone."""
    text = _strip_layers(text.translate(_CHARACTERS))
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return _strip_layers(text)


def _same_text(answer: str, truth: str) -> bool:
    if "\\" in answer or "\\" in truth:
        return answer == truth  # \Delta is not \delta
    return answer.casefold() == truth.casefold()


# ---- step 2: numbers, units, lists ---------------------------------------------------------------

_INT = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?:[ ]\d{3})+|\d+)"
_NUM = rf"(?:{_INT}(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)(?:
        (?:(?P<whole>\d+)\s?)?\\frac\{{(?P<top>-?{_NUM})\}}\{{(?P<bottom>-?{_NUM})\}}
      | (?P<whole_>\d+)\ (?P<top_>\d+)/(?P<bottom_>\d+)
      | (?P<top__>{_NUM})/(?P<bottom__>-?{_NUM})
      | (?P<number>{_NUM})
        (?:[eE](?P<exponent>[-+]?\d{{1,3}})|\*10\^\{{(?P<exponent_>-?\d{{1,3}})\}})?
    )""",
    re.VERBOSE,
)

_CURRENCY = re.compile(r"([-+]?)(?:(US\$|\$|€|£|¥|₹)|(USD|EUR|GBP|INR|JPY) ) ?(?=[-+.\d\\(])", re.I)
_CURRENCY_NAMES = {
    "$": "dollar",
    "us$": "dollar",
    "€": "euro",
    "£": "pound",
    "¥": "yen",
    "₹": "rupee",
}
_UNIT_NAMES = {
    **{"usd": "dollar", "eur": "euro", "gbp": "pound", "inr": "rupee", "jpy": "yen", "¢": "cent"},
    **{"%": "percent", "pct": "percent", "percentage": "percent"},
    **{"inche": "inch", "feet": "foot", "ft": "foot"},
}
_SCALES = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
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
        "tenth tenths hundredth hundredths thousandth thousandths",
    )
)
_UNIT = re.compile(
    r" ?/?(?:%|¢|[A-Za-z][A-Za-z'.]*(?:\^\{-?\d\})?(?:[-/* ][A-Za-z][A-Za-z'.]*(?:\^\{-?\d\})?)*)"
)
_UNIT_START = re.compile(r"[ /%¢A-Za-z]")


def _unit_name(text: str) -> str | None:
    """The canonical name of what follows a number, or None if that is no unit."""
    if not _UNIT.fullmatch(text):
        return None
    words = re.findall(r"[A-Za-z'.]+|%|¢", text)
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


def _peel_unit(text: str) -> tuple[str, str]:
    """Part a quantity into its bare value and its unit (empty if it has none)."""
    money = _CURRENCY.match(text)
    if money:
        symbol = (money[2] or money[3]).casefold()
        unit = _CURRENCY_NAMES.get(symbol) or _UNIT_NAMES[symbol]
        rest, suffix = _peel_unit(money[1] + text[money.end() :])
        words = suffix.split(" ")
        if suffix in ("", unit) or words[0] in _SCALES:
            return (rest, unit) if words[0] not in _SCALES else (rest, f"{words[0]} {unit}")
        return text, ""
    if not re.match(r"[-+.\d\\(\[{]", text):
        return text, ""
    for start in _UNIT_START.finditer(text):
        body, name = text[: start.start()], _unit_name(text[start.start() :])
        # "5 h" is five hours, but in "2\pi h" the letter is a factor
        ending = r"\d$" if re.fullmatch(" [A-Za-z]", text[start.start() :]) else r"[\d)}\].]$|\\pi$"
        if name is not None and re.search(ending, body):
            return body, name
    return text, ""


def _scale(unit: str) -> tuple[int, str]:
    """`million dollar` is a factor of 10**6 and the unit `dollar`."""
    first, _, rest = unit.partition(" ")
    first = first.removesuffix("s")
    return (_SCALES[first], _UNIT_NAMES.get(rest, rest)) if first in _SCALES else (1, unit)


def _exact(text: str) -> Fraction | None:
    """The number that the whole text spells, or None; exponents are short, so this is quick."""
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
        value = read("number", "0") * Fraction(10) ** int(group.get("exponent", "0"))
    return -value if match["sign"] == "-" else value


def _split_commas(text: str) -> list[str]:
    """Split at the commas outside brackets; in "1,234, 5" the first one separates thousands."""
    commas = [i for i, depth in enumerate(_depths(text)) if depth == 0 and text[i] == ","]
    if any(text[i + 1 : i + 2] == " " for i in commas):
        commas = [i for i in commas if not re.match(r",\d{3}(?!\d)", text[i:])]
    bounds = [-1, *commas, len(text)]
    return [text[a + 1 : b].strip() for a, b in itertools.pairwise(bounds)]


def _items(text: str) -> tuple[str, list[str]] | None:
    """The brackets and items of a list, set, tuple, interval or union; None for anything else."""
    if _exact(text) is not None:
        return None
    depths = _depths(text)
    unions = [m for m in re.finditer(r"\\cup(?![A-Za-z])", text) if depths[m.start()] == 0]
    if unions:
        bounds = [0, *(i for m in unions for i in m.span()), len(text)]
        return "∪", [text[a:b].strip() for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
    body = re.match(r"(\\?[{(\[])(.*?)(\\?[})\]])$", text)
    if body and depths[-1] == 0 and min(depths[len(body[1]) - 1 : -1]) > 0:
        parts = _split_commas(body[2])
        brackets = (body[1] + body[3]).replace("\\", "")
        is_list = len(parts) > 1 or body[1] == "\\{"
        return ("" if brackets == "{}" else brackets, parts) if is_list else None
    parts = _split_commas(re.sub(r",? (?:and|or) ", ", ", text))
    return ("", parts) if len(parts) > 1 else None


def _equal_items(answer: Sequence[str], truth: Sequence[str], *, ordered: bool) -> bool:
    if len(answer) != len(truth) or len(truth) > _MAX_ITEMS:
        return False
    if ordered:
        return all(_equal(a, t) for a, t in zip(answer, truth, strict=True))
    left = list(truth)
    for item in answer:
        found = next((i for i, other in enumerate(left) if _equal(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _equal(answer: str, truth: str) -> bool:
    """Compare two normal forms: as text, as quantities, item by item, at last symbolically."""
    if not answer or not truth:
        return False
    if _same_text(answer, truth):
        return True
    (answer, unit), (truth, true_unit) = _peel_unit(answer), _peel_unit(truth)
    (factor, unit), (true_factor, true_unit) = _scale(unit), _scale(true_unit)
    if unit and true_unit and unit != true_unit:
        return False
    value, true_value = _exact(answer), _exact(truth)
    if value is not None and true_value is not None:
        value, true_value = value * factor, true_value * true_factor
        if unit != true_unit and "percent" in (unit, true_unit):
            # a bare number beside a percentage is either the same figure or the proportion
            part, whole = (value, true_value) if unit else (true_value, value)
            return whole in (part, part / 100)
        return value == true_value
    if factor != true_factor:
        return False
    items, true_items = _items(answer), _items(truth)
    if items and true_items:
        ordered = items[0] not in ("", "∪")
        return items[0] == true_items[0] and _equal_items(items[1], true_items[1], ordered=ordered)
    if items or true_items:
        return False
    return _same_text(answer, truth) or _equal_formulas(answer, truth)


# ---- step 3: formulas ----------------------------------------------------------------------------

_ASSIGNMENT = re.compile(r"([A-Za-z](?:[A-Za-z_ ]*|\([a-z]\)))=([^=<>]+)")
_RELATION = re.compile(r"[=<>]|\\(?:le|ge|ne)(?![A-Za-z])")
_COMMANDS = frozenset(
    re.findall(
        r"\\\S+",
        r"\frac \sqrt \pi \pm \le \ge \ne \infty \emptyset \sin \cos \tan \cot \sec \csc \arcsin "
        r"\arccos \arctan \log \ln \exp \alpha \beta \gamma \delta \theta \lambda \mu \phi "
        r"\omega \\",
    )
)
_MATRIX = re.compile(r"\\(?:begin|end)\{[pb]matrix\}")
_NOT_A_FORMULA = re.compile(
    r"\d{21}"  # factoring and powers of these take long
    r"|\d \d"  # math-verify adds: "1 2" is 3
    r"|^[^+*(]*\d+/\d+/\d"  # a date
    r"|[A-Za-z]{4}|(?![a-cx-z]{2})[A-Za-z]{2}"  # a word, which math-verify reads as a product
    r"|!!|\d{3}!|[^\dA-Za-z]!|!\^"
    r"|[^-0-9A-Za-z\\{}()\[\]^_+*/=<>|!& ]"
)


def _names(formula: str) -> set[str]:
    """The variables (one letter) and functions or constants (with a backslash) of a formula."""
    formula = _MATRIX.sub("", formula)
    return set(
        re.findall(r"\\(?!frac|sqrt|le|ge|ne|pm|infty)[a-z]+|(?<![\\A-Za-z])[A-Za-z]+", formula)
    )


def _is_small(text: str, names: set[str]) -> bool:
    """Whether sympy can multiply out and factor everything in the text at once.

    Args:
        text: a formula.
        names: the names in it and in what it is compared with.
    """
    powers = re.findall(r"(.?)\^(\{(?:[^{}]|\{[^{}]*\})*\}|[^{])", text)
    if len(powers) != text.count("^"):
        return False  # a power in an exponent, or braces deeper than the pattern follows
    longest, nested = 0, 1
    for base, exponent in powers:
        digits = "".join(re.findall(r"\d", exponent))
        if "^" in exponent or "!" in exponent or len(digits) > (2 if names else 4):
            return False
        longest = max(longest, int(digits or 1))
        nested *= int(digits or 1) if base in (")", "}", "]", "|", "!") else 1
    functions = any(len(name) > 1 and name not in ("\\pi", "\\theta") for name in names)
    if (functions or _RELATION.search(text)) and longest > 4:
        return False  # simplifying a logarithm factors its integers; relations are solved
    if functions and _RELATION.search(text):
        return False
    if names and re.search(r"\d{7}|\d{2}!", text):
        return False  # sums of large and small terms cancel beyond math-verify's 15 digits
    if not names:
        return nested == 1 or max(nested, longest) <= 99
    # a power of a sum of n terms has some nested**n of them; roots do not merge as names do
    terms = len(names) + max(text.count("\\sqrt") - 1, 0)
    return nested <= (20 if terms <= 2 else 4) and (terms <= 2 or text.count("(") <= 6)


def _formula(text: str) -> str | None:
    """The LaTeX that math-verify would read as a whole, or None if the text is no such formula."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    # exact: math-verify compares floats to six places only
    text = re.sub(
        r"(?<![\d.])(\d*)\.(\d+)(?![\d.])",
        lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}",
        text,
    )
    bare = _MATRIX.sub("", text)
    if not set(re.findall(r"\\(?:[A-Za-z]+|.)", bare)) <= _COMMANDS:
        return None
    bare = re.sub(r"\\(?:[A-Za-z]+|\\)", " \N{NULL} ", bare)
    if _NOT_A_FORMULA.search(bare.replace(" \N{NULL} ", "+")) or max(_depths(text)) > _MAX_DEPTH:
        return None
    return text if re.search(r"[-\d+*/^=<>|\0]", bare) else None


def _equal_formulas(answer: str, truth: str) -> bool:
    """Compare two formulas; an assignment beside a bare value stands for its right-hand side."""
    sides = [_ASSIGNMENT.fullmatch(answer), _ASSIGNMENT.fullmatch(truth)]
    if sides[0] and not _RELATION.search(truth):
        return _equal(sides[0][2], truth)
    if sides[1] and not _RELATION.search(answer):
        return _equal(answer, sides[1][2])
    if sides[0] and sides[1] and _same_text(sides[0][1], sides[1][1]):
        return _equal(sides[0][2], sides[1][2])
    if (_RELATION.search(answer) is None) != (_RELATION.search(truth) is None):
        return False  # "2+3=6" is not 6
    formulas = [formula for formula in (_formula(answer), _formula(truth)) if formula is not None]
    names = set().union(*(_names(formula) for formula in formulas))
    if len(formulas) < 2 or not all(_is_small(formula, names) for formula in formulas):
        return False
    parse, verify = _math_verify()
    parsed, true_parsed = (parse(f"${formula}$") for formula in formulas)
    return bool(parsed and true_parsed and verify(true_parsed, parsed))


@functools.cache
def _math_verify() -> tuple[Callable[[str], list[Any]], Callable[[list[Any], list[Any]], bool]]:
    """Import math-verify (sympy: a second) on first use; its own timeouts are off, ours is on.

    Its timeouts work in whole seconds for each call, and cancel any other alarm of the process.
    """
    import math_verify
    from math_verify.parser import NormalizationConfig

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # warns that its timeouts are off
    rules = NormalizationConfig(
        basic_latex=True,
        units=False,
        malformed_operators=False,
        nits=False,
        boxed="none",
        equations=False,
    )
    target = math_verify.LatexExtractionConfig(normalization_config=rules)

    def parse(formula: str) -> list[Any]:
        found = math_verify.parse(
            formula, [target], fallback_mode="no_fallback", parsing_timeout=None
        )
        return list(found)

    def verify(truth: list[Any], answer: list[Any]) -> bool:
        return bool(math_verify.verify(truth, answer, timeout_seconds=None))

    verify(parse("$x+1$"), parse("$1+x$"))  # builds the grammar tables, so that no answer waits
    return parse, verify


class _OutOfTimeError(BaseException):
    """Not an `Exception`: sympy swallows those."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `_OutOfTimeError` after `seconds`; a no-op outside the main thread (no signals)."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise _OutOfTimeError

    started = time.monotonic()
    old_handler = signal.signal(signal.SIGALRM, stop)
    # It repeats, in case a bare `except:` swallows the first one.
    old_delay, old_interval = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if old_handler is None else old_handler)
        if old_delay:  # somebody else's alarm (a test's timeout) goes on
            rest = max(old_delay - (time.monotonic() - started), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, rest, old_interval)


# ---- public --------------------------------------------------------------------------------------


def answers_equal(answer: str, ground_truth: str) -> bool:
    """Whether an answer is mathematically the ground truth; never raises, never hangs.

    Units, currency and `%` count only if both sides have one; `72%` is `72` and `0.72`. Numbers are
    compared exactly. An empty answer equals nothing.

    Args:
        answer: the answer to judge, plain text or LaTeX.
        ground_truth: the right answer, plain text or LaTeX.

    Returns:
        True if they are equal; False if they differ or cannot be shown equal in time.

    Example:
        >>> answers_equal("$1,200.00", "1200")
        True
        >>> answers_equal("4x+10", "4")
        False
        >>> answers_equal(r"\\boxed{\\frac{1}{2}}", "0.5")
        True
    """
    answer, ground_truth = answer.strip(), ground_truth.strip()
    if max(len(answer), len(ground_truth)) > MAX_CHARS or not answer or answer == ground_truth:
        return answer == ground_truth != ""
    try:
        answer, ground_truth = _normal_form(answer), _normal_form(ground_truth)
        if _same_text(answer, ground_truth):
            return answer != ""
        if any(_exact(_peel_unit(text)[0]) is None for text in (answer, ground_truth)):
            _math_verify()  # outside the limit: the import may take longer than an answer may
        with _time_limit(MAX_SECONDS):
            return _equal(answer, ground_truth)
    except (Exception, _OutOfTimeError):  # model output: anything a parser can raise is "not equal"
        return False


def extract_answer(response: str) -> str | None:
    """The text in the last pair of answer tags, or None without `</think> <answer>…</answer>`.

    As in CS336's grader the last `<answer>` counts, so an answer given twice is its last version,
    and of nested tags the innermost. If that last tag is never closed there is no answer.

    Args:
        response: what the model wrote after the prompt.

    Returns:
        The stripped text between the tags (perhaps empty), or None.

    Example:
        >>> extract_answer("3 + 4 is 7. </think> <answer> 7 </answer>")
        '7'
        >>> extract_answer("7") is None
        True
    """
    if not _has_format(response):
        return None
    start = response.rfind("<answer>") + len("<answer>")
    end = response.find("</answer>", start)
    return None if end < 0 else response[start:end].strip()


def _has_format(response: str) -> bool:
    opening = response.find("</think> <answer>")
    return opening >= 0 and response.find("</answer>", opening) >= 0


def r1_zero_reward(response: str, ground_truth: str) -> dict[str, float]:
    """Score a response to the `r1_zero` prompt: 1 for a right answer in the right format, else 0.

    Args:
        response: what the model wrote after the prompt (which ends in `<think>`).
        ground_truth: the right answer.

    Returns:
        `reward`, `format_reward` and `answer_reward`, each 0.0 or 1.0. The format is kept if the
        response contains `</think> <answer>` (one space) and `</answer>` after it; `answer_reward`
        needs the format too; `reward` is `answer_reward`.

    Example:
        >>> r1_zero_reward("3 + 4 is 7. </think> <answer> 7 </answer>", "7")
        {'reward': 1.0, 'format_reward': 1.0, 'answer_reward': 1.0}
        >>> r1_zero_reward("The answer is 7.", "7")
        {'reward': 0.0, 'format_reward': 0.0, 'answer_reward': 0.0}
    """
    answer = extract_answer(response)
    answer_reward = float(answer is not None and answers_equal(answer, ground_truth))
    return {
        "reward": answer_reward,
        "format_reward": float(_has_format(response)),
        "answer_reward": answer_reward,
    }


RewardFunction = Callable[[str, str], dict[str, float]]

REWARDS: dict[str, RewardFunction] = {"r1_zero": r1_zero_reward}
"""Reward functions by the name a configuration gives them."""
