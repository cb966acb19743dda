"""Started twice, as on two nodes: launches that differ in one thing each, and what each process is told.

Writes case → message to the file named by the first argument with this process's index appended.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from cs336_alignment.config import Config
from cs336_alignment.errors import UserError
from cs336_alignment.model.loading import load_tokenizer
from cs336_alignment.model.source import resolve_model
from cs336_alignment.training import launch_check
from cs336_alignment.training.launch_check import check_launch, meet, naming_lost_processes

Launch = SimpleNamespace  # config, folder, inputs


def make() -> Launch:
    config = Config()
    config.model.name_or_path, config.data.train_path = "builtin:arithmetic", "rows.jsonl"
    data = SimpleNamespace(train=SimpleNamespace(fingerprint="f" * 64))
    tokenizer = load_tokenizer(resolve_model("builtin:arithmetic", None, False))
    return Launch(
        config=config, folder=Path("run"), inputs=SimpleNamespace(data=data, tokenizer=tokenizer)
    )


def other_config(launch: Launch) -> None:
    launch.config.optimizer.learning_rate = 0.5


def other_cache(launch: Launch) -> None:
    launch.config.data.cache_dir = "/local"


def other_data(launch: Launch) -> None:
    launch.inputs.data.train.fingerprint = "e" * 64


def other_versions(launch: Launch) -> None:
    launch_check.versions = lambda: {"torch": "0.0.1"}


def other_folder(launch: Launch) -> None:
    launch.folder = Path("elsewhere")


def same(launch: Launch) -> None:
    pass


CASES: tuple[Callable[[Launch], None], ...] = (
    same, other_config, other_cache, other_data, other_versions, other_folder,
)  # fmt: skip


def main(path: str) -> None:
    faulthandler.dump_traceback_later(100, exit=True)  # a process that hangs says where
    torch.set_num_threads(1)
    index = int(os.environ["RANK"])
    host = f"node-{'ab'[index]}"
    socket.gethostname = lambda: host
    launch_check.SECONDS_TO_APPEAR = 0.5
    Path("run").mkdir(exist_ok=True)
    processes = meet(Config().parallel)
    told: dict[str, Any] = {}
    versions = launch_check.versions

    def check(launch: Launch) -> str:
        warnings: list[str] = []
        try:
            check_launch(
                processes, launch.config, launch.folder, launch.inputs, "auto", warnings.append
            )
        except UserError as error:
            return f"{error}\n{int(error.status)}"
        return "; ".join(warnings)

    for case in CASES:
        launch = make()
        if index:
            case(launch)
        told[case.__name__] = check(launch)
        launch_check.versions = versions
    launch = make()
    launch.config.trainer.global_batch_size = 1
    told["batch"] = check(launch)
    launch.config.trainer = dataclasses.replace(
        launch.config.trainer, global_batch_size=3, loss_normalization="microbatch"
    )
    told["uneven"] = check(launch)
    Path(f"{path}{index}").write_text(json.dumps(told))
    if index:
        os._exit(1)  # dies while the other waits for it
    told["left"] = [path.name for path in Path("run").iterdir()]
    try:
        with naming_lost_processes():
            processes.sum(torch.zeros(1))
    except UserError as error:
        told["lost"] = str(error)
    Path(f"{path}{index}").write_text(json.dumps(told))
    os._exit(0)  # the group cannot be left in order any more


if __name__ == "__main__":
    main(sys.argv[1])
