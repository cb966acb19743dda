"""What a run says of itself: the arithmetic at the start, before and after at the end."""

from __future__ import annotations

from pathlib import Path

import torch

from cs336_alignment.config import Config
from cs336_alignment.data.batching import StepPlan
from cs336_alignment.data.prepare import PreparedData
from cs336_alignment.model.policy import Policy
from cs336_alignment.tracking.metrics import read_metrics
from cs336_alignment.training.preflight import Batching, describe_batches, dropout_options
from cs336_alignment.training.schedule import warmup_length
from cs336_alignment.training.step import Cut

COMPARED = ("eval/loss", "eval/format_reward", "eval/answer_reward", "eval/stop_rate")
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}


def describe_run(
    config: Config,
    policy: Policy,
    train: PreparedData,
    held_out: PreparedData | None,
    batching: Batching,
    plan: StepPlan,
    cut: Cut,
    *,
    num_processes: int,
    threads: int,
    total_steps: int,
) -> list[str]:
    """Write down what is about to be trained and how, a line for each thing that could surprise."""
    parameter = next(policy.parameters())
    dtype = DTYPE_NAMES.get(parameter.dtype, str(parameter.dtype))
    compute = DTYPE_NAMES.get(policy.autocast_dtype or parameter.dtype, "?")
    count = sum(p.numel() for p in policy.parameters())
    optimizer, trainer = config.optimizer, config.trainer
    lines = [
        ("run", str(Path(config.output_root) / (config.run_name or ""))),
        ("model", f"{config.model.name_or_path}, {count:,} parameters, all trained"),
        ("precision", f"weights {dtype}, compute {compute}, optimizer state {dtype}"),
        ("processes", f"{num_processes} on {parameter.device.type}, {threads} thread(s) each"),
        ("data", ledger_line(train)),
    ]
    if held_out is not None:
        lines.append(("held out", ledger_line(held_out)))
    arithmetic = describe_batches(plan, cut, train.dataset.lengths, num_processes, total_steps)
    lines += [("" if index else "batches", text) for index, text in enumerate(arithmetic)]
    lines.append(("rows", batching.reason))
    lines.append(("loss", _loss_line(trainer.loss_normalization, trainer.normalize_constant)))
    lines.append(
        (
            "optimizer",
            f"AdamW, peak {optimizer.learning_rate:g}, {optimizer.lr_scheduler_type} with "
            f"{warmup_length(optimizer, total_steps)} warmup steps, "
            f"weight decay {optimizer.weight_decay:g}",
        )
    )
    if policy.head is None:
        lines.append(
            ("LM head", "the model's own, since it is no plain linear layer: whole logits")
        )
    if names := dropout_options(policy):
        text = f"{', '.join(names)}: runs repeat, but the result depends on the cut of a step"
        lines.append(("dropout", text))
    return [f"{name:<10} {text}" for name, text in lines]


def _loss_line(normalization: str, constant: float) -> str:
    return {
        "token": "mean over the step's response tokens, whatever the cut",
        "sequence": "mean over the step's examples of each one's token mean, whatever the cut",
        "constant": f"each example's sum / {constant:g}, mean over the step's examples",
        "microbatch": "mean of each microbatch's token mean: it depends on the cut",
    }[normalization] + f" ({normalization})"


def ledger_line(part: PreparedData) -> str:
    """Say in one line what became of a source's rows."""
    ledger = part.ledger
    pieces = [
        f"{ledger.kept:,} of {ledger.rows_read:,} rows of {ledger.source}: "
        f"{ledger.tokens:,} tokens, {ledger.response_tokens:,} trained; longest {ledger.longest:,}"
    ]
    if ledger.rows_beyond_limit:
        pieces.append(f"{ledger.rows_beyond_limit:,} rows beyond the limit of examples")
    pieces += [f"{count:,} dropped ({reason})" for reason, count in ledger.dropped.items()]
    if ledger.truncated:
        pieces.append(f"{ledger.truncated:,} truncated")
    return "; ".join(pieces)


def before_and_after(metrics: Path) -> list[tuple[str, float, float]]:
    """Compare the first and last evaluation of a run, metric by metric."""
    rows = read_metrics(metrics)
    results = []
    for name in COMPARED:
        values = [row[name] for row in rows if row.get(name) is not None]
        if len(values) > 1:
            results.append((name, values[0], values[-1]))
    return results


def show_metric(name: str, value: float) -> str:
    """Write an evaluation metric as people read it: losses as numbers, shares in percent."""
    return f"{value:.4f}" if name == "eval/loss" else f"{100 * value:.1f} %"
