"""Run by torchrun: train by each row of the support matrix on these processes, beside the plain
libraries.

Writes how far they end from each other to the file named by the first argument.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path

import torch

from cs336_alignment.config import ParallelConfig
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.parallel import Processes, start_processes
from cs336_alignment.training.sharding import shard
from cs336_alignment.training.step import Cut
from tests.conftest import build_dataset, build_model
from tests.options import (
    PREFIX,
    apart,
    columns,
    config_of,
    start_of,
    support,
    train,
    train_plainly,
)
from tests.reference import stay_in_float64


def main(path: str) -> None:
    faulthandler.dump_traceback_later(240, exit=True)  # a process that hangs says where
    accelerator = start_processes(ParallelConfig(num_processes=2))
    processes = Processes(accelerator)
    sharding = Processes(accelerator, ParallelConfig("fsdp2", 2))
    torch.set_num_threads(1)
    stay_in_float64()
    dataset, start = build_dataset(prefix=PREFIX), start_of("llama", torch.float64)
    errors: dict[str, dict[str, float]] = {}
    for row in support():
        config = config_of(*row.overrides)
        want = train_plainly(build_model("llama"), dataset, config)
        errors[row.name] = {}
        for batching in columns(row.cells, ("flat", "flat_shared_prefix", "padded")):
            policy = Policy(build_model("llama"))
            wrapped = processes.wrap(policy)
            got = train(policy, wrapped, dataset, config, Cut(None, 2, batching), processes)
            errors[row.name][batching] = apart(got, want, start)
            if row.cells["fsdp2"] == "yes":
                policy = Policy(build_model("llama"))
                shard(policy, processes.device, 2, ParallelConfig("fsdp2", 2))
                cut = Cut(None, 2, batching)
                got = train(policy, policy, dataset, config, cut, sharding)
                errors[row.name][f"{batching}, sharded"] = apart(got, want, start)
    if processes.is_main:
        Path(path).write_text(json.dumps({"world": processes.count, "errors": errors}))
    processes.wait()
    processes.close()


if __name__ == "__main__":
    main(sys.argv[1])
