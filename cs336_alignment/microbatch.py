"""What travels from the data to the model: one microbatch, flat or padded.

B rows, S positions of a padded row, T = tokens in all (B·S, or the flat row), R response tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class FlatLayout:
    """Where the sequences of a flat row lie.

    Attributes:
        groups: runs of neighbouring sequences of one length, as (number of sequences, tokens of
            each).
        cu_seq_lens: (number of sequences + 1,) int32, the borders, beginning with 0 and ending with
            T.
        max_length: tokens of the longest sequence.
    """

    groups: tuple[tuple[int, int], ...]
    cu_seq_lens: Tensor
    max_length: int

    @staticmethod
    def of(lengths: list[int]) -> FlatLayout:
        """Build the layout of sequences of these lengths, in this order.

        Example:
            >>> FlatLayout.of([3, 2, 2]).groups
            ((1, 3), (2, 2))
        """
        groups: list[tuple[int, int]] = []
        for length in lengths:
            if groups and groups[-1][1] == length:
                groups[-1] = (groups[-1][0] + 1, length)
            else:
                groups.append((1, length))
        borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return FlatLayout(tuple(groups), borders, max(lengths))


@dataclass(frozen=True)
class TokenWeights:
    """How much each response token of a microbatch counts, where not all count the same.

    Attributes:
        token: (R,) float64, the token's own weight times its example's.
        example_total: (R,) float64, the sum of these over the token's example.
        example: (R,) float64, the weight of the token's example.
    """

    token: Tensor
    example_total: Tensor
    example: Tensor

    def to(self, device: torch.device) -> TokenWeights:
        """Copy to a device."""
        own = (self.token, self.example_total, self.example)
        return TokenWeights(*(tensor.to(device, non_blocking=True) for tensor in own))


@dataclass(frozen=True)
class Microbatch:
    """One forward and backward pass on one process.

    The last token of an example is never an input, only a label, so an example of L tokens occupies
    L - 1 positions.

    Attributes:
        input_ids: (1, T) flat or (B, S) padded, int64.
        position_ids: as `input_ids`; each sequence counts from 0.
        attention_mask: None if flat; (B, S) bool, True on tokens, if padded.
        flat_layout: the sequences of the flat row; None if padded.
        response_index: (R,) int64, the positions (in the flattened input) that predict a response
            token.
        labels: (R,) int64, the response tokens they predict.
        response_mask: (R,) bool, all True but for the filler of an empty microbatch.
        example_response_tokens: (R,) int64, the number of response tokens of the label's example.
        num_response_tokens: trained tokens.
        weights: of the tokens; None: all count the same.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    flat_layout: FlatLayout | None
    response_index: Tensor
    labels: Tensor
    response_mask: Tensor
    example_response_tokens: Tensor
    num_response_tokens: int
    weights: TokenWeights | None = None

    def to(self, device: torch.device) -> Microbatch:
        """Copy every tensor to a device."""
        if self.input_ids.device == device:
            return self
        moved: dict[str, Any] = {
            item.name: value.to(device, non_blocking=True)
            for item in dataclasses.fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        if self.flat_layout is not None:
            borders = self.flat_layout.cu_seq_lens.to(device, non_blocking=True)
            moved["flat_layout"] = dataclasses.replace(self.flat_layout, cu_seq_lens=borders)
        if self.weights is not None:
            moved["weights"] = self.weights.to(device)
        return dataclasses.replace(self, **moved)
