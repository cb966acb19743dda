r"""Is an answer mathematically the ground truth? Three questions, cheapest first:

1. Are the normal forms the same text? (`\boxed{}`, `$…$`, case, spacing, a final full stop gone)
2. Are both sides numbers? Then they are compared exactly as fractions: `0.333` is not `1/3`.
3. Does math-verify find the *whole* of both texts equal? It is never allowed to pick a number out
   of a text (its `parse("4x+10")` is 4), and never sees a power that it could not finish.

Tuples, intervals, sets and lists are compared item by item, units only if both sides have one.
"""

from __future__ import annotations

import functools
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cs336_alignment.evaluation.formulas import equal_formulas, is_relation, load_parser, reads
from cs336_alignment.evaluation.quantities import exact, peel_unit, split_items
from cs336_alignment.evaluation.spelling import normal_form, same_text

MAX_CHARS = 300
"""Longer answers are compared as text only: every step below would otherwise need its own bound."""

MAX_SECONDS = 1.5
"""Computing time for one answer (main thread; in others only the guards of `formulas` bound it)."""

_MAX_ITEMS = 12

_SYMBOL = re.compile(r"\\[A-Za-z]+(?:\{\w\})?")  # \alpha, \mathbb{R}

_ASSIGNMENT = re.compile(
    r"((?:[A-Za-z](?:[A-Za-z_ ]*|\([a-z]\))|\\(?:alpha|beta|gamma|theta|lambda|mu|phi|omega))"
    r"(?:_\{?\w\}?)?)(?:=| ?\\in(?![a-z]) ?(?=[(\[{\\]))([^=<>]+)"
)


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
        answer, ground_truth = normal_form(answer), normal_form(ground_truth)
        if same_text(answer, ground_truth):
            return answer != ""
        if any(exact(peel_unit(text)[0]) is None for text in (answer, ground_truth)):
            load_parser()  # outside the limit: the import may take longer than an answer may
        with _time_limit(MAX_SECONDS):
            return _equal(answer, ground_truth)
    except (Exception, _OutOfTimeError):  # model output: anything a parser can raise is "not equal"
        return False


@functools.lru_cache(maxsize=2**16)  # model and baseline have the same ground truths
def is_read(ground_truth: str) -> bool:
    """Whether a ground truth is more than a text to the grader, or need not be more.

    Args:
        ground_truth: the right answer, plain text or LaTeX, at most `MAX_CHARS` long.

    Returns:
        False if it looks like a formula, and the grader can only compare its spelling.

    Example:
        >>> is_read("\\\\frac{1}{2}"), is_read("Monday"), is_read("\\\\int_0^1 x dx")
        (True, True, False)
    """
    try:
        text = normal_form(ground_truth.strip())
        if exact(peel_unit(text)[0]) is None:
            load_parser()  # outside the limit, as in `answers_equal`
        with _time_limit(MAX_SECONDS):
            return _is_read(text)
    except (Exception, _OutOfTimeError):  # as in `answers_equal`
        return False


def _is_read(text: str) -> bool:
    text = peel_unit(text)[0]
    if exact(text) is not None or not re.search(r"[\^\\]", text) or _SYMBOL.fullmatch(text):
        return True
    bare = _without_names(text, "")[0]
    items = split_items(bare)
    return all(map(_is_read, items[1])) if items else reads(bare)


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
    if same_text(answer, truth):
        return True
    (answer, unit), (truth, true_unit) = peel_unit(answer), peel_unit(truth)
    if unit and true_unit and unit != true_unit:
        return False
    value, true_value = exact(answer), exact(truth)
    if value is not None and true_value is not None:
        if unit != true_unit and "percent" in (unit, true_unit):
            # a bare number beside a percentage is either the same figure or the proportion
            part, whole = (value, true_value) if unit else (true_value, value)
            return whole in (part, part / 100)
        return value == true_value
    bare, true_bare = _without_names(answer, truth)
    if (bare, true_bare) != (answer, truth):
        return _equal(bare, true_bare)
    items, true_items = split_items(answer), split_items(truth)
    if items and true_items:
        ordered = items[0] not in ("", "∪")
        return items[0] == true_items[0] and _equal_items(items[1], true_items[1], ordered=ordered)
    if items or true_items:
        return False
    if same_text(answer, truth):
        return True
    return equal_formulas(answer, truth)


def _without_names(answer: str, truth: str) -> tuple[str, str]:
    """Take `x=` off `x=5` beside a bare value or beside an assignment to the same name."""
    left, right = _ASSIGNMENT.fullmatch(answer), _ASSIGNMENT.fullmatch(truth)
    if left and right and same_text(left[1], right[1]):
        return left[2], right[2]
    if left and not is_relation(truth):
        return left[2], truth
    if right and not is_relation(answer):
        return answer, right[2]
    return answer, truth


class _OutOfTimeError(BaseException):
    """Not an `Exception`: sympy swallows those."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `_OutOfTimeError` after `seconds` of this process's own computing; a no-op outside the
    main thread (no signals).

    Not of the clock on the wall: a reward must not depend on what else the machine does.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise _OutOfTimeError

    old_handler = signal.signal(signal.SIGPROF, stop)
    # It repeats, in case a bare `except:` swallows the first one.
    signal.setitimer(signal.ITIMER_PROF, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, signal.SIG_DFL if old_handler is None else old_handler)
