"""What a run says of itself: the arithmetic at the start, before and after at the end."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cs336_alignment.config import Config
from cs336_alignment.data.batching import StepPlan
from cs336_alignment.data.ledger import LedgerEntry
from cs336_alignment.data.splits import PreparedData
from cs336_alignment.errors import ExitStatus
from cs336_alignment.metric_names import greater_is_better
from cs336_alignment.model.policy import Policy
from cs336_alignment.tracking.console import Console
from cs336_alignment.tracking.metrics import read_metrics
from cs336_alignment.tracking.report import REPORT
from cs336_alignment.tracking.run_clock import EVALUATION_SECONDS, EVALUATION_SHARE
from cs336_alignment.tracking.tracker import show_examples
from cs336_alignment.training.batching_choice import BatchingChoice, dropout_options
from cs336_alignment.training.checkpoint import TrainState
from cs336_alignment.training.export import model_card
from cs336_alignment.training.parallel import launched_processes
from cs336_alignment.training.preflight import describe_batches, doubt_about
from cs336_alignment.training.run_folder import EXPORT, MANIFEST, METRICS
from cs336_alignment.training.schedule import warmup_length
from cs336_alignment.training.step import Cut

EXAMPLES_SHOWN = 3
COMPARED = ("eval/loss", "eval/format_reward", "eval/answer_reward", "eval/stop_rate")
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
    compute += doubt_about(policy.compute_dtype, parameter.device)
    threads = torch.get_num_threads()
    count = sum(p.numel() for p in policy.parameters())
    optimizer, trainer = config.optimizer, config.trainer
    drawn = f"; weights drawn from seed {config.seed}" if config.model.random_init else ""
    lines = [
        ("run", str(Path(config.output_root) / (config.run_name or ""))),
        ("model", f"{config.model.name_or_path}, {count:,} parameters, all trained{drawn}"),
        ("precision", f"weights {dtype}, compute {compute}, optimizer state {dtype}"),
        ("processes", f"{num_processes} on {parameter.device.type}, {threads} thread(s) each"),
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
    eight = " in 8 bits" if optimizer.state_bits == 8 else ""
    lines.append(
        (
            "optimizer",
            f"AdamW{eight}, peak {optimizer.learning_rate:g}, {optimizer.lr_scheduler_type} with "
            f"{warmup_length(optimizer, total_steps)} warmup steps, "
            f"weight decay {optimizer.weight_decay:g}",
        )
    )
    if policy.head is None:
        lines.append(
            ("LM head", "the model's own, since it is not just a linear layer: whole logits")
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


def before_and_after(
    folder: Path, step: int, chosen_by: str | None
) -> list[tuple[str, float, float]]:
    """Compare the first evaluation of a run with that of the exported step, metric by metric; only
    those count that asked the questions of now. The metric that chose the step is among them.
    """
    since = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["evaluation_since_step"]
    rows = [row for row in read_metrics(folder / METRICS) if since <= row["step"] <= step]
    results = []
    for name in dict.fromkeys((*COMPARED, *filter(None, [chosen_by]))):
        found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if len(found) > 1 and found[-1][0] == step:
            results.append((name, found[0][1], found[-1][1]))
    return results


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
        launcher = f"{python} -m torch.distributed.run --standalone --nproc_per_node {local}"
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


def write_card(
    config: Config, state: TrainState, best: str | None, folder: Path, template: str
) -> str:
    """Write the model card of a run that has come to its end.

    Args:
        config: of the run.
        state: of the exported step.
        best: why this step, if it was chosen.
        folder: of the run.
        template: the text of its prompt template.
    """
    optimizer = config.optimizer
    facts = {
        "learning rate": f"{optimizer.learning_rate:g}, {optimizer.lr_scheduler_type}",
        "examples a step": str(config.trainer.global_batch_size),
        "steps": str(state.step) if best is None else f"{state.step} ({best})",
        "trained tokens": f"{state.response_tokens_seen:,}",
        "seed": str(config.seed),
    }
    return model_card(
        base_model=config.model.name_or_path,
        run_name=config.run_name or "",
        data=config.data.train_path,
        facts=facts,
        results=before_and_after(folder, state.step, config.trainer.metric_for_best_model),
        prompt_template=template,
    )


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
    if results := before_and_after(folder, exported, chosen_by):
        cells = [
            [name, show_metric(name, before), show_metric(name, after)]
            for name, before, after in results
        ]
        title = "Held-out data" if exported == step else f"Held-out data, exported step {exported}"
        console.table(title, ["metric", "before", "after"], cells)
    if (line := evaluation_line(folder)) is not None:
        console.note(line)
    console.note(f"model    {folder / EXPORT}  (loads with transformers' from_pretrained)")
    console.note(f"report   {folder / REPORT}  (opens offline)")
    console.note(f"metrics  {folder / METRICS}, picture {folder / 'loss.png'}")
    if generations:
        console.note(f"texts    {folder / 'generations'}")
