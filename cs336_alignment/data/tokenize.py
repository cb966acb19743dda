"""Prompts and responses to token ids, and the mask that says which of them are trained.

B batch, L tokens of one example.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cs336_alignment.files import sha256_of


@dataclass(frozen=True)
class TokenRow:
    """One example as tokens, as the data step makes and keeps it.

    Attributes:
        input_ids: (L,) int32.
        spans: (spans, 2) int32, the trained stretches as (start, end), in order, none empty, none
            before token 1: nothing predicts the first token.
        span_weights: (spans,) float32 above 0.
        example_weight: of the whole example.
    """

    input_ids: NDArray[np.int32]
    spans: NDArray[np.int32]
    span_weights: NDArray[np.float32]
    example_weight: float = 1.0

    @staticmethod
    def of_response(
        ids: Sequence[int], num_prompt: int, example_weight: float = 1.0, *, whole: bool = False
    ) -> TokenRow:
        """Make a row that trains everything after its prompt; `whole`: the prompt, too, as a
        stretch of its own.
        """
        start = max(num_prompt, 1)
        borders = [(1, start)] if whole else []
        borders.append((start, len(ids)))
        spans = np.array([(a, b) for a, b in borders if a < b], dtype=np.int32)
        weights = np.ones(len(spans), dtype=np.float32)
        return TokenRow(
            np.asarray(ids, dtype=np.int32), spans.reshape(-1, 2), weights, example_weight
        )

    @staticmethod
    def of_weights(
        ids: Sequence[int] | NDArray[np.int32],
        weights: Sequence[float] | NDArray[np.float32],
        example_weight: float = 1.0,
    ) -> TokenRow:
        """Make a row from a weight for every token, 0 where it is only read."""
        each = np.array(weights, dtype=np.float32)
        each[:1] = 0
        borders = np.flatnonzero(np.diff(each, prepend=np.float32(0), append=np.float32(0)))
        starts, ends = borders[:-1], borders[1:]
        trained = each[starts] > 0
        spans = np.stack([starts[trained], ends[trained]], axis=1).astype(np.int32)
        return TokenRow(np.asarray(ids, dtype=np.int32), spans, each[spans[:, 0]], example_weight)

    @property
    def weights(self) -> NDArray[np.float32]:
        """(L,) the weight of every token, 0 where it is only read."""
        each = np.zeros(len(self.input_ids), dtype=np.float32)
        for (start, end), weight in zip(self.spans, self.span_weights, strict=True):
            each[start:end] = weight
        return each


@dataclass(frozen=True)
class TokenizedExample:
    """One example as the trainer takes it.

    Attributes:
        input_ids: (L,) int64, prompt then response.
        response_mask: (L,) bool, True on the tokens that are trained.
        example_id: its place in the data set.
        weights: (L,) float32, the weight of every token; None: 1 on each trained one.
        example_weight: of the whole example.
    """

    input_ids: Tensor
    response_mask: Tensor
    example_id: int
    weights: Tensor | None = None
    example_weight: float = 1.0


# In a tokenizer's JSON, truncation and padding as an earlier call asked for them; no call here
# leaves them so. Read as text, since parsing it takes half a second.
EARLIER_CALL = re.compile(
    r'\A(\{"version":"[^"]*",)"truncation":.*?,"padding":.*?,(?="added_tokens":)'
)


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


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything that decides what a tokenizer and its chat template make of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        model = json.dumps(tokenizer.get_vocab(), sort_keys=True)
        for kind in sorted(tokenizer.vocab_files_names):  # merges, a sentencepiece model
            path = Path(str(getattr(tokenizer, kind, "")))
            model += sha256_of(path) if path.is_file() else ""
    else:
        model = EARLIER_CALL.sub(r"\1", backend.to_str(), count=1)
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    parts = [type(tokenizer).__name__, model, json.dumps(special, sort_keys=True),
             json.dumps(tokenizer.chat_template, sort_keys=True),
             str(getattr(tokenizer, "split_special_tokens", False))]  # fmt: skip
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


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
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # the Rust tokenizer itself: no offsets, no masks, a third faster
        backend.no_truncation()
        backend.no_padding()
        return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    # verbose=False: transformers would warn of rows over the model's length, which the caller
    # handles.
    encoded = tokenizer(
        list(texts), add_special_tokens=False, verbose=False, return_attention_mask=False
    )
    return list(encoded["input_ids"])


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Give the exact text of tokens: special ones kept, no spaces tidied away."""
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


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
    fillers = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    filler = next(token_id for token_id in fillers if token_id is not None)
    ids = torch.full((len(prompts), width), filler, dtype=torch.int64)
    mask = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        end = len(prompt) + len(output)
        ids[row, :end] = torch.tensor(prompt + output, dtype=torch.int64)
        mask[row, len(prompt) : end] = True
    # The one shift: position t predicts token t + 1, and the mask lies on what is predicted.
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": mask[:, 1:]}
