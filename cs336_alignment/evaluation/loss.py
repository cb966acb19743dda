"""Evaluation loss: all negative log-probs summed, divided once by all response tokens; the same of
first tokens, of stop tokens, and of each source.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch

from cs336_alignment.data.batching import collate
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.loss import masked_normalize
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.step import Cut


def evaluate_loss(
    policy: Policy,
    dataset: TokenizedDataset,
    processes: Processes,
    *,
    microbatch_tokens: int,
    batching: Batching,
    stop_ids: Collection[int] = (),
    groups: Sequence[str] = (),
    advance: Callable[[int], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Compute the mean negative log-prob of the response tokens of a data set.

    The sums run in float64 over all examples and processes and are divided once, so the result
    depends on neither the batch size nor the number of processes.

    Args:
        policy: not in DDP: nothing here is synchronized but the sums, and sharded weights.
        dataset: the examples.
        processes: among which they are divided.
        microbatch_tokens: token budget of a forward pass.
        batching: flat rows, or padded ones.
        stop_ids: tokens that end a response (EOS, an end of turn).
        groups: (N,) the name of the source that each example is of; empty: they are not told apart.
        advance: called with the number of examples done, for a progress bar.
        stopped: asked before each forward pass; once True the rest is left out, and the result is
            for nobody.

    Returns:
        In nats a token: `eval/loss`; `eval/loss_first_token`, the mean over the examples of the
        first trained token of each; `eval/loss_stop_token`, the mean of the last trained token over
        the examples where that is a stop token, left out if there is none; `eval/loss/NAME` for
        each group of several; and `eval/token_entropy` in nats.
    """
    device = processes.device
    names = list(dict.fromkeys(groups))
    group_of = torch.tensor([names.index(name) for name in groups], dtype=torch.int64)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    microbatches = Cut(microbatch_tokens, None, batching).of_process(
        range(len(dataset)), dataset.lengths, processes.count, processes.index, processes.shards
    )
    sums = torch.zeros(5 + len(names), dtype=torch.float64, device=device)
    training = policy.training
    policy.eval()
    with torch.no_grad():
        for ids in microbatches:
            if stopped() or not ids:
                if not processes.shards:
                    break
                policy(collate([], batching=batching).to(device))  # the others wait for it
                continue
            examples = [dataset[i] for i in ids]
            batch = collate(examples, batching=batching).to(device)
            log_probs, entropy = policy(batch, with_entropy=True)
            assert entropy is not None
            nll = -log_probs.double()  # (R,) in the order of the examples
            sums[0] += masked_normalize(nll, batch.response_mask)
            sums[1] += masked_normalize(entropy.double(), batch.response_mask)
            # Position t predicts token t + 1, so an example's first token is never among them.
            counts = torch.tensor([int(example.response_mask[1:].sum()) for example in examples])
            ends = counts.cumsum(0).to(device)  # (examples,)
            last = ends - 1
            is_stop = torch.isin(batch.labels[last], stops)
            sums[2] += nll[ends - counts.to(device)].sum()
            sums[3] += masked_normalize(nll[last], is_stop)
            sums[4] += is_stop.sum()
            if names:
                owners = group_of[ids].repeat_interleave(counts).to(device)  # (R,)
                sums[5:].index_add_(0, owners, nll)
            advance(len(ids) * processes.count)
    policy.train(training)
    nll_sum, entropy_sum, first, stop, num_stops, *by_group = processes.sum(sums).tolist()
    num_tokens = int(dataset.response_lengths.sum())
    metrics = {
        "eval/loss": nll_sum / num_tokens,
        "eval/token_entropy": entropy_sum / num_tokens,
        "eval/loss_first_token": first / len(dataset),
    }
    if num_stops:
        metrics["eval/loss_stop_token"] = stop / num_stops
    if len(names) > 1:
        tokens = np.bincount(group_of.numpy(), dataset.response_lengths, len(names))
        for name, total, number in zip(names, by_group, tokens, strict=True):
            metrics[f"eval/loss/{name}"] = total / float(number)
    return metrics
