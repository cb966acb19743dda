"""Evaluation loss: all negative log-probs summed, divided once by all response tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cs336_alignment.data.batching import collate, plan_microbatches
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.loss import masked_normalize
from cs336_alignment.training.parallel import Processes


def evaluate_loss(
    policy: Policy,
    dataset: TokenizedDataset,
    processes: Processes,
    *,
    microbatch_tokens: int,
    batching: Batching,
    advance: Callable[[int], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Compute the mean negative log-prob of the response tokens of a data set.

    The sums run in float64 over all examples and processes and are divided once, so the result
    depends on neither the batch size nor the number of processes.

    Args:
        policy: not wrapped: nothing here is synchronized but the sums.
        dataset: the examples.
        processes: among which they are divided.
        microbatch_tokens: token budget of a forward pass.
        batching: flat rows, or padded ones.
        advance: called with the number of examples done, for a progress bar.
        stopped: asked before each forward pass; once True the rest is left out, and the result is
            for nobody.

    Returns:
        `eval/loss` in nats a token and `eval/token_entropy` in nats.
    """
    device = processes.device
    microbatches = plan_microbatches(
        range(len(dataset)),
        dataset.lengths,
        num_processes=processes.count,
        process_index=processes.index,
        microbatch_tokens=microbatch_tokens,
        gradient_accumulation_steps=None,
        batching=batching,
    )
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    training = policy.training
    policy.eval()
    with torch.no_grad():
        for ids in microbatches:
            if stopped():
                break
            batch = collate([dataset[i] for i in ids], batching=batching).to(device)
            log_probs, entropy = policy(batch, with_entropy=True)
            assert entropy is not None
            sums[0] -= masked_normalize(log_probs.double(), batch.response_mask)
            sums[1] += masked_normalize(entropy.double(), batch.response_mask)
            advance(len(ids) * processes.count)
    policy.train(training)
    nll, entropy_sum = (processes.sum(sums) / int(dataset.response_lengths.sum())).tolist()
    return {"eval/loss": nll, "eval/token_entropy": entropy_sum}
