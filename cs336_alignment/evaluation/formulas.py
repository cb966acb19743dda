"""Formulas compared by math-verify: only those that it reads as a whole and finishes in time."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from typing import Any

from cs336_alignment.evaluation.spelling import bracket_depths

_MAX_DEPTH = 8
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
    r"|^[^+*(]*\d+/\d+/\d|^\d{4}-\d\d?-\d\d?$"  # a date
    r"|\d_"  # a number of another base
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
    powers = [  # what stands before the sign (the end of a power, perhaps), and the exponent
        (text[found.start() - 1 : found.start()], found[1])
        for found in re.finditer(r"\^(\{(?:[^{}]|\{[^{}]*\})*\}|[^{])", text)
    ]
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
    if (functions or is_relation(text)) and longest > 4:
        return False  # simplifying a logarithm factors its integers; relations are solved
    if functions and is_relation(text):
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
    if (
        _NOT_A_FORMULA.search(bare.replace(" \N{NULL} ", "+"))
        or max(bracket_depths(text)) > _MAX_DEPTH
    ):
        return None
    return text if re.search(r"[-\d+*/^=<>|\0]", bare) else None


def is_relation(text: str) -> bool:
    """Tell whether a text is an equation or inequality."""
    return _RELATION.search(text) is not None


def equal_formulas(answer: str, truth: str) -> bool:
    """Compare two normal forms as formulas; False if either is none, or too large to finish."""
    if is_relation(answer) != is_relation(truth):
        return False  # "2+3=6" is not 6
    formulas = [formula for formula in (_formula(answer), _formula(truth)) if formula is not None]
    names = set().union(*(_names(formula) for formula in formulas))
    if len(formulas) < 2 or not all(_is_small(formula, names) for formula in formulas):
        return False
    parse, verify = load_parser()
    parsed, true_parsed = (parse(f"${formula}$") for formula in formulas)
    return bool(parsed and true_parsed and verify(true_parsed, parsed))


def reads(text: str) -> bool:
    """Tell whether a normal form is a formula that can be compared with others."""
    formula = _formula(text)
    if formula is None or not _is_small(formula, _names(formula)):
        return False
    return bool(load_parser()[0](f"${formula}$"))


@functools.cache
def load_parser() -> tuple[Callable[[str], list[Any]], Callable[[list[Any], list[Any]], bool]]:
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
