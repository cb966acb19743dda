"""What can be wrong with rows that tokenize without complaint, looked for in every one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cs336_alignment.config import LintConfig
from cs336_alignment.data.tokenize import TokenRow
from cs336_alignment.errors import Place, UserError, UserErrors

MAX_EXAMPLES = 5


@dataclass(frozen=True)
class Check:
    """One thing that is looked for.

    Attributes:
        code: stable.
        message: what was found, after `N rows: `.
        hint: what to do about it.
    """

    code: str
    message: str
    hint: str


CHECKS = {
    "no_trained_token": Check(
        "L101", "nothing of the row is trained",
        "give the rows a response or an assistant turn, or drop them from the file",
    ),
    "no_stop_token": Check(
        "L102", "the last trained token does not end the response, so stopping is not learned",
        "leave data.append_eos=true and do not truncate; for chats see what the template ends with",
    ),
    "doubled_bos": Check(
        "L103", "the row begins with the BOS token twice",
        "take the BOS text out of the prompts, or set data.add_special_tokens=false",
    ),
    "moved_boundary": Check(
        "L104", "tokenized together, a token would lie across the border of prompt and response",
        "end prompts without a space and begin responses with one, as the tokenizer's words do",
    ),
    "changed_text": Check(
        "L105", "the chat template changes or leaves out text of the messages",
        "look at the rows with `cs336-sft inspect`; often it is white space at the ends",
    ),
    "trained_scaffolding": Check(
        "L106", "special tokens that do not end a response are trained",
        "take template text such as role headers out of the responses",
    ),
    "duplicate_rows": Check(
        "L107", "the same tokens stand in the data more than once", "drop repeated rows"
    ),
    "eval_overlap": Check(
        "L108", "the prompt is in the training data and in the evaluation data",
        "take these rows out of one of the two, or results will flatter the model",
    ),
    "ignored_keys": Check(
        "L109", "the chat template does not read a key of a message, so it has no effect",
        "remove the key, or use a template that writes it",
    ),
    "special_text": Check(
        "L110", "a message or question spells a special token, which becomes that token, not text",
        "take such text out: no tokenizer tells it from the template's own",
    ),
    "empty_turn": Check(
        "L111", "an assistant's turn without text is trained, so saying nothing is learned",
        'give the turn its text, or "train": false',
    ),
}  # fmt: skip


@dataclass
class Findings:
    """How many rows show each thing, and a few of them.

    Attributes:
        counts: check → rows.
        examples: check → places of the first few.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, check: str, place: Place | str) -> None:
        """Note that a row shows something."""
        self.counts[check] = self.counts.get(check, 0) + 1
        shown = self.examples.setdefault(check, [])
        if len(shown) < MAX_EXAMPLES:
            shown.append(str(place))

    def add_found(self, check: str, found: NDArray[np.bool_], place: Callable[[int], str]) -> None:
        """Note what many examples show: (N,) whether each does, and what gives its row's place."""
        numbers = np.flatnonzero(found)
        for number in numbers[:MAX_EXAMPLES].tolist():
            self.add(check, place(number))
        if len(numbers) > MAX_EXAMPLES:
            self.counts[check] += len(numbers) - MAX_EXAMPLES

    def merge(self, other: Findings) -> None:
        """Add another part's findings."""
        for check, count in other.counts.items():
            self.counts[check] = self.counts.get(check, 0) + count
            shown = self.examples.setdefault(check, [])
            shown += other.examples.get(check, [])[: MAX_EXAMPLES - len(shown)]


@dataclass(frozen=True)
class SpecialTokens:
    """What the checks must know of a tokenizer.

    Attributes:
        bos: id, or None.
        stops: ids that can end a response: EOS and, since chat templates end turns with tokens of
            their own, every special token but BOS and padding.
        table: (largest special id + 2,) bool, True at special ids; the last is False and stands for
            all ids beyond.
    """

    bos: int | None
    stops: frozenset[int]
    table: NDArray[np.bool_]


def check_row(row: TokenRow, special: SpecialTokens) -> Iterator[str]:
    """Yield the names of the checks that a row with trained tokens shows, from its tokens alone."""
    ids = row.input_ids
    if len(ids) > 1 and special.bos is not None and ids[0] == ids[1] == special.bos:
        yield "doubled_bos"
    for start, end in row.spans:
        is_special = special.table[np.minimum(ids[start:end], len(special.table) - 1)]
        # Those at the very end are what ends the response.
        if is_special[: len(is_special) - int(np.argmin(is_special[::-1]))].any():
            yield "trained_scaffolding"
            return


def ends_with_stop(row: TokenRow, special: SpecialTokens) -> bool:
    """Tell whether the last trained token of a row ends a response."""
    return int(row.input_ids[row.spans[-1, 1] - 1]) in special.stops


def find_repeated(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Tell of which rows an earlier one has the hash."""
    _, first = np.unique(hashes, return_index=True)
    repeated = np.ones(len(hashes), dtype=bool)
    repeated[first] = False
    return repeated


class Judged(NamedTuple):
    """What was found in one place, to be judged.

    Attributes:
        findings: of the linter.
        rows: among which they were found, for the share.
        where: in words.
    """

    findings: Findings
    rows: int
    where: str


def judge(parts: Iterable[Judged], config: LintConfig) -> list[str]:
    """Turn findings into warnings, or refuse to go on.

    Args:
        parts: what was found.
        config: the level of each check.

    Returns:
        A line for each warning.

    Raises:
        UserErrors: checks at level `error` found something (65): all of them.
    """
    warnings, errors = [], []
    for (findings, rows, source), (name, check) in product(parts, CHECKS.items()):
        count, level = findings.counts.get(name, 0), getattr(config, name)
        if not count or level == "off":
            continue
        share = f"{count:,} of {rows:,} rows of {source}"
        places = findings.examples[name]
        where = ", ".join(places) + (", …" if count > len(places) else "")
        if level == "warning":
            warnings.append(f"{check.code} {share}: {check.message} ({where}); {check.hint}")
            continue
        errors.append(
            UserError(
                check.code,
                f"{share}: {check.message}",
                got=where,
                hint=f"{check.hint}; data.lint.{name}=warning goes on all the same",
            )
        )
    if errors:
        raise UserErrors(errors)
    return warnings
