"""The step on a GPU: right, repeatable bit for bit, and without waiting for the device.

`make test-gpu`, on a machine with a CUDA device.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from cs336_alignment.config import ParallelConfig, TrainerConfig
from cs336_alignment.microbatch import Batching, FlatLayout
from cs336_alignment.model import attention
from cs336_alignment.model.embedding_noise import uniform
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.batching_choice import choose_batching
from cs336_alignment.training.optimizer import clip_gradients
from cs336_alignment.training.parallel import Processes, start_processes
from cs336_alignment.training.rehearsal import rehearse_microbatch
from cs336_alignment.training.sharding import shard
from cs336_alignment.training.step import Cut, accumulate_gradients
from tests.conftest import TINY, Sft, build_dataset, build_model, without_times
from tests.options import (
    PREFIX,
    Row,
    apart,
    config_of,
    start_of,
    support,
    train,
    train_plainly,
)
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
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "nanochat", "granite", "phi"])
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


@pytest.mark.parametrize("normalization", ["token", "sequence", "microbatch"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("batching", ["flat", "flat_shared_prefix"])
def test_a_step_never_waits_for_the_device_before_its_end(
    batching: Batching, weighted: bool, normalization: str, on_gpu: Processes
) -> None:
    dataset = build_dataset(prefix=19, weighted=weighted)
    policy = Policy(build_model("llama", torch.float32), torch.bfloat16).to(on_gpu.device)

    def take() -> None:
        accumulate_gradients(
            policy, dataset, IDS, cut=Cut(None, 3, batching), processes=on_gpu, seed=0, step=0,
            trainer=TrainerConfig(loss_normalization=normalization), with_entropy=True,
        )  # fmt: skip

    take()  # the first one chooses kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        take()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


@pytest.mark.parametrize("prefix", [0, 70])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("size", [64, 128, 20])
def test_attention_is_that_of_float64(size: int, heads: int, prefix: int) -> None:
    """Rows longer than a block of the kernel, grouped queries or not; a size it does not take."""
    torch.manual_seed(0)
    layout = FlatLayout.of([300, 130, 130, 1], prefix).to(torch.device("cuda"))
    total = prefix + 561
    rows = [torch.randn(1, n, total, size, dtype=torch.float64) for n in (4, heads, heads)]
    upstream = torch.randn(1, total, 4, size, dtype=torch.float64)
    found = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs = [x.to("cuda", dtype).requires_grad_() for x in rows]
        if dtype == torch.bfloat16:
            assert attention.takes_varlen(inputs[0], inputs[2], 0.0) == (size != 20)
        out = attention._attend(*inputs, layout, 0.0, None)
        out.backward(upstream.to("cuda", dtype))
        found.append([x.double() for x in (out, *(x.grad for x in inputs))])
    for exact, single, half in zip(*found, strict=True):
        assert relative_error(single, exact) <= 1e-5
        assert relative_error(half, exact) <= 0.02


def test_the_start_tries_the_kernel_of_training(
    on_gpu: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(build_model("llama", torch.float32), torch.bfloat16).to(on_gpu.device)

    def refuse(*_: object) -> Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(attention, "_varlen_attention", refuse)
    choice = choose_batching(policy, "auto", 64)
    assert choice.batching == "padded" and "no kernel" in choice.reason


def test_noise_on_embeddings_is_that_of_the_cpu_bit_for_bit(on_gpu: Processes) -> None:
    seeds, positions = torch.arange(-50, 50) * 2**56 + 12345, torch.arange(100)
    there = uniform(seeds.to(on_gpu.device), positions.to(on_gpu.device), 77)
    assert torch.equal(there.cpu(), uniform(seeds, positions, 77))


@pytest.mark.parametrize("row", support(), ids=lambda row: row.name)
def test_every_row_of_the_support_matrix_trains_as_on_the_cpu(row: Row, on_gpu: Processes) -> None:
    config, dataset = config_of(*row.overrides), build_dataset(prefix=PREFIX)
    policy = Policy(build_model("llama", torch.float32)).to(on_gpu.device)
    got = train(policy, policy, dataset, config, Cut(None, 2, "flat"), on_gpu).cpu()
    want = train_plainly(build_model("llama", torch.float32), dataset, config)
    assert apart(got, want, start_of("llama", torch.float32)) <= 0.02


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_sharded_steps_are_those_of_the_cpu(cpu_offload: bool, on_gpu: Processes) -> None:
    sharding = ParallelConfig("fsdp2", cpu_offload=cpu_offload)
    processes, config = Processes(start_processes(sharding), sharding), config_of()
    dataset = build_dataset(prefix=PREFIX)
    policy = Policy(build_model("llama", torch.float32))
    shard(policy, on_gpu.device, 1, sharding)
    assert policy.device.type == "cuda"
    assert {p.is_cpu for p in policy.parameters()} == {cpu_offload}
    assert not any(buffer.is_cpu for buffer in policy.buffers())
    choice = choose_batching(policy, "auto", 64)
    assert choice.batching == "flat_shared_prefix"
    rehearse_microbatch(policy, dataset, IDS, Cut(None, 2, choice.batching), accumulated=True)
    got = train(policy, policy, dataset, config, Cut(None, 2, choice.batching), processes).cpu()
    assert clip_gradients(policy, 1.0).isfinite()
    want = train_plainly(build_model("llama", torch.float32), dataset, config)
    assert apart(got, want, start_of("llama", torch.float32)) <= 0.02
    with processes.held_whole(policy):
        assert {p.is_cpu for p in policy.parameters()} == {False}


@pytest.mark.parametrize("lora", [(), ("lora.r=4",)], ids=["whole", "lora"])
def test_an_offloaded_run_goes_on_and_is_loaded_again(
    lora: tuple[str, ...], base: Path, rows: Path, sft: Sft, tmp_path: Path
) -> None:
    pytest.importorskip("hydra")
    words = (
        *TINY, f"data.train_path={rows}", f"data.eval_path={rows}", "parallel=fsdp2",
        f"model.name_or_path={base}", "model.random_init=false", "trainer.save_steps=2",
        "evaluation.generation_steps=0", "evaluation.max_new_tokens=4", "trainer.eval_steps=2",
        "trainer.reload_check=true", "optimizer.lr_scheduler_type=constant",
        "optimizer.warmup_ratio=0", *lora,
    )  # fmt: skip
    offload = "parallel.cpu_offload=true"
    for name, steps, more in (
        ("whole", 4, ()), ("off", 2, (offload,)), ("off", 4, (offload,))
    ):  # fmt: skip
        done = sft("train", *words, *more, f"trainer.max_steps={steps}", f"run_name={name}")
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        without_times(tmp_path / "outputs" / name / "metrics.jsonl") for name in ("whole", "off")
    )
    losses = [[row["train/loss"] for row in rows if "train/loss" in row] for rows in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and len(losses[0]) == 4
