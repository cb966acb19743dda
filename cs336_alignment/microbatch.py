"""What travels from the data to the model: one microbatch, flat or padded.

B rows, S positions of a padded row, T = tokens in all (B·S, or the flat row), R response tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

# Rows padded to one width; one row without padding; the same with the tokens that all examples
# begin with computed once.
Batching = Literal["padded", "flat", "flat_shared_prefix"]


@dataclass(frozen=True)
class SharedPrefix:
    """The keys that the sequences of a flat row attend to, where its first sequence is a prefix of
    all others: each of these sees the prefix, then itself. N sequences follow the prefix, P tokens
    long; K = P + N·P + what follows = all keys, sequence by sequence.

    Attributes:
        length: P.
        key_index: (K,) int64, the position in the row of each key.
        cu_key_lens: (N + 2,) int32, the borders of the sequences' keys, from 0 to K.
        copies: ((N + 1)·P,) int64, where in the keys the prefix stands, copy by copy.
        own_index: (T,) int64, where in the keys each position of the row first stands.
    """

    length: int
    key_index: Tensor
    cu_key_lens: Tensor
    copies: Tensor
    own_index: Tensor

    @staticmethod
    def before(lengths: list[int], prefix: int) -> SharedPrefix:
        """Index the keys of sequences of these lengths that follow a prefix of `prefix` tokens."""
        rows = _borders([prefix, *lengths])
        keys = _borders([prefix, *(prefix + length for length in lengths)])
        shared = torch.arange(prefix)
        key_index, own_index = [shared], [shared]
        for length, row, key in zip(lengths, rows[1:-1], keys[1:-1], strict=True):
            key_index += [shared, torch.arange(row, row + length)]
            own_index.append(torch.arange(key + prefix, key + prefix + length))
        return SharedPrefix(
            length=prefix,
            key_index=torch.cat(key_index),
            cu_key_lens=torch.tensor(keys, dtype=torch.int32),
            copies=(torch.tensor(keys[:-1])[:, None] + shared).flatten(),
            own_index=torch.cat(own_index),
        )

    def to(self, device: torch.device) -> SharedPrefix:
        """Copy to a device."""
        return _moved(self, device)


def _borders(lengths: list[int]) -> list[int]:
    return list(itertools.accumulate(lengths, initial=0))


@dataclass(frozen=True)
class FlatLayout:
    """Where the sequences of a flat row lie.

    Attributes:
        groups: runs of neighbouring sequences of one length, as (number of sequences, tokens of
            each); a shared prefix is the first, alone.
        cu_seq_lens: (number of sequences + 1,) int32, the borders, beginning with 0 and ending with
            T.
        max_length: tokens of the longest sequence; with the prefix that it sees.
        prefix: that the other sequences attend to besides themselves; None: each stands alone.
    """

    groups: tuple[tuple[int, int], ...]
    cu_seq_lens: Tensor
    max_length: int
    prefix: SharedPrefix | None = None

    @staticmethod
    def of(lengths: list[int], prefix: int = 0) -> FlatLayout:
        """Build the layout of sequences of these lengths, in this order, after a shared prefix.

        Example:
            >>> FlatLayout.of([3, 2, 2]).groups
            ((1, 3), (2, 2))
            >>> FlatLayout.of([3, 2, 2], prefix=3).groups
            ((1, 3), (1, 3), (2, 2))
        """
        runs = [(len(list(run)), length) for length, run in itertools.groupby(lengths)]
        first = (prefix,) if prefix else ()
        return FlatLayout(
            groups=(*((1, length) for length in first), *runs),
            cu_seq_lens=torch.tensor(_borders([*first, *lengths]), dtype=torch.int32),
            max_length=prefix + max(lengths),
            prefix=SharedPrefix.before(lengths, prefix) if prefix else None,
        )

    @cached_property
    def masks(self) -> dict[Any, Tensor]:
        """What attention masks with: the first layer makes it, all use it."""
        return {}

    def to(self, device: torch.device) -> FlatLayout:
        """Copy to a device."""
        return _moved(self, device)


@dataclass(frozen=True)
class TokenWeights:
    """How much each response token of a microbatch counts, where not all count the same.

    Attributes:
        token: (R,) float64, the token's own weight times its example's.
        example_total: (R,) float64, the sum of these over the token's example.
        example: (R,) float64, the weight of the token's example.
        total: the sum of `token`.
    """

    token: Tensor
    example_total: Tensor
    example: Tensor
    total: float

    def to(self, device: torch.device) -> TokenWeights:
        """Copy to a device."""
        return _moved(self, device)


@dataclass(frozen=True)
class EmbeddingNoise:
    """What the noise on a microbatch's embeddings is drawn from, position by position.

    Attributes:
        seeds: as `input_ids`, int64, the seed of the position's example.
        scale: as `input_ids`, float32, how loud it is for an embedding of one dimension.
    """

    seeds: Tensor
    scale: Tensor

    def to(self, device: torch.device) -> EmbeddingNoise:
        """Copy to a device."""
        return _moved(self, device)


@dataclass(frozen=True)
class Microbatch:
    """One forward and backward pass on one process.

    The last token of an example is never an input, only a label, so an example of L tokens occupies
    L - 1 positions; those of a shared prefix are there once for all examples.

    Attributes:
        input_ids: (1, T) flat or (B, S) padded, int64.
        position_ids: as `input_ids`; each sequence counts from 0, or on from the shared prefix.
        attention_mask: None if flat; (B, S) bool, True on tokens, if padded.
        flat_layout: the sequences of the flat row; None if padded.
        response_index: (R,) int64, the positions (in the flattened input) that predict a response
            token.
        labels: (R,) int64, the response tokens they predict.
        response_mask: (R,) bool, all True but for the filler of an empty microbatch.
        example_response_tokens: (R,) int64, the number of response tokens of the label's example.
        num_response_tokens: trained tokens.
        weights: of the tokens; None: all count the same.
        noise: on the embeddings; None: they stay as they are.
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
    noise: EmbeddingNoise | None = None

    def to(self, device: torch.device) -> Microbatch:
        """Copy every tensor to a device."""
        return self if self.input_ids.device == device else _moved(self, device)


Record = TypeVar("Record", "Microbatch", FlatLayout, SharedPrefix, TokenWeights, EmbeddingNoise)


def _moved(record: Record, device: torch.device) -> Record:
    """Copy all tensors of a record to a device."""
    # A copy from pinned memory waits for nothing.
    pinned = device.type == "cuda"

    def move(value: Tensor) -> Tensor:
        source = value.pin_memory() if pinned and not value.is_cuda else value
        return source.to(device, non_blocking=True)

    return with_tensors(record, move)


def with_tensors(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """Give a record in which every tensor, and every one of the records in it, is changed."""
    changed: dict[str, Any] = {}
    for item in dataclasses.fields(record):
        value: Any = getattr(record, item.name)
        if isinstance(value, Tensor):
            changed[item.name] = change(value)
        elif dataclasses.is_dataclass(value):
            changed[item.name] = with_tensors(value, change)  # type: ignore[type-var]
    return dataclasses.replace(record, **changed)
