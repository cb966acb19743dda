"""The search space of a sweep: keys, and the values that each may take."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cs336_alignment.config import ALL_KEYS
from cs336_alignment.config_names import nearest_key
from cs336_alignment.errors import UserError, UserErrors

FIELDS = {"low", "high", "log", "step", "choices"}
NOT_SEARCHED = ("run_name", "output_root", "trainer.resume")  # a sweep sets them itself


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included.

    Attributes:
        key: of the config.
        low: the smallest.
        high: the largest.
        log: whether they are drawn evenly on a logarithmic scale.
        step: only these far apart from low; None: all.
    """

    key: str
    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are drawn."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def extremes(self) -> list[str]:
        """The ends, as they are typed."""
        return [to_text(self.low), to_text(self.high)]


@dataclass(frozen=True)
class Choice:
    """Values without an order.

    Attributes:
        key: of the config.
        choices: as they are typed.
    """

    key: str
    choices: tuple[str, ...]

    @property
    def extremes(self) -> list[str]:
        """All of them."""
        return list(self.choices)


def read_space(space: Mapping[str, Any]) -> list[Range | Choice]:
    """Read `sweep.space`; keys may be whole or nested.

    Raises:
        UserErrors: unknown keys, each with the nearest one, and everything else that is wrong (78).

    Example:
        >>> read_space({"seed": {"choices": [1, 2]}})
        [Choice(key='seed', choices=('1', '2'))]
    """
    found: list[Range | Choice] = []
    errors: list[UserError] = []
    for key, entry in _entries(space):
        try:
            found.append(_read(key, entry))
        except UserError as error:
            errors.append(error)
    if not found and not errors:
        errors.append(
            _wrong("sweep.space is empty", "keys and the values that each may take", None)
        )
    if errors:
        raise UserErrors(errors)
    return found


def to_text(value: Any) -> str:
    """Write a value as an override has it.

    Example:
        >>> to_text([0.9, None, "a b"])
        '[0.9,null,"a b"]'
    """
    if isinstance(value, list):
        return f"[{','.join(to_text(inner) for inner in value)}]"
    return json.dumps(value, ensure_ascii=False)


def _entries(space: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, entry in space.items():
        key = f"{prefix}{name}"
        nested = isinstance(entry, dict) and entry and not FIELDS & set(entry)
        if nested and key not in ALL_KEYS:
            yield from _entries(entry, f"{key}.")
        else:
            yield key, entry


def _read(key: str, entry: Any) -> Range | Choice:
    if key not in ALL_KEYS:
        near = nearest_key(key)
        raise UserError(
            "C101",
            f"there is no key {key}, in sweep.space",
            hint=f"did you mean {near}?"
            if near
            else "`cs336-sft train --cfg job` prints every key",
        )
    if key in NOT_SEARCHED or key.startswith("sweep."):
        raise _wrong(f"sweep.space cannot hold {key}: the sweep sets it itself", None, None)
    if not isinstance(entry, dict) or (unknown := set(entry) - FIELDS):
        got = (
            f"unknown: {', '.join(sorted(unknown))}" if isinstance(entry, dict) else to_text(entry)
        )
        raise _wrong(f"sweep.space.{key} cannot be read", "low and high, or choices", got)
    if "choices" in entry:
        choices = entry["choices"]
        if len(entry) > 1 or not isinstance(choices, list) or not choices:
            raise _wrong(f"sweep.space.{key} cannot be read", "choices alone, a list", str(entry))
        return Choice(key, tuple(to_text(choice) for choice in choices))
    low, high, log = entry.get("low"), entry.get("high"), bool(entry.get("log", False))
    step = entry.get("step")
    if not all(_is_number(value) for value in (low, high)) or low > high:  # type: ignore[operator]
        raise _wrong(f"sweep.space.{key} cannot be read", "numbers, low at most high", str(entry))
    if log and (low <= 0 or step is not None):  # type: ignore[operator]
        raise _wrong(
            f"sweep.space.{key} cannot be read", "with log: low above 0, no step", str(entry)
        )
    if step is not None and (not _is_number(step) or step <= 0):
        raise _wrong(f"sweep.space.{key} cannot be read", "a step above 0", str(entry))
    return Range(key, low, high, log, step)  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wrong(message: str, expected: str | None, got: str | None) -> UserError:
    return UserError(
        "C145",
        message,
        expected=expected,
        got=got,
        hint="'sweep.space={optimizer.learning_rate: {low: 1e-5, high: 1e-3, log: true}, "
        "trainer.global_batch_size: {choices: [8, 16]}}'",
    )
