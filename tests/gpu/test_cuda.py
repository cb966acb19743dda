"""The step on a GPU: right, repeatable bit for bit, and without waiting for the device.

`make test-gpu`, on a machine with a CUDA device.
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from cs336_alignment.config import ParallelConfig, TrainerConfig
from cs336_alignment.data.batching import collate
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.batching_choice import choose_batching
from cs336_alignment.training.loss import StepCounts, loss_slopes, loss_weights, microbatch_loss
from cs336_alignment.training.parallel import Processes, start_processes
from cs336_alignment.training.step import Cut, accumulate_gradients
from tests.conftest import build_dataset, build_model
from tests.reference import dense_loss, gradient, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
BATCHINGS = get_args(Batching)
IDS = list(range(8))
BOUNDS = {None: 1e-5, torch.bfloat16: 0.05}


@pytest.fixture(scope="module")
def on_gpu() -> Processes:
    return Processes(start_processes(ParallelConfig()))


def step_gradient(policy: Policy, cut: Cut, processes: Processes) -> Tensor:
    policy.zero_grad(set_to_none=True)
    accumulate_gradients(
        policy, build_dataset(prefix=19), IDS, cut=cut, processes=processes, seed=0, step=0,
        trainer=TrainerConfig(),
    )  # fmt: skip
    return gradient(policy.model)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_every_layout_gives_the_dense_gradient(
    name: str, batching: Batching, autocast: torch.dtype | None, on_gpu: Processes
) -> None:
    reference = build_model(name)  # float64, on the CPU
    dense_loss(reference, build_dataset(prefix=19), IDS, "token").backward()
    want = gradient(reference).float()
    policy = Policy(build_model(name, torch.float32), autocast).to(on_gpu.device)
    got = step_gradient(policy, Cut(None, 2, batching), on_gpu).cpu()
    assert relative_error(got, want) <= BOUNDS[autocast]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_the_same_step_gives_the_same_bits(batching: Batching, on_gpu: Processes) -> None:
    policy = Policy(build_model("llama", torch.float32), torch.bfloat16).to(on_gpu.device)
    first, *others = (step_gradient(policy, Cut(None, 2, batching), on_gpu) for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


def test_auto_shares_the_prefix(on_gpu: Processes) -> None:
    policy = Policy(build_model("llama", torch.float32), torch.bfloat16).to(on_gpu.device)
    assert choose_batching(policy, "auto", 64).batching == "flat_shared_prefix"


@pytest.mark.parametrize("batching", ["flat", "flat_shared_prefix"])
def test_a_microbatch_never_waits_for_the_device(batching: Batching, on_gpu: Processes) -> None:
    dataset = build_dataset(prefix=19)
    policy = Policy(build_model("llama", torch.float32), torch.bfloat16).to(on_gpu.device)
    examples = [dataset[i] for i in IDS]
    tokens = int(dataset.response_lengths[IDS].sum())
    counts = StepCounts(
        num_examples=len(IDS), example_weight=float(len(IDS)), token_weight=float(tokens),
        num_microbatches=1, num_processes=1,
    )  # fmt: skip

    def take() -> None:
        batch = collate(examples, batching=batching).to(on_gpu.device)
        mask, constant = loss_weights("token", batch, counts, 1.0)
        slopes = loss_slopes(mask, constant, torch.float32)
        log_probs, _ = policy(batch, True, slopes)
        microbatch_loss(log_probs, mask, constant).backward()

    take()  # the first one chooses kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        take()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())
