"""`cs336-sft evaluate`: loss, generations and rewards of any model folder, checkpoint or hub id."""

from __future__ import annotations

from pathlib import Path

from cs336_alignment.config import DEFAULT_MICROBATCH_TOKENS, Config
from cs336_alignment.data.prepare import prepare
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.evaluation.evaluator import Evaluator
from cs336_alignment.model.loading import check_fits, load_model, load_tokenizer, resolve_model
from cs336_alignment.model.policy import Policy
from cs336_alignment.tracking.console import Console
from cs336_alignment.tracking.tracker import show_examples, write_generations
from cs336_alignment.training.checkpoint import write_json
from cs336_alignment.training.parallel import (
    Processes,
    refuse_launcher_options,
    set_threads,
    start_processes,
)
from cs336_alignment.training.preflight import choose_batching, choose_precision

EXAMPLES_SHOWN = 3


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
    processes = Processes(start_processes(config.parallel))
    console = Console(enabled=processes.is_main)
    try:
        set_threads(processes.local_count)
        evaluator = _build(config, precision, processes, console)
        result = evaluator.run(generate=True)
        if processes.is_main:
            folder = Path(config.output_root).expanduser() / (config.run_name or "")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                report = {"model": config.model.name_or_path, "data": config.data.eval_path}
                write_json(folder / "evaluation.json", {**report, **result.metrics})
                if result.rows:
                    write_generations(folder / "generations.jsonl", result.rows)
            except OSError as failure:
                raise UserError(
                    "R101",
                    f"cannot write to {folder}: {failure.strerror or failure}",
                    ExitStatus.CANNOT_CREATE,
                    hint="choose another output_root=… or run_name=…",
                ) from failure
            show_examples(console, result.rows, EXAMPLES_SHOWN)
            rows = [[name, f"{value:.4f}"] for name, value in sorted(result.metrics.items())]
            console.table(config.model.name_or_path, ["metric", "value"], rows)
            console.note(f"results  {folder}")
    finally:
        processes.close()
    return ExitStatus.DONE


def _build(config: Config, precision: str, processes: Processes, console: Console) -> Evaluator:
    options = config.model
    source = resolve_model(options.name_or_path, options.revision, options.trust_remote_code)
    tokenizer = load_tokenizer(source)
    assert config.data.eval_path is not None
    console.note(f"reading {config.data.eval_path}")
    data = prepare(
        config.data.eval_path,
        config.data,
        tokenizer,
        seed=config.seed,
        split="test",
        max_examples=config.data.max_eval_examples,
        progress=console.progress,
    )
    console.note(f"loading {options.name_or_path}")
    model = load_model(source, random_init=options.random_init, seed=config.seed)
    longest = max(data.dataset.lengths)
    check_fits(model, int(data.dataset.input_ids.max()), longest)
    policy = Policy(model, choose_precision(precision, processes.device)).to(processes.device)
    batching = choose_batching(policy, config.trainer.batching, longest)
    evaluator = Evaluator(
        policy,
        tokenizer,
        data.dataset,
        data.examples,
        config=config.evaluation,
        processes=processes,
        microbatch_tokens=config.trainer.microbatch_tokens or DEFAULT_MICROBATCH_TOKENS,
        flat=batching.flat,
        seed=config.seed,
        add_special_tokens=config.data.add_special_tokens,
        progress=console.progress,
    )
    if not evaluator.prompts:
        console.warn("no row has a ground truth, so nothing is generated")
    return evaluator
