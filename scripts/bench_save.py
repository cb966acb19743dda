"""What a checkpoint every ten steps costs: none, at once, and behind the training, in turns.

    python scripts/bench_save.py MODEL train.jsonl [ROUNDS]

MODEL is a model folder or hub id, the file holds GSM8K rows; steps of 8 of them, on this machine's
device. Every block takes the same ten steps; prints tokens a second (medians of the blocks) and
their ratio to a block without a checkpoint.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.progress import track

from cs336_alignment.config import DataConfig, OptimizerConfig, ParallelConfig, TrainerConfig
from cs336_alignment.data.batching import StepPlan
from cs336_alignment.data.splits import prepare_run
from cs336_alignment.model.loading import load_model, load_tokenizer, resolve_model
from cs336_alignment.model.policy import Policy
from cs336_alignment.tracking.console import Console
from cs336_alignment.tracking.metrics import MetricsFile
from cs336_alignment.tracking.tracker import RunTracker
from cs336_alignment.tracking.wandb_logger import NullLogger
from cs336_alignment.training.batching_choice import choose_batching
from cs336_alignment.training.best import Verdict
from cs336_alignment.training.checkpoint import TrainState
from cs336_alignment.training.checkpoint_writer import CheckpointWriter
from cs336_alignment.training.export import save_sidecars
from cs336_alignment.training.optimizer import allocate_state, build_optimizer
from cs336_alignment.training.parallel import Processes, set_threads, start_processes
from cs336_alignment.training.preflight import choose_cut, choose_precision
from cs336_alignment.training.trainer import Trainer

STEPS = 10
ARMS = {"no checkpoint": None, "async_save=true": True, "async_save=false": False}


def main(model_path: str, data_path: str, rounds: int, folder: Path) -> None:
    processes = Processes(start_processes(ParallelConfig()))
    source = resolve_model(model_path, None, False)
    tokenizer = load_tokenizer(source)
    data = prepare_run(DataConfig(data_path), tokenizer, seed=0).train.dataset
    model = load_model(source, random_init=False, seed=0)
    set_threads(1, model.num_parameters())
    config = TrainerConfig(global_batch_size=8, save_steps=0, loss_spike="off")
    policy = Policy(model, choose_precision("auto", processes.device)).to(processes.device)
    batching = choose_batching(policy, "auto", int(data.lengths.max())).batching
    optimizer_config = OptimizerConfig()
    optimizer = build_optimizer(model, optimizer_config)
    allocate_state(optimizer)
    tracker = RunTracker(
        Console(enabled=False), MetricsFile(folder / "metrics.jsonl"), NullLogger(), folder
    )

    def trainer_of(name: str) -> Trainer:
        writer = CheckpointWriter(
            folder / name, extra={}, keep=2, asynchronous=bool(ARMS[name]),
            save_sidecars=lambda path: save_sidecars(path, model, tokenizer),
        )  # fmt: skip
        return Trainer(
            policy, processes.wrap(policy), optimizer, data,
            plan=StepPlan(len(data), config.global_batch_size, seed=0),
            cut=choose_cut(config, batching), total_steps=STEPS, state=TrainState(),
            trainer=config, optimizer_config=optimizer_config, seed=0, processes=processes,
            tracker=tracker, evaluate=lambda step: Verdict(), writer=writer, poll=lambda: None,
        )  # fmt: skip

    policy.train()
    trainers = {name: trainer_of(name) for name in ARMS}
    speeds: dict[str, list[float]] = {name: [] for name in ARMS}
    blocks = [name for _ in range(rounds) for name in ARMS]
    trainers["no checkpoint"].train_step()  # the first one is slower
    for number, name in enumerate(track(blocks, "training")):
        trainer, begin = trainers[name], time.perf_counter()
        trainer.state = TrainState(number * STEPS)  # a name for each checkpoint
        if ARMS[name] is not None:
            trainer.save()
        trainer.state, tokens = TrainState(), 0
        for _ in range(STEPS):
            tokens += int(trainer.train_step()[0]["train/num_tokens"])
        trainer.settle()
        speeds[name].append(tokens / (time.perf_counter() - begin))
    base = statistics.median(speeds["no checkpoint"])
    for name, found in speeds.items():
        speed = statistics.median(found)
        every = ", ".join(f"{each:,.0f}" for each in found)
        print(f"{name:18} {speed:8,.0f} tokens/s  {speed / base:.3f}  (blocks: {every})")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        main(sys.argv[1], sys.argv[2], int((sys.argv[3:] or ["3"])[0]), Path(temporary))
