"""Tiny tokenizers whose ids can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCABULARY = ["<unk>", "<s>", "</s>", "<pad>", *"0123456789+=", "a", "b", "c", "d", "e"]


def build_tokenizer(
    *, template: str | None = None, eos: bool = True, pad: str | None = "<pad>"
) -> PreTrainedTokenizerFast:
    """Make a tokenizer of words: `<unk>` 0, `<s>` 1, `</s>` 2, `<pad>` 3, digit d 4 + d, `+` 14, …

    Args:
        template: what stands around a text, as in `<s> $A`; None: nothing.
        eos: whether `</s>` is known to be the EOS token.
        pad: the pad token; None: there is none.
    """
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is not None:
        words.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    names = {"bos_token": "<s>" if template else None, "eos_token": "</s>" if eos else None}
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token=pad, **names
    )


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[..., PreTrainedTokenizerFast]:
    """Build a tokenizer, see `build_tokenizer`."""
    return build_tokenizer
