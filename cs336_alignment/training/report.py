"""What a run says of itself: the arithmetic at the start, before and after at the end."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cs336_alignment.config import Config, OptimizerConfig, TrainerConfig
from cs336_alignment.data.batching import StepPlan
from cs336_alignment.data.ledger import LedgerEntry
from cs336_alignment.data.splits import PreparedData
from cs336_alignment.errors import ExitStatus
from cs336_alignment.metric_names import greater_is_better
from cs336_alignment.model.adapter_files import is_adapter
from cs336_alignment.model.adapters import describe_adapter, is_adapted
from cs336_alignment.model.narrow import narrowed_to
from cs336_alignment.model.policy import Policy
from cs336_alignment.sharing.card import before_and_after
from cs336_alignment.tracking.console import Console
from cs336_alignment.tracking.metrics import read_metrics
from cs336_alignment.tracking.report import REPORT
from cs336_alignment.tracking.run_clock import EVALUATION_SECONDS, EVALUATION_SHARE
from cs336_alignment.tracking.run_record import read_run
from cs336_alignment.tracking.tracker import show_examples
from cs336_alignment.training.batching_choice import BatchingChoice, dropout_options
from cs336_alignment.training.parallel import launched_processes
from cs336_alignment.training.preflight import describe_batches, doubt_about
from cs336_alignment.training.run_folder import ADAPTER, EXPORT, METRICS
from cs336_alignment.training.schedule import warmup_length
from cs336_alignment.training.step import Cut

EXAMPLES_SHOWN = 3
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}


def describe_run(
    config: Config,
    policy: Policy,
    train: PreparedData,
    held_out: PreparedData | None,
    choice: BatchingChoice,
    plan: StepPlan,
    cut: Cut,
    *,
    num_processes: int,
    total_steps: int,
) -> list[str]:
    """Write down what is about to be trained and how, a line for each thing that could surprise."""
    parameter = next(policy.parameters())
    dtype = DTYPE_NAMES.get(parameter.dtype, str(parameter.dtype))
    compute = DTYPE_NAMES.get(policy.compute_dtype or parameter.dtype, "?")
    compute += doubt_about(policy.compute_dtype, policy.device)
    threads = torch.get_num_threads()
    count = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    some = f"{trained:,} of them trained ({trained / count:.2%})"
    share = "all trained" if trained == count else some
    narrow = narrowed_to(policy.model)
    frozen = "" if narrow is None else f" (frozen linear layers {DTYPE_NAMES[narrow]})"
    optimizer, trainer = config.optimizer, config.trainer
    drawn = f"; weights drawn from seed {config.seed}" if config.model.random_init else ""
    if is_adapter(config.model.name_or_path):
        drawn += "; the adapter is merged into its base (lora.adapter_path=… goes on with it)"
    lines = [
        ("run", str(Path(config.output_root) / (config.run_name or ""))),
        ("model", f"{config.model.name_or_path}, {count:,} parameters, {share}{drawn}"),
        *([("adapters", describe_adapter(policy.model))] if is_adapted(policy.model) else []),
        ("precision", f"weights {dtype}{frozen}, compute {compute}, optimizer state {dtype}"),
        ("processes", f"{num_processes} on {policy.device.type}, {threads} thread(s) each"),
        *(("data", ledger_line(ledger)) for ledger in train.ledgers),
    ]
    if train.mixture is not None:
        draws = " + ".join(f"{n:,}" for n in train.mixture.draws)
        lines.append(("mixture", f"{draws} examples an epoch ({train.mixture.stop})"))
    if held_out is not None and config.data.eval_path is not None:
        lines += [("held out", ledger_line(ledger)) for ledger in held_out.ledgers]
    elif held_out is not None:
        lines.append(
            ("held out", f"{len(held_out.dataset):,} of them, {len(train.dataset):,} are trained")
        )
    arithmetic = describe_batches(plan, cut, train.dataset, num_processes, total_steps)
    lines += [("" if index else "batches", text) for index, text in enumerate(arithmetic)]
    lines.append(("rows", choice.reason))
    lines.append(("loss", _loss_line(trainer.loss_normalization, trainer.normalize_constant)))
    if text := describe_objective(trainer):
        lines.append(("objective", f"{text}; train/loss is the plain token mean all the same"))
    text = (
        f"{describe_optimizer(optimizer)}, peak {optimizer.learning_rate:g}, "
        f"{optimizer.lr_scheduler_type} with {warmup_length(optimizer, total_steps)} warmup "
        f"steps, weight decay {optimizer.weight_decay:g}"
    )
    lines.append(("optimizer", text))
    if text := describe_average(trainer, optimizer):
        size = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
        when = "" if trainer.ema_decay is not None else " while it is shown"
        lines += [
            ("average", f"{text}: {size / 2**30:.2f} GiB of memory more{when}"),
            ("", "it is evaluated, exported, and in checkpoints' model.safetensors"),
        ]
    if policy.head is None:
        lines.append(
            ("LM head", "the model's own, since it is not just a linear layer: whole logits")
        )
    kernel = policy.model.config._experts_implementation
    if policy.autocast_dtype is not None and kernel == "grouped_mm":  # autocast does not know it
        text = f"compute in {dtype}, as they are held; with parallel=fsdp2 in bf16"
        lines.append(("experts", text))
    if names := dropout_options(policy):
        text = f"{', '.join(names)}: runs repeat, but the result depends on the cut of a step"
        lines.append(("dropout", text))
    return [f"{name:<10} {text}" for name, text in lines]


def describe_optimizer(optimizer: OptimizerConfig) -> str:
    """Name the optimizer, and what of it could surprise."""
    text = {
        "adamw": "AdamW in 8 bits" if optimizer.state_bits == 8 else "AdamW",
        "adafactor": "Adafactor (rates are relative to the RMS of each tensor)",
        "muon": f"Muon for hidden matrices (momentum {optimizer.muon_momentum:g}, steps as large "
        "as AdamW's), AdamW for the rest",
        "schedule_free": "schedule-free AdamW",
    }[optimizer.name]
    if optimizer.layer_lr_decay != 1.0:
        text += f", rates × {optimizer.layer_lr_decay:g} for each layer further down"
    return text


def describe_objective(trainer: TrainerConfig) -> str:
    """Say what is trained besides or instead of the negative log-probs; empty: nothing is."""
    options = [
        ("dft: each token's loss × its probability", trainer.loss == "dft"),
        (f"label smoothing {trainer.label_smoothing:g}", trainer.label_smoothing),
        (f"z-loss {trainer.z_loss:g}", trainer.z_loss),
        (f"noise {trainer.neftune_alpha or 0:g} on embeddings (NEFTune)", trainer.neftune_alpha),
    ]
    return ", ".join(text for text, chosen in options if chosen)


def describe_average(trainer: TrainerConfig, optimizer: OptimizerConfig) -> str:
    """Say which average of the weights the run ends with; empty: it is none."""
    if optimizer.name == "schedule_free":
        return "that of the schedule-free optimizer"
    decay = trainer.ema_decay
    return "" if decay is None else f"an exponential moving average of the weights, decay {decay:g}"


def _loss_line(normalization: str, constant: float) -> str:
    return {
        "token": "mean over the step's response tokens, whatever the cut",
        "sequence": "mean over the step's examples of each one's token mean, whatever the cut",
        "constant": f"each example's sum / {constant:g}, mean over the step's examples",
        "microbatch": "mean of each microbatch's token mean: it depends on the cut",
    }[normalization] + f" ({normalization})"


def ledger_line(ledger: LedgerEntry) -> str:
    """Say in one line what became of a source's rows."""
    pieces = [
        f"{ledger.kept:,} examples of {ledger.rows_read:,} rows of {ledger.source}: "
        f"{ledger.tokens:,} tokens, {ledger.response_tokens:,} trained; longest {ledger.longest:,}"
    ]
    pieces += [f"{count:,} dropped ({reason})" for reason, count in ledger.dropped.items()]
    pieces += [f"{count:,} filtered ({reason})" for reason, count in ledger.filtered.items()]
    if ledger.truncated:
        pieces.append(f"{ledger.truncated:,} truncated")
    if ledger.split:
        pieces.append(f"{ledger.split:,} split into {ledger.pieces:,}")
    return "; ".join(pieces)


def show_metric(name: str, value: float) -> str:
    """Write an evaluation metric as people read it: losses as numbers, shares in percent."""
    return f"{100 * value:.1f} %" if greater_is_better(name) else f"{value:.4f}"


def resume_command(arguments: Sequence[str], verb: str = "train") -> str:
    """Write the command that continues a run, under the launcher that started this process.

    Args:
        arguments: as typed after the verb.
        verb: the command.
    """
    # `never` refuses a folder that holds a run, and what the launcher said is not in the words.
    kept = [word for word in arguments if word != "trainer.resume=never"]
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no" and not any(word.startswith("trainer.precision=") for word in kept):
        kept.append(f"trainer.precision={launched}")
    words, count = shlex.join(kept), launched_processes()
    local = os.environ.get("LOCAL_WORLD_SIZE", str(count))
    python = shlex.quote(sys.executable)
    if count > 1:
        where, nodes = "--standalone", count // int(local)
        if nodes > 1:  # to be typed on each
            first = os.environ.get("MASTER_ADDR")
            where = f"--nnodes {nodes} --rdzv_backend c10d --rdzv_endpoint {first}:29500"
        launcher = f"{python} -m torch.distributed.run {where} --nproc_per_node {local}"
        return f"{launcher} -m cs336_alignment.cli {verb} {words}"
    on_path = shutil.which("cs336-sft")
    here = on_path is not None and Path(on_path).parent == Path(sys.executable).parent
    return f"{'cs336-sft' if here else f'{python} -m cs336_alignment.cli'} {verb} {words}"


def evaluation_line(folder: Path) -> str | None:
    """Say how much of the run's time its evaluations took; None if there were none."""
    rows = [row for row in read_metrics(folder / METRICS) if row.get(EVALUATION_SHARE) is not None]
    if not rows:
        return None
    seconds = math.fsum(row[EVALUATION_SECONDS] for row in rows if row.get(EVALUATION_SECONDS))
    return f"evaluation took {seconds:.1f} s, {rows[-1][EVALUATION_SHARE]:.1%} of the run"


def say_goodbye(
    console: Console,
    folder: Path,
    outcome: ExitStatus,
    *,
    step: int,
    exported: int,
    chosen_by: str | None,
    generations: Sequence[Mapping[str, Any]],
    command: str,
) -> None:
    """Print how a run ended and where everything is; silent off the main process.

    Args:
        console: of this process.
        folder: of the run.
        outcome: DONE, or the status of the request that stopped it.
        step: the last one done.
        exported: the one whose weights are in `model/`.
        chosen_by: the metric that is best there; None: it is the last one.
        generations: of the last evaluation.
        command: what continues the run.
    """
    if not console.enabled:
        return
    if outcome != ExitStatus.DONE:
        saved = "checkpoint written" if step else "there was nothing to save"
        console.note(f"stopped on request after step {step}; {saved}")
        console.note(f"report   {folder / REPORT}  (opens offline)")
        console.note(f"to continue: {command}")
        return
    if generations:
        console.note(f"\nThe first {EXAMPLES_SHOWN} generations after training:\n")
        show_examples(console, generations, EXAMPLES_SHOWN)
    if results := before_and_after(read_run(folder), exported, chosen_by):
        cells = [
            [name, show_metric(name, before), show_metric(name, after)]
            for name, before, after in results
        ]
        title = "Held-out data" if exported == step else f"Held-out data, exported step {exported}"
        console.table(title, ["metric", "before", "after"], cells)
    if (line := evaluation_line(folder)) is not None:
        console.note(line)
    if (folder / EXPORT).is_dir():
        console.note(f"model    {folder / EXPORT}  (loads with transformers' from_pretrained)")
    if (folder / ADAPTER).is_dir():
        console.note(f"adapter  {folder / ADAPTER}  (loads with peft's from_pretrained)")
    console.note(f"report   {folder / REPORT}  (opens offline)")
    console.note(f"metrics  {folder / METRICS}, picture {folder / 'loss.png'}")
    if generations:
        console.note(f"texts    {folder / 'generations'}")
