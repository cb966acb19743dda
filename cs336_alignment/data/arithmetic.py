"""Arithmetic problems with worked reasoning: the quickstart task, generated from a seed.

Each row has the shape of a GSM8K row, so the same data step reads both:
`{"question": "347 + 85 = ?", "answer": "<reasoning>\\n#### 432"}`.

Operands lie in `0..MAX_OPERAND`. A problem is an ordered pair to add, or a pair to subtract whose
result is not negative; every problem can be asked in any of the wordings of its operation. The
train/test split is by unordered operand pair, so no wording, order or operation of a test pair is
ever trained on.
"""

import hashlib
import random
from typing import TypeVar

MAX_OPERAND = 999
ADDITION_WORDINGS = (
    "{a} + {b} = ?",
    "What is {a} plus {b}?",
    "Find the sum of {a} and {b}.",
    "{name} has {a_items} and gets {b} more. How many {items} does {name} have now?",
)
SUBTRACTION_WORDINGS = (
    "{a} - {b} = ?",
    "What is {a} minus {b}?",
    "Subtract {b} from {a}.",
    "{name} has {a_items} and gives away {b}. How many {items} does {name} have left?",
)

_HELD_OUT_ONE_IN = 10
_NAMES = ("Ada", "Ben", "Chloe", "Dev", "Emma", "Farid", "Grace", "Hugo")
_ITEMS = ("apple", "book", "coin", "marble", "pencil", "shell", "stamp", "sticker")
_PLACES = ("ones", "tens", "hundreds")
# Two numbers in three have three digits; the rest keep short ones in the mix.
_DIGIT_COUNTS = (1, 2, 2, 3, 3, 3, 3, 3, 3)

_T = TypeVar("_T")


def is_held_out(a: int, b: int) -> bool:
    """Tells whether the unordered pair of operands belongs to the test split.

    A pure function of the pair: independent of seed, machine and Python version.

    Example:
        >>> is_held_out(347, 85) == is_held_out(85, 347)
        True
    """
    low, high = sorted((a, b))
    digest = hashlib.sha256(f"{low},{high}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


def solve(a: int, operation: str, b: int) -> tuple[str, int]:
    """Works out `a + b` or `a - b` column by column, from the ones to the left.

    Args:
        a: First operand, `0..MAX_OPERAND`.
        operation: `"+"` or `"-"`.
        b: Second operand, `0..MAX_OPERAND`; not above `a` when subtracting.

    Returns:
        The reasoning, one line of text, and the result.

    Example:
        >>> solve(47, "+", 5)
        ('Align 47 + 05: ones 7 + 5 = 12, carry 1; tens 4 + 0 + 1 = 5.', 52)
    """
    width = max(len(str(a)), len(str(b)))
    top, bottom = str(a).zfill(width), str(b).zfill(width)
    column = _add_column if operation == "+" else _subtract_column
    steps = []
    carried: int | None = None
    for position in range(width):
        step, carried = column(int(top[-1 - position]), int(bottom[-1 - position]), carried)
        passed_on = "carry" if operation == "+" else "borrow"
        suffix = f", {passed_on} {carried}" if position < width - 1 else ""
        steps.append(f"{_PLACES[position]} {step}{suffix}")
    reasoning = f"Align {top} {operation} {bottom}: {'; '.join(steps)}."
    return reasoning, a + b if operation == "+" else a - b


def generate_rows(split: str, count: int, seed: int) -> list[dict[str, str]]:
    """Generates distinct problems of one split.

    A larger `count` starts with the rows of a smaller one, so "the first N" is well defined.

    Args:
        split: `"train"` or `"test"`; test rows use held-out operand pairs only.
        count: Number of rows, far fewer than there are: they are drawn by rejection.
        seed: Seed of the draw; equal arguments give equal rows on every machine.

    Returns:
        Rows `{"question": ..., "answer": "<reasoning>\\n#### <result>"}`.

    Example:
        >>> generate_rows("test", 1, seed=0) == generate_rows("test", 5, seed=0)[:1]
        True
    """
    rng = random.Random(f"arithmetic/{split}/{seed}")
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    while len(rows) < count:
        a, b = _draw_operand(rng), _draw_operand(rng)
        row = _draw_row(rng, a, b)
        if is_held_out(a, b) == (split == "test") and row["question"] not in seen:
            seen.add(row["question"])
            rows.append(row)
    return rows


def _add_column(x: int, y: int, carry: int | None) -> tuple[str, int]:
    """Adds one column; the ones column has no carry coming in."""
    total = x + y + (carry or 0)
    incoming = "" if carry is None else f" + {carry}"
    return f"{x} + {y}{incoming} = {total}", total // 10


def _subtract_column(x: int, y: int, borrow: int | None) -> tuple[str, int]:
    """Subtracts one column, written with the ten it borrows: `12 - 5 = 7` for digits 2 and 5."""
    borrows = int(x - y - (borrow or 0) < 0)
    x += 10 * borrows
    incoming = "" if borrow is None else f" - {borrow}"
    return f"{x} - {y}{incoming} = {x - y - (borrow or 0)}", borrows


def _draw_row(rng: random.Random, a: int, b: int) -> dict[str, str]:
    """Asks about the two operands in a drawn operation and wording."""
    operation = _draw(rng, ("+", "-"))
    if operation == "-":
        a, b = max(a, b), min(a, b)
    wording = _draw(rng, ADDITION_WORDINGS if operation == "+" else SUBTRACTION_WORDINGS)
    name, item = _draw(rng, _NAMES), _draw(rng, _ITEMS)
    a_items = f"{a} {item}" if a == 1 else f"{a} {item}s"
    question = wording.format(a=a, b=b, name=name, a_items=a_items, items=f"{item}s")
    reasoning, result = solve(a, operation, b)
    return {"question": question, "answer": f"{reasoning}\n#### {result}"}


def _draw_operand(rng: random.Random) -> int:
    """Draws the length of a number, then a number of that length."""
    digits = _draw(rng, _DIGIT_COUNTS)
    low = 0 if digits == 1 else 10 ** (digits - 1)
    return low + int(rng.random() * (10**digits - low))


def _draw(rng: random.Random, options: tuple[_T, ...]) -> _T:
    """Picks one option. Of `Random`, only `random()` is promised to be stable across versions."""
    return options[int(rng.random() * len(options))]
