"""What is tried before step 1, memory and disk, changes nothing and finds what would fail later."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from cs336_alignment.data.batching import StepPlan, collate, plan_microbatches
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.policy import Policy
from cs336_alignment.model.recompute import enable_checkpointing
from cs336_alignment.training import checkpoint_writer, snapshot
from cs336_alignment.training.checkpoint_writer import CheckpointWriter
from cs336_alignment.training.optimizer import allocate_state
from cs336_alignment.training.rehearsal import largest_microbatch, rehearse_microbatch
from cs336_alignment.training.step import Cut
from tests.checkpoints import build, save, sidecars, take_step
from tests.conftest import build_dataset, build_model


def test_allocated_state_is_that_of_the_first_step() -> None:
    (plain, optimizer), (allocated, other) = build(), build()
    allocate_state(other)
    for step in range(3):
        take_step(plain, optimizer, step)
        take_step(allocated, other, step)
    for a, b in zip(plain.parameters(), allocated.parameters(), strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[a].keys() == other.state[b].keys()
        assert all(
            torch.equal(optimizer.state[a][key], other.state[b][key]) for key in other.state[b]
        )
    before = copy.deepcopy(other.state_dict())
    allocate_state(other)  # what is there stays
    assert str(other.state_dict()) == str(before)


@pytest.mark.parametrize("batching", get_args(Batching))
@pytest.mark.parametrize("cut", [(60, None), (100, None), (None, 2)])
def test_the_largest_microbatch_is_found(
    batching: Batching, cut: tuple[int | None, int | None]
) -> None:
    dataset = build_dataset(23, prefix=17)
    plan = StepPlan(len(dataset), 5, seed=1)
    for index in range(2):
        sizes = []
        for step in range(3, 9):
            for ids in plan_microbatches(
                plan.example_ids(step), dataset.lengths, num_processes=2, process_index=index,
                microbatch_tokens=cut[0], gradient_accumulation_steps=cut[1], batching=batching,
            ):  # fmt: skip
                sizes.append(positions(dataset, ids, batching))
        found = largest_microbatch(
            plan,
            Cut(*cut, batching),
            dataset,
            range(3, 9),
            num_processes=2,
            process_index=index,
        )
        assert positions(dataset, found, batching) == max(sizes)


def positions(dataset: TokenizedDataset, ids: list[int], batching: Batching) -> int:
    return collate([dataset[i] for i in ids], batching=batching).input_ids.numel()


def test_a_rehearsed_microbatch_recomputes_as_a_step_does() -> None:
    model = build_model("llama").eval()  # as it is loaded
    enable_checkpointing(model)
    layers: list[bool] = []
    model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: layers.append(True))
    rehearse_microbatch(
        Policy(model), build_dataset(), [0, 3], Cut(None, 1, batching="flat"), agree=lambda _: True
    )
    assert len(layers) == 2  # once more in the backward pass


def test_a_rehearsed_microbatch_leaves_no_trace() -> None:
    policy, dataset = Policy(build_model("llama")), build_dataset()
    before = copy.deepcopy(policy.state_dict())
    for accumulated in (False, True):
        text, seconds = rehearse_microbatch(
            policy, dataset, [0, 3, 5], Cut(None, 1, batching="flat"), accumulated=accumulated
        )
        assert f"{int(dataset.lengths[[0, 3, 5]].sum()) - 3:,} tokens" in text and "GiB" in text
        assert seconds > 0
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.parameters())


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
@pytest.mark.fault("F18 too little memory for the largest microbatch")
def test_too_little_memory_says_what_to_do(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(build_model("llama"))

    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(policy, "forward", fail)
    with pytest.raises(UserError) as caught:
        rehearse_microbatch(policy, build_dataset(), [0], Cut(None, 1, batching="flat"))
    assert (caught.value.code, caught.value.status) == ("R303", ExitStatus.INTERNAL)
    assert "trainer.microbatch_tokens" in str(caught.value)
    failure = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        rehearse_microbatch(policy, build_dataset(), [0], Cut(None, 1, batching="flat"))


def writer_of(folder: Path) -> CheckpointWriter:
    return CheckpointWriter(folder, extra={}, save_sidecars=sidecars, keep=2, asynchronous=False)


def test_a_rehearsed_checkpoint_leaves_no_trace(tmp_path: Path) -> None:
    module, optimizer = build()
    save(tmp_path, 3)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert writer_of(tmp_path).rehearse(module, optimizer, saves=9) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.fault("T6 disk full, found before step 1")
def test_a_disk_without_room_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, optimizer = build()
    allocate_state(optimizer)
    needed = snapshot.Snapshot.of(snapshot.TrainState(), module, optimizer).bytes / 2**20
    for room, warns in ((3.1, False), (2.9, True), (1.1, True)):
        monkeypatch.setattr(checkpoint_writer, "free_mib", lambda _, room=room: room * needed)
        warning = writer_of(tmp_path).rehearse(module, optimizer, saves=9)
        assert (warning is not None) == warns
    assert (
        writer_of(tmp_path).rehearse(module, optimizer, saves=1) is None
    )  # one is all there will be
    monkeypatch.setattr(checkpoint_writer, "free_mib", lambda _: 0.9 * needed)
    with pytest.raises(UserError) as caught:
        writer_of(tmp_path).rehearse(module, optimizer, saves=1)
    assert (caught.value.code, caught.value.status) == ("R206", ExitStatus.IO)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("T8 a disk that does not give back what was written")
def test_a_disk_that_lies_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, optimizer = build()
    rename = Path.rename

    def lying(self: Path, target: Path) -> Path:
        (self / "model.safetensors").write_bytes(
            b"\0" * (self / "model.safetensors").stat().st_size
        )
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", lying)
    with pytest.raises(UserError) as caught:
        writer_of(tmp_path).rehearse(module, optimizer, saves=1)
    assert (caught.value.code, caught.value.status) == ("R210", ExitStatus.IO)
    assert not list(tmp_path.iterdir())
