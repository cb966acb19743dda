"""Run by torchrun: steps with FSDP2 on these processes, against the dense reference.

Writes the largest relative errors, the losses of many steps and what was counted to the file named
by the first argument.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from cs336_alignment.config import OptimizerConfig, ParallelConfig, TrainerConfig
from cs336_alignment.evaluation.loss import evaluate_loss
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.policy import Policy
from cs336_alignment.model.recompute import enable_checkpointing
from cs336_alignment.training.checkpoint import restore, save_checkpoint
from cs336_alignment.training.manifest import count_parameters
from cs336_alignment.training.optimizer import build_optimizer, clip_gradients
from cs336_alignment.training.parallel import Processes, start_processes
from cs336_alignment.training.sharding import shard
from cs336_alignment.training.snapshot import Snapshot, TrainState
from cs336_alignment.training.step import Cut, accumulate_gradients
from tests.conftest import build_dataset, build_model
from tests.reference import dense_loss, gradient, relative_error, stay_in_float64
from tests.unit.test_lora import adapted

THOROUGH = sys.argv[2:] == ["thorough"]
STEPS = {"full": list(range(8)), "lone": [5]}
if THOROUGH:
    STEPS["short"] = [8, 3, 10]
MANY = 50
USUAL = ParallelConfig("fsdp2", 2)
CUTS = (Cut(None, 1, "flat"), Cut(None, 3, "padded"), Cut(60, None, "flat_shared_prefix"))


def build(
    name: str,
    dtype: torch.dtype,
    processes: Processes,
    *,
    config: ParallelConfig = USUAL,
    compute: torch.dtype | None = None,
    checkpointing: bool | str = False,
) -> Policy:
    policy = Policy(build_model(name, dtype), compute)
    shard(policy, processes.device, processes.count, config)
    if checkpointing:
        enable_checkpointing(policy.model, selective=checkpointing == "selective")
    return policy.train()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_gradient(model: PreTrainedModel) -> Tensor:
    return torch.cat([whole(p.grad).flatten() for p in model.parameters() if p.grad is not None])


def of(config: ParallelConfig, processes: Processes) -> Processes:
    return Processes(processes._accelerator, config)


class Gathers:
    """Counts what the root gathers; an `AllGather` of torch's."""

    def __init__(self) -> None:
        self.count = 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        self.count += 1
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed
        return gather(output_tensor, input_tensor, group=group, async_op=async_op)


def cases() -> Iterator[tuple[ParallelConfig, str, torch.dtype, bool | str]]:
    """All models in the usual layout, and the other layouts with one."""
    changes: tuple[dict[str, bool], ...] = (
        {"shard_gradients": False}, {"reshard_after_forward": False}, {"cpu_offload": True},
        {"shard_gradients": False, "reshard_after_forward": False},
    )  # fmt: skip
    for name, dtype in itertools.product(
        ("llama", "qwen2", "gpt2"), (torch.float64, torch.float32)
    ):
        llama, wide = name == "llama", dtype == torch.float64
        for checkpointing in (False, True, "selective") if llama else (wide,):
            yield USUAL, name, dtype, checkpointing
    for changed in changes:
        yield replace(USUAL, **changed), "llama", torch.float64, True  # type: ignore[arg-type]


def one_step(processes: Processes) -> dict[str, float]:
    dataset, errors, wanted = build_dataset(prefix=17), {}, {}
    for config, name, dtype, checkpointing in cases():
        own = of(config, processes)
        policy = build(name, dtype, own, config=config, checkpointing=checkpointing)
        for step, cut in itertools.product(STEPS, CUTS):
            if (name, dtype, step) not in wanted:
                reference = build_model(name, dtype)
                dense_loss(reference, dataset, STEPS[step], "sequence").backward()
                wanted[name, dtype, step] = gradient(reference)
            policy.zero_grad(set_to_none=True)
            accumulate_gradients(
                policy, dataset, STEPS[step], cut=cut, processes=own, seed=0, step=0,
                trainer=TrainerConfig(loss_normalization="sequence"), with_entropy=True,
            )  # fmt: skip
            case = f"{name} {dtype} {step} {cut} {checkpointing} {config}"
            got = whole_gradient(policy.model)
            errors[case] = relative_error(got, wanted[name, dtype, step])
    for (what, (name, dtype, make)), checkpointing in itertools.product(
        PARTS.items(), (False, True, "selective") if THOROUGH else (True,)
    ):
        reference = make(name, dtype)
        dense_loss(reference, dataset, STEPS["full"], "token").backward()
        policy = Policy(make(name, dtype))
        shard(policy, processes.device, processes.count, USUAL)
        if checkpointing:
            enable_checkpointing(policy.model, selective=checkpointing == "selective")
        policy.train()
        for cut in CUTS:
            policy.zero_grad(set_to_none=True)
            accumulate_gradients(
                policy, dataset, STEPS["full"], cut=cut, processes=processes, seed=0, step=0,
                trainer=TrainerConfig(),
            )  # fmt: skip
            error = relative_error(whole_gradient(policy.model), gradient(reference))
            errors[f"{name} {dtype} {what} {cut} {checkpointing}"] = error
    return errors


def frozen(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """Two matrices alone are trained: no input of a layer then needs a gradient."""
    model = build_model(name, dtype)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in key)
    return model


def with_head(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """Adapters, and a tied head that is trained whole."""
    return adapted(name, dtype, modules_to_save=["lm_head"])


# Of what a part is trained alone.
PARTS: dict[str, tuple[str, torch.dtype, Callable[[str, torch.dtype], PreTrainedModel]]] = {
    "frozen": ("llama", torch.float64, frozen),
    "adapters": ("llama", torch.float64, adapted),
    "adapters narrow": ("llama", torch.float32, adapted),
    "adapters untied": ("qwen2", torch.float64, adapted),
    "adapters of another layer": ("gpt2", torch.float64, adapted),
    "adapters and head": ("llama", torch.float64, with_head),
}


def many_steps(policy: Policy, processes: Processes) -> list[tuple[float, float]]:
    """Train; gives the loss and gradient norm of each step."""
    dataset = build_dataset(prefix=17)
    optimizer = build_optimizer(policy, OptimizerConfig(learning_rate=1e-3, weight_decay=0.1))
    found = []
    for step in range(MANY):
        optimizer.zero_grad(set_to_none=True)
        ids = [(3 * step + i) % 11 for i in range(5)]
        result = accumulate_gradients(
            policy, dataset, ids, cut=Cut(50, None, "flat"), trainer=TrainerConfig(),
            processes=processes, seed=0, step=step,
        )  # fmt: skip
        norm = clip_gradients(policy, 1.0)
        optimizer.step()
        found.append((float(processes.sum(result.nll)), float(norm)))
    return found


def checkpoints(processes: Processes) -> dict[str, Any]:
    """Write what is sharded, read it into another model, and with torch's own reader."""
    policy = build("llama", torch.float32, processes)
    optimizer = build_optimizer(policy.model, OptimizerConfig())
    accumulate_gradients(
        policy, build_dataset(), [1, 2, 3], cut=Cut(None, 1, "flat"), trainer=TrainerConfig(),
        processes=processes, seed=0, step=0,
    )  # fmt: skip
    optimizer.step()
    team = processes.team()
    folder = Path(processes.agree(tempfile.mkdtemp()))
    snapshot = Snapshot.of(TrainState(1), policy.model, optimizer, processes.index)
    saved = save_checkpoint(
        folder, snapshot, extra={}, save_sidecars=lambda _: None, keep=1, team=team
    )
    other = build("llama", torch.float32, processes)
    moments = build_optimizer(other.model, OptimizerConfig())
    restore(saved, other.model, moments)
    same = all(
        torch.equal(whole(a), whole(b))
        for a, b in zip(policy.parameters(), other.parameters(), strict=True)
    )
    states = zip(optimizer.state.values(), moments.state.values(), strict=True)
    same &= all(torch.equal(whole(a[k]), whole(b[k])) for a, b in states for k in a)
    want = {name: whole(p.detach()) for name, p in policy.model.named_parameters()}
    got = {name: torch.zeros_like(tensor) for name, tensor in want.items()}
    dcp.load(got, storage_reader=HuggingFaceStorageReader(str(saved / "sharded")))
    return {
        "same": same, "read by torch": all(torch.equal(got[name], want[name]) for name in want),
        "files": sorted(path.name for path in (saved / "sharded").iterdir()),
    }  # fmt: skip


def main(path: str) -> None:
    faulthandler.dump_traceback_later(240, exit=True)  # a process that hangs says where
    processes = Processes(start_processes(USUAL), USUAL)
    torch.set_num_threads(1)
    narrow = build("qwen2", torch.float32, processes, compute=torch.bfloat16)
    root: Any = narrow
    gathers = Gathers()
    root.set_custom_all_gather(gathers)
    accumulate_gradients(
        narrow, build_dataset(), range(8), cut=Cut(None, 3, "flat"), trainer=TrainerConfig(),
        processes=processes, seed=0, step=0,
    )  # fmt: skip
    report: dict[str, Any] = {"world": processes.count, "gathers": gathers.count}
    report["checkpoints"] = checkpoints(processes)
    wide = build_model("qwen2", torch.float32)
    dense_loss(wide, build_dataset(), range(8), "token").backward()
    report["narrow"] = relative_error(whole_gradient(narrow.model), gradient(wide))
    policy_of_part = Policy(adapted("qwen2", torch.float32), torch.bfloat16)
    shard(policy_of_part, processes.device, processes.count, USUAL)
    wide = adapted("qwen2", torch.float32)
    dense_loss(wide, build_dataset(), range(8), "token").backward()
    accumulate_gradients(
        policy_of_part.train(), build_dataset(), range(8), cut=Cut(None, 3, "flat"),
        processes=processes, trainer=TrainerConfig(), seed=0, step=0,
    )  # fmt: skip
    got = whole_gradient(policy_of_part.model)
    report["narrow adapters"] = relative_error(got, gradient(wide))
    report["dtypes"] = sorted({str(whole(p.grad).dtype) for p in narrow.parameters()})
    stay_in_float64()
    report["errors"] = one_step(processes)
    report["steps"], report["adapter steps"], report["losses"] = {}, {}, {}
    for dtype, checkpointing in (
        (torch.float64, THOROUGH), (torch.float32, False)
    ):  # fmt: skip
        policy = build("llama", dtype, processes, checkpointing=checkpointing)
        report["steps"][f"{dtype} {checkpointing}"] = many_steps(policy, processes)
        if THOROUGH or dtype == torch.float32:
            policy_of_part = Policy(adapted("llama", dtype))
            shard(policy_of_part, processes.device, processes.count, USUAL)
            if checkpointing:
                enable_checkpointing(policy_of_part.model)
            report["adapter steps"][f"{dtype} {checkpointing}"] = many_steps(
                policy_of_part.train(), processes
            )
        report["local"] = count_parameters(policy.model)
        case = {
            batching: evaluate_loss(
                policy, build_dataset(prefix=17), processes, microbatch_tokens=70,
                batching=batching, stop_ids=range(50), groups=["a", "b"] * 5 + ["b"],
            )
            for batching in get_args(Batching)
        }  # fmt: skip
        report["losses"][f"{dtype} {checkpointing}"] = case
    assert all(isinstance(p, DTensor) for p in policy.parameters())
    assert isinstance(policy, FSDPModule)
    if processes.is_main:
        Path(path).write_text(json.dumps(report))
    processes.wait()
    processes.close()


if __name__ == "__main__":
    main(sys.argv[1])
