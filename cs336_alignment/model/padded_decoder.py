"""Decoding in padded batches with transformers' own cache, for architectures that take no slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cs336_alignment.model.attention import autocasting


class PaddedDecoder:
    """Decodes a batch of left-padded rows until all of them are over, then takes the next.

    Args:
        model: in eval mode.
        slots: rows at once.
        autocast_dtype: compute dtype; None: the weights' own.
    """

    def __init__(
        self, model: PreTrainedModel, *, slots: int, autocast_dtype: torch.dtype | None = None
    ) -> None:
        self._model, self._slots, self._autocast_dtype = model, slots, autocast_dtype
        self._rows: list[int] = []  # row → its place in the batch
        self._mask = torch.empty(0)
        self._cache: Any = None

    @property
    def free(self) -> int:
        """Rows that `admit` takes now: none while a row is left."""
        return 0 if self._rows else self._slots

    def admit(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Take the rows of a batch.

        Args:
            prompts: at most `free`, none empty.

        Returns:
            (prompts, V) logits of each prompt's next token, float32 or wider.
        """
        width = max(len(prompt) for prompt in prompts)
        input_ids = torch.zeros((len(prompts), width), dtype=torch.int64)
        self._mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):  # generation goes on at the right end
            input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            self._mask[row, width - len(prompt) :] = 1
        self._rows = list(range(len(prompts)))
        self._cache = DynamicCache(config=self._model.config)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        return self._forward(input_ids, positions)

    def step(self, tokens: Tensor) -> Tensor:
        """Give each row one token.

        Args:
            tokens: (n,) int64, in the order of the rows.

        Returns:
            (n, V) logits of the next ones.
        """
        batch = torch.zeros((len(self._mask), 1), dtype=torch.int64)
        batch[self._rows, 0] = tokens.cpu()
        self._mask = torch.cat([self._mask, torch.ones_like(batch)], dim=1)
        positions = self._mask.sum(1, keepdim=True) - 1
        return self._forward(batch, positions)[self._rows]

    def release(self, row: int) -> None:
        """Let a row go; the last one takes its number."""
        last = self._rows.pop()
        if row < len(self._rows):
            self._rows[row] = last

    def _forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        device = self._model.device
        with autocasting(device, self._autocast_dtype):
            logits = self._model(
                input_ids=input_ids.to(device), attention_mask=self._mask.to(device),
                position_ids=positions.to(device), past_key_values=self._cache, use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]  # fmt: skip
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
