"""Run by torchrun: one step cut in every way on these processes, against the dense reference.

Writes the largest relative error of each case to the file named by the first argument.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import sys
from pathlib import Path
from typing import get_args

import torch
from transformers import PreTrainedModel

from cs336_alignment.config import LoraConfig, ParallelConfig, TrainerConfig
from cs336_alignment.evaluation.loss import evaluate_loss
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.base_model import Base
from cs336_alignment.model.lora import add_adapter, wake_adapters
from cs336_alignment.model.policy import Policy
from cs336_alignment.model.recompute import enable_checkpointing
from cs336_alignment.training.parallel import Processes, start_processes
from cs336_alignment.training.step import Cut, accumulate_gradients
from tests.conftest import build_dataset, build_model
from tests.reference import dense_loss, gradient, relative_error, stay_in_float64

STEPS = {"full": list(range(8)), "short": [8, 3, 10], "lone": [5]}


def combinations(processes: Processes) -> dict[str, float]:
    """Other heads and checkpointing, each on two processes."""
    dataset, errors = build_dataset(prefix=17), {}
    for name, checkpointing in itertools.product(
        ("llama", "nanochat", "granite", "phi"), (False, True, "selective")
    ):
        reference = build_model(name)
        dense_loss(reference, dataset, STEPS["full"], "token").backward()
        policy = Policy(build_model(name))
        if checkpointing:
            enable_checkpointing(policy.model, selective=checkpointing == "selective")
        wrapped = processes.wrap(policy.train())
        for batching in get_args(Batching):
            policy.zero_grad(set_to_none=True)
            accumulate_gradients(
                wrapped, dataset, STEPS["full"], cut=Cut(None, 2, batching),
                trainer=TrainerConfig(), processes=processes, seed=0, step=0,
            )  # fmt: skip
            case = f"{name} torch.float64 checkpointing {checkpointing} {batching}"
            errors[case] = relative_error(gradient(policy.model), gradient(reference))
    reference, adapted = adapt(build_model("llama")), adapt(build_model("llama"))
    dense_loss(reference, dataset, STEPS["full"], "token").backward()
    policy = Policy(adapted)
    wrapped = processes.wrap(policy.train())
    for batching in get_args(Batching):
        policy.zero_grad(set_to_none=True)
        accumulate_gradients(
            wrapped, dataset, STEPS["full"], cut=Cut(None, 2, batching), trainer=TrainerConfig(),
            processes=processes, seed=0, step=0,
        )  # fmt: skip
        case = f"adapters torch.float64 {batching}"
        errors[case] = relative_error(gradient(adapted), gradient(reference))
    return errors


def adapt(model: PreTrainedModel) -> PreTrainedModel:
    """Put adapters that compute something into a model."""
    add_adapter(model, LoraConfig(r=4), Base("m", None, ""), seed=0)
    wake_adapters(model)
    return model


def main(path: str) -> None:
    faulthandler.dump_traceback_later(240, exit=True)  # a process that hangs says where
    processes = Processes(start_processes(ParallelConfig(num_processes=2)))
    torch.set_num_threads(1)
    stay_in_float64()
    errors: dict[str, float] = {}
    losses: dict[str, dict[str, float]] = {}
    for name, dtype in itertools.product(
        ("llama", "qwen2", "gpt2"), (torch.float64, torch.float32)
    ):
        dataset = build_dataset(prefix=17)
        policy = Policy(build_model(name, dtype))
        wrapped = processes.wrap(policy)
        for normalization, (step, ids) in itertools.product(("token", "sequence"), STEPS.items()):
            reference = build_model(name, dtype)
            dense_loss(reference, dataset, ids, normalization).backward()
            want = gradient(reference)
            for accumulation, batching in itertools.product((1, 2, 4, 8), get_args(Batching)):
                policy.zero_grad(set_to_none=True)
                accumulate_gradients(
                    wrapped, dataset, ids, cut=Cut(None, accumulation, batching),
                    trainer=TrainerConfig(loss_normalization=normalization),
                    processes=processes, seed=0, step=0,
                )  # fmt: skip
                case = f"{name} {dtype} {normalization} {step} x{accumulation} {batching}"
                errors[case] = relative_error(gradient(policy.model), want)
        loss = evaluate_loss(
            policy, dataset, processes, microbatch_tokens=90, batching="flat_shared_prefix",
            stop_ids=range(50), groups=["a", "b"] * 5 + ["b"],
        )  # fmt: skip
        losses[f"{name} {dtype}"] = loss
    errors |= combinations(processes)
    if processes.is_main:
        Path(path).write_text(
            json.dumps({"world": processes.count, "errors": errors, "losses": losses})
        )
    processes.wait()
    processes.close()


if __name__ == "__main__":
    main(sys.argv[1])
