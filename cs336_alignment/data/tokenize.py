"""Prompts and responses to token ids, and the mask that says which of them are trained.

B batch, L tokens of one example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenizedExample:
    """One example as tokens.

    Attributes:
        input_ids: (L,) int64, prompt then response.
        response_mask: (L,) bool, True on the tokens that are trained.
        example_id: its place in the data set.
    """

    input_ids: Tensor
    response_mask: Tensor
    example_id: int


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Find the special tokens that a tokenizer puts before a text by itself (often BOS, often
    none).

    What it would put *after* a text is not part of it: a prompt is followed by its response.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    with_special = tokenizer("a")["input_ids"]
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return list(with_special[:start])
    return []


def tokenize_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool = True
) -> list[list[int]]:
    """Tokenize prompts in one batch; each begins with the special prefix exactly once.

    Args:
        prompts: the texts; one that already begins with the prefix's text does not get it twice.
        tokenizer: any Hugging Face tokenizer.
        add_special_tokens: whether the prefix is added at all.
    """
    rows = tokenize_plain(prompts, tokenizer)
    prefix = special_prefix(tokenizer) if add_special_tokens else []
    return [row if row[: len(prefix)] == prefix else prefix + row for row in rows]


def tokenize_plain(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenize texts in one batch, with nothing added and nothing cut."""
    if not texts:
        return []
    # verbose=False: transformers would warn of rows over the model's length, which the caller
    # handles.
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        truncation=False,
        padding=False,
        verbose=False,
        return_attention_mask=False,
    )
    return list(encoded["input_ids"])


def tokenize_prompt_and_output(
    prompt_strs: Sequence[str], output_strs: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """Tokenize prompts and outputs separately, concatenate and pad them, and mask the output's
    labels.

    No EOS is added: the data step appends it to responses. Padding is by position, so a pad token
    that equals the EOS token does no harm; without a pad token the EOS token (or id 0) fills.

    Args:
        prompt_strs: B prompts.
        output_strs: B outputs.
        tokenizer: gives the prompt its special prefix, the output never.

    Returns:
        `input_ids` and `labels`, (B, max(prompt and output tokens) - 1) int64, the labels being the
        next tokens, and `response_mask`, the same shape, bool, True where the label is an output
        token.

    Raises:
        ValueError: different numbers of prompts and outputs, or none.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> vocabulary = {"<pad>": 0, "1": 1, "+": 2, "=": 3, "2": 4}
        >>> words = Tokenizer(models.WordLevel(vocabulary, "<pad>"))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> batch = tokenize_prompt_and_output(["1 + 1 ="], ["2"],
        ...     PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"))
        >>> batch["labels"].tolist(), batch["response_mask"].tolist()
        ([[2, 1, 3, 4]], [[False, False, False, True]])
    """
    if len(prompt_strs) != len(output_strs) or not prompt_strs:
        raise ValueError(
            f"expected as many prompts as outputs and at least one, got {len(prompt_strs)} and "
            f"{len(output_strs)}"
        )
    prompts = tokenize_prompts(prompt_strs, tokenizer)
    outputs = tokenize_plain(output_strs, tokenizer)
    width = max(len(prompt) + len(output) for prompt, output in zip(prompts, outputs, strict=True))
    filler = (
        tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id or 0
    )
    ids = torch.full((len(prompts), width), filler, dtype=torch.int64)
    mask = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        end = len(prompt) + len(output)
        ids[row, :end] = torch.tensor(prompt + output, dtype=torch.int64)
        mask[row, len(prompt) : end] = True
    # The one shift: position t predicts token t + 1, and the mask lies on what is predicted.
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": mask[:, 1:]}
