"""Noise on the embeddings, drawn where it is needed: the same numbers on every device and cut."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cs336_alignment.microbatch import EmbeddingNoise, Microbatch

CHUNK = 2**22  # numbers at a time: each takes an int64 on the way
# Of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), as signed numbers; products wrap around.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
BITS = 24  # that a float32 holds exactly


def uniform(seeds: Tensor, positions: Tensor, width: int) -> Tensor:
    """Draw numbers from -1 to below 1 that depend on nothing but seed, position and column.

    Integers are hashed, not drawn one after another: a number needs no other one, and a GPU gives
    the bits that a CPU gives.

    Args:
        seeds: (N,) int64.
        positions: (N,) int64, each number of a stream of its seed, counted in rows of `width`.
        width: columns.

    Returns:
        (N, width) float32.
    """
    columns = torch.arange(1, width + 1, device=seeds.device) * GOLDEN
    result = torch.empty((len(seeds), width), device=seeds.device)
    rows = max(1, CHUNK // width)
    for start in range(0, len(seeds), rows):
        chunk = slice(start, start + rows)
        starts = seeds[chunk] + positions[chunk] * width * GOLDEN
        x = starts[:, None] + columns
        for shift, factor in zip((30, 27), FACTORS, strict=True):
            x = x.bitwise_xor_(_shifted(x, shift)).mul_(factor)
        x = x.bitwise_xor_(_shifted(x, 31))
        result[chunk] = _shifted(x, 64 - BITS)
    return result.mul_(2.0 ** (1 - BITS)).sub_(1.0)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift right without the sign."""
    return (x >> by).bitwise_and_(2 ** (64 - by) - 1)


@contextlib.contextmanager
def noisy_embeddings(model: PreTrainedModel, batch: Microbatch) -> Iterator[None]:
    """Add a microbatch's noise, if it has any, to what the embedding gives within a context."""
    if batch.noise is None:
        yield
        return
    noise, positions = batch.noise, batch.position_ids

    def add(_module: Any, _inputs: Any, embedded: Tensor) -> Tensor:
        return embedded + _draw(noise, positions, embedded.shape[-1]).to(embedded.dtype)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _draw(noise: EmbeddingNoise, positions: Tensor, width: int) -> Tensor:
    drawn = uniform(noise.seeds.flatten(), positions.flatten(), width)
    drawn *= noise.scale.flatten()[:, None] / math.sqrt(width)
    return drawn.unflatten(0, noise.seeds.shape)
