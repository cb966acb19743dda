"""`cs336-sft evaluate`: loss, generations and rewards of any model folder, checkpoint or hub id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cs336_alignment.config import DEFAULT_MICROBATCH_TOKENS, Config
from cs336_alignment.cores import keep_freed_memory
from cs336_alignment.data.splits import prepare_evaluation
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.evaluation.evaluator import Evaluator
from cs336_alignment.files import write_json
from cs336_alignment.model.loading import check_fits, load_model, load_tokenizer, resolve_model
from cs336_alignment.model.policy import Policy
from cs336_alignment.tracking.console import Console
from cs336_alignment.tracking.tracker import show_examples, write_generations
from cs336_alignment.training.batching_choice import choose_batching
from cs336_alignment.training.parallel import (
    Processes,
    refuse_launcher_options,
    set_threads,
    start_processes,
)
from cs336_alignment.training.preflight import choose_precision

EXAMPLES_SHOWN = 3
RESULT = "evaluation.json"


def evaluate(config: Config) -> ExitStatus:
    """Evaluate `model` on `data.eval_path`, into `<output_root>/<run_name>/evaluation.json`.

    Raises:
        UserError: no evaluation data (78), and as everywhere.
    """
    if config.data.eval_path is None:
        raise UserError(
            "C111",
            "data.eval_path is not given",
            ExitStatus.BAD_CONFIG,
            hint="add data.eval_path=test.jsonl",
        )
    precision = refuse_launcher_options(config.trainer.precision)
    folder = Path(config.output_root).expanduser() / (config.run_name or "")
    subject = {
        "model": config.model.name_or_path,
        "revision": config.model.revision,
        "data": config.data.eval_path,
    }
    _refuse_another(folder / RESULT, subject)
    processes = Processes(start_processes(config.parallel))
    console = Console(enabled=processes.is_main)
    try:
        evaluator = _build(config, precision, processes, console)
        result = evaluator.run(generate=True)
        if processes.is_main:
            report = {**subject, "options": asdict(config.evaluation), **result.metrics}
            _write(folder, report, result.rows)
            show_examples(console, result.rows, EXAMPLES_SHOWN)
            rows = [[name, f"{value:.4f}"] for name, value in sorted(result.metrics.items())]
            console.table(config.model.name_or_path, ["metric", "value"], rows)
            console.note(f"results  {folder}")
    finally:
        processes.close()
    return ExitStatus.DONE


def _refuse_another(path: Path, subject: dict[str, str | None]) -> None:
    """Refuse to write over the evaluation of another model or other data.

    Raises:
        UserError: there is one (73).
    """
    try:
        old = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return
    if any(old.get(key) != value for key, value in subject.items()):
        raise UserError(
            "R104",
            f"{path} holds the evaluation of another model or other data",
            ExitStatus.CANNOT_CREATE,
            expected=f"{subject['model']} on {subject['data']}",
            got=f"{old.get('model')} on {old.get('data')}",
            hint="choose another run_name=…",
        )


def _write(folder: Path, report: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RESULT, report)
        if rows:
            write_generations(folder / "generations.jsonl", rows)
    except OSError as failure:
        raise UserError(
            "R101",
            f"cannot write to {folder}: {failure.strerror or failure}",
            ExitStatus.CANNOT_CREATE,
            hint="choose another output_root=… or run_name=…",
        ) from failure


def _build(config: Config, precision: str, processes: Processes, console: Console) -> Evaluator:
    options = config.model
    source = resolve_model(options.name_or_path, options.revision, options.trust_remote_code)
    tokenizer = load_tokenizer(source)
    data, warnings = prepare_evaluation(
        config.data, tokenizer, seed=config.seed, progress=console.progress, note=console.note
    )
    for line in warnings:
        console.warn(line)
    if processes.device.type == "cpu":
        keep_freed_memory()
    console.note(f"loading {options.name_or_path}")
    if options.random_init:
        console.warn(f"its weights are drawn from seed {config.seed} (model.random_init=true)")
    model = load_model(source, random_init=options.random_init, seed=config.seed)
    set_threads(processes.local_count, model.num_parameters())
    longest = int(data.dataset.lengths.max())
    check_fits(model, data.largest_token_id, longest)
    policy = Policy(model, choose_precision(precision, processes.device)).to(processes.device)
    choice = choose_batching(policy, config.trainer.batching, longest)
    evaluator = Evaluator(
        policy,
        tokenizer,
        data.dataset,
        data.ground_truths,
        config=config.evaluation,
        processes=processes,
        microbatch_tokens=config.trainer.microbatch_tokens or DEFAULT_MICROBATCH_TOKENS,
        batching=choice.batching,
        seed=config.seed,
        progress=console.progress,
    )
    for line in evaluator.check(model, data.template):
        console.warn(line)
    return evaluator
