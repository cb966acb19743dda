"""Run by torchrun: one of two processes meets what is not finite; both must stop before the step."""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path

import torch
from torch import Tensor

from cs336_alignment.config import ParallelConfig
from cs336_alignment.errors import UserError
from cs336_alignment.training.checkpoint_folders import find_latest
from cs336_alignment.training.parallel import Processes, start_processes
from tests.faults.test_stops import Life, same


def poison(life: Life, where: str, step: int) -> None:
    """Spoil a process's loss or gradient at a step."""

    def spoil(value: Tensor) -> Tensor:
        return value * torch.nan if life.loop.state.step == step - 1 else value

    if where == "loss":
        body = life.policy.model.transformer.ln_f
        body.register_forward_hook(lambda module, inputs, output: spoil(output))
    else:
        next(life.policy.model.parameters()).register_hook(spoil)


def check(folder: Path, where: str, step: int, processes: Processes) -> None:
    life = Life(folder / f"{where}-{step}", processes, trainer={"save_steps": 1})
    whole = Life(folder / f"{where}-{step}-whole", processes, trainer={"save_steps": 1})
    if processes.index == 1:
        poison(life, where, step)
    try:
        life.loop.fit()
        told = "nothing"
    except UserError as error:
        told = f"{error.code} {error.message}"
    for _ in range(step - 1):
        whole.loop.train_step()
    assert all(f"step {step} is not finite" in each for each in processes.gather(told)), told
    assert "R301" in told
    assert all(processes.gather(same(life.tensors(), whole.tensors())))
    latest, skipped = find_latest(folder / f"{where}-{step}")
    assert not skipped and (0 if latest is None else int(latest.name[-1])) == step - 1


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100, exit=True)  # a process that hangs says where
    group = Processes(start_processes(ParallelConfig(num_processes=2)))
    for spoiled in ("loss", "gradient"):
        for number in (1, 3):
            check(Path(sys.argv[1]), spoiled, number, group)
            if group.is_main:
                print(f"survived {spoiled} {number}", flush=True)
    group.close()
