"""NEFTune: which noise each position's embedding gets, a function of seed, step, example and
position.

B rows, S positions of a padded row, T positions of a flat one, L tokens of one example.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from cs336_alignment.data.batching import Lengths, mix_seed
from cs336_alignment.microbatch import EmbeddingNoise, Microbatch


def with_noise(
    batch: Microbatch,
    example_ids: Sequence[int],
    lengths: Lengths,
    *,
    alpha: float,
    seed: int,
    step: int,
) -> Microbatch:
    """Give a microbatch what the noise on its embeddings is drawn from (arXiv 2310.05914).

    Each number is uniform within ±alpha / sqrt(L · embedding dimensions), L being the tokens of the
    example, not the width of a row: so the noise does not depend on how a step is cut.

    Args:
        batch: of these examples; no prefix is shared.
        example_ids: in their order; none: a filler, which stays as it is.
        lengths: tokens of every example of the data set, by id.
        alpha: how loud.
        seed: of the run.
        step: 0-based.
    """
    if not example_ids:
        return batch
    seeds = torch.tensor([mix_seed(seed, step, i) for i in example_ids])
    scale = torch.tensor([alpha / math.sqrt(lengths[i]) for i in example_ids])
    if batch.flat_layout is None:  # (B, S)
        shape = batch.input_ids.shape
        noise = EmbeddingNoise(seeds[:, None].expand(shape), scale[:, None].expand(shape))
    else:  # (1, T)
        assert batch.flat_layout.prefix is None
        widths = torch.tensor([int(lengths[i]) - 1 for i in example_ids])
        noise = EmbeddingNoise(*(x.repeat_interleave(widths)[None] for x in (seeds, scale)))
    return dataclasses.replace(batch, noise=noise.to(batch.input_ids.device))
