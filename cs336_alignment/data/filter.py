"""`data.filter`: of prepared examples, those whose response is correct."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.data.encode import special_tokens
from cs336_alignment.data.ledger import LedgerEntry
from cs336_alignment.data.tokenize import decode
from cs336_alignment.errors import MAX_SHOWN, Place, UserError, UserErrors

Verify = Callable[[str, str], bool]
"""(response, ground truth) → whether it is correct."""

WRONG = "wrong"


def find_correct(
    dataset: TokenizedDataset,
    ground_truths: Sequence[str | None],
    places: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    verify: Verify,
    advance: Callable[[int], None] = lambda _: None,
) -> NDArray[np.bool_]:
    """Verify the response of every example: the text of its last trained stretch, without the
    tokens that end it.

    Args:
        dataset: N examples.
        ground_truths: of each.
        places: of each.
        tokenizer: that made the tokens.
        verify: tells whether a response is correct.
        advance: called with the number of examples done since the last call.

    Returns:
        (N,) True where it is correct.

    Raises:
        UserErrors: examples without ground truth: the first 20, and how many (65).
    """
    missing = [number for number, truth in enumerate(ground_truths) if truth is None]
    if missing:
        raise UserErrors([_no_truth(places[i]) for i in missing[:MAX_SHOWN]], len(missing))
    stops = special_tokens(tokenizer).stops
    correct = np.zeros(len(dataset), dtype=bool)
    for number, truth in enumerate(ground_truths):
        ids = dataset.response_ids(number)
        while ids and ids[-1] in stops:
            ids.pop()
        correct[number] = verify(decode(tokenizer, ids), str(truth))
        advance(1)
    return correct


def without(
    ledger: LedgerEntry,
    wrong: TokenizedDataset,
    remaining: TokenizedDataset,
    tokenizer: PreTrainedTokenizerBase,
) -> LedgerEntry:
    """Give a source's ledger with its wrong examples taken out.

    Args:
        ledger: of the source.
        wrong: these examples.
        remaining: its other ones; those that `data.eval_fraction` set aside are among them.
        tokenizer: that made the tokens.

    Raises:
        UserError: nothing is left (65).
    """
    if not len(remaining):
        raise UserError(
            "D301",
            f"no example of {ledger.source} is left",
            got=f"{len(wrong):,} examples, all of them wrong by evaluation.reward",
            hint="cs336-sft inspect data.filter=none … shows them; a reward that asks for other "
            "tags than the responses have finds none correct",
        )
    lengths, stops = remaining.lengths, special_tokens(tokenizer).stops
    found = replace(
        ledger,
        kept=len(remaining),
        filtered={WRONG: len(wrong)} if len(wrong) else {},
        tokens=int(lengths.sum()),
        response_tokens=int(remaining.response_lengths.sum()),
        longest=int(lengths.max()),
        ends_with_stop=ledger.ends_with_stop
        - sum(wrong.response_ids(i)[-1] in stops for i in range(len(wrong))),
    )
    found.measure(lengths)
    return found


def _no_truth(place: str) -> UserError:
    return UserError(
        "D340",
        "the row has no ground truth, so data.filter=correct cannot verify its response",
        place=Place(place),
        hint="name the column: data.columns.ground_truth=answer, say; or data.filter=none",
    )
