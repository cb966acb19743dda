"""The special prefix once, the response verbatim, the mask over labels: ids worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from cs336_alignment.data.tokenize import (
    special_prefix,
    tokenize_plain,
    tokenize_prompt_and_output,
    tokenize_prompts,
    tokenizer_fingerprint,
)

TokenizerOf = Callable[..., PreTrainedTokenizerFast]
BOS, EOS, PAD = 1, 2, 3
F, T = False, True


@pytest.mark.parametrize(
    ("template", "prefix"),
    [
        (None, []),
        ("<s> $A", [BOS]),
        ("<s> $A </s>", [BOS]),
        ("$A </s>", []),
        ("<s> </s> $A", [BOS, EOS]),
    ],
)
def test_the_prefix_is_what_stands_before_a_text(
    template: str | None, prefix: list[int], tokenizer_of: TokenizerOf
) -> None:
    tokenizer = tokenizer_of(template=template)
    assert special_prefix(tokenizer) == prefix
    assert tokenize_prompts(["1 + 2", "3"], tokenizer) == [[*prefix, 5, 14, 6], [*prefix, 7]]
    assert tokenize_plain(["1 + 2", "3"], tokenizer) == [[5, 14, 6], [7]]


def test_a_prompt_that_brings_the_prefix_does_not_get_it_twice(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(template="<s> $A")
    assert tokenize_prompts(["<s> 1", "1", "1 <s>"], tokenizer) == [
        [BOS, 5],
        [BOS, 5],
        [BOS, 5, BOS],
    ]


def test_the_prefix_can_be_left_out(tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(template="<s> $A")
    assert tokenize_prompts(["1", "<s> 1"], tokenizer, add_special_tokens=False) == [[5], [BOS, 5]]


def test_what_an_earlier_call_asked_for_is_no_part_of_the_fingerprint(
    tokenizer_of: TokenizerOf,
) -> None:
    tokenizer = tokenizer_of()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("1 2 3", truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.add_tokens(["<|new|>"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_no_texts(tokenizer_of: TokenizerOf) -> None:
    assert tokenize_plain([], tokenizer_of()) == tokenize_prompts([], tokenizer_of()) == []


def test_nothing_is_cut_or_filled(
    tokenizer_of: TokenizerOf, recwarn: pytest.WarningsRecorder
) -> None:
    """Whatever the tokenizer's file says: truncation, padding and a maximum are not ours."""
    tokenizer = tokenizer_of(template="<s> $A")
    tokenizer.model_max_length = 4
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(pad_id=PAD, pad_token="<pad>", length=6)
    assert tokenize_prompts(["1", "1 " * 9], tokenizer) == [[BOS, 5], [BOS, *[5] * 9]]
    assert tokenize_plain(["1", "1 " * 9], tokenizer) == [[5], [5] * 9]
    assert not recwarn.list


def test_golden_batch(tokenizer_of: TokenizerOf) -> None:
    batch = tokenize_prompt_and_output(
        ["1 + 1 =", "2", "1 2 3"], ["2", "3 4 </s>", ""], tokenizer_of(template="<s> $A")
    )
    # <s> 1 + 1 = 2 | <s> 2 3 4 </s> <pad> | <s> 1 2 3 <pad> <pad>
    assert batch["input_ids"].tolist() == [
        [BOS, 5, 14, 5, 15],
        [BOS, 6, 7, 8, EOS],
        [BOS, 5, 6, 7, PAD],
    ]
    assert batch["labels"].tolist() == [
        [5, 14, 5, 15, 6],
        [6, 7, 8, EOS, PAD],
        [5, 6, 7, PAD, PAD],
    ]
    assert batch["response_mask"].tolist() == [[F, F, F, F, T], [F, T, T, T, F], [F, F, F, F, F]]
    assert set(batch) == {"input_ids", "labels", "response_mask"}
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["response_mask"].dtype == torch.bool
    assert {tuple(value.shape) for value in batch.values()} == {(3, 5)}


@pytest.mark.parametrize(
    ("options", "filler"),
    [({}, PAD), ({"pad": "</s>"}, EOS), ({"pad": None}, EOS), ({"pad": None, "eos": False}, 0)],
)
def test_padding_goes_by_position(
    options: dict[str, str], filler: int, tokenizer_of: TokenizerOf
) -> None:
    """An output's own pad or EOS token is trained like any other."""
    outputs = ["<pad> </s> 1 2", "</s>"]
    batch = tokenize_prompt_and_output(["a", "a"], outputs, tokenizer_of(**options))
    assert batch["input_ids"].tolist() == [[16, PAD, EOS, 5], [16, EOS, filler, filler]]
    assert batch["labels"].tolist() == [[PAD, EOS, 5, 6], [EOS, filler, filler, filler]]
    assert batch["response_mask"].tolist() == [[T, T, T, T], [T, F, F, F]]


def test_no_eos_is_added_and_the_output_gets_no_prefix(tokenizer_of: TokenizerOf) -> None:
    batch = tokenize_prompt_and_output(["1"], ["2"], tokenizer_of(template="<s> $A </s>"))
    assert batch["input_ids"].tolist() == [[BOS, 5]]
    assert batch["labels"].tolist() == [[5, 6]]
    assert batch["response_mask"].tolist() == [[F, T]]


def test_prompt_and_output_are_tokenized_apart(tokenizer_of: TokenizerOf) -> None:
    """`1` and `2` never merge over the border, though `12` would be one (unknown) word."""
    batch = tokenize_prompt_and_output(["1"], ["2"], tokenizer_of())
    assert batch["input_ids"].tolist() == [[5]] and batch["labels"].tolist() == [[6]]


def test_the_mask_counts_the_output(tokenizer_of: TokenizerOf) -> None:
    prompts = ["1 " * n for n in (1, 4, 2, 7)]
    outputs = ["2 " * n for n in (3, 1, 6, 2)]
    batch = tokenize_prompt_and_output(prompts, outputs, tokenizer_of(template="<s> $A"))
    assert batch["labels"].shape == (4, 1 + 7 + 2 - 1)
    assert batch["response_mask"].sum(1).tolist() == [3, 1, 6, 2]
    assert batch["labels"][batch["response_mask"]].unique().tolist() == [6]


@pytest.mark.parametrize(
    ("prompts", "outputs"), [(["1"], []), ([], ["1"]), (["1"], ["1", "2"]), ([], [])]
)
def test_unequal_numbers_are_refused(
    prompts: list[str], outputs: list[str], tokenizer_of: TokenizerOf
) -> None:
    with pytest.raises(ValueError, match=f"{len(prompts)} and {len(outputs)}"):
        tokenize_prompt_and_output(prompts, outputs, tokenizer_of())
