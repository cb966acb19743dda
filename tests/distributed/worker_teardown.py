"""Run by torchrun: join the process group, train a step and leave the group, again and again.

A group that dies inside DDP's reducer can wait for ever: gloo's thread frees its tensors under the
interpreter's lock, which the destructor holds. Long turns with that lock make this likely: without
the two lines for it in `Processes.close`, three of three runs stood still.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from cs336_alignment.config import ParallelConfig
from cs336_alignment.training.parallel import Processes, start_processes

ROUNDS = 30


def join_train_and_leave(store: dist.Store) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    processes = Processes(start_processes(ParallelConfig(num_processes=2)))
    for _ in range(6):
        wrapped = processes.wrap(torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(4)]))
        for _ in range(2):
            wrapped(torch.randn(4, 16)).sum().backward()
    processes.sum(torch.zeros(1))
    processes.wait()
    processes.close()
    AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100, exit=True)  # a process that hangs says where
    sys.setswitchinterval(20)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rounds = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
    for number in range(ROUNDS):
        join_train_and_leave(dist.PrefixStore(f"round {number}", rounds))
