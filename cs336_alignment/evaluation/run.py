"""`cs336-sft evaluate`: loss, generations and rewards of any model folder, checkpoint or hub id,
alone or beside a baseline.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cs336_alignment.config import DEFAULT_MICROBATCH_TOKENS, Config
from cs336_alignment.cores import keep_freed_memory
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.evaluation.arms import Arm, identity_of, prepare_arms
from cs336_alignment.evaluation.backends import (
    Backend,
    open_backend,
    refuse_nothing_to_ask,
)
from cs336_alignment.evaluation.evaluator import EvaluationResult, Evaluator, gradable_of
from cs336_alignment.evaluation.kept_responses import (
    FOLDER,
    KeptGenerator,
    KeptResponses,
    forget,
)
from cs336_alignment.evaluation.rewards import RewardFunction, code_of, describe_reward, make_reward
from cs336_alignment.evaluation.summary import Summary, summarize_evaluation, to_json
from cs336_alignment.evaluation.summary_page import brief_table_of, to_markdown
from cs336_alignment.files import write_json, write_text
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.loading import (
    check_fits,
    load_model,
)
from cs336_alignment.model.policy import Policy
from cs336_alignment.tracking.console import Console
from cs336_alignment.tracking.tracker import show_examples, write_generations
from cs336_alignment.training.batching_choice import choose_batching
from cs336_alignment.training.parallel import (
    Processes,
    refuse_launcher_options,
    refuse_sharding,
    set_threads,
    start_processes,
)
from cs336_alignment.training.preflight import choose_precision
from cs336_alignment.training.stop import StopNow

EXAMPLES_SHOWN = 3
RESULT = "evaluation.json"
PAGE = "evaluation.md"
GENERATIONS = "generations.jsonl"
BASELINE_GENERATIONS = "generations-baseline.jsonl"


def evaluate(config: Config) -> ExitStatus:
    """Evaluate `model`, and `evaluation.baseline` beside it, on `data.eval_path`, into
    `<output_root>/<run_name>/`.

    Responses are kept as they come, and the same command goes on after a stop.

    Raises:
        UserError: no evaluation data (78), and as everywhere.
        StopNow: a signal.
    """
    if config.data.eval_path is None:
        raise UserError(
            "C111",
            "data.eval_path is not given",
            ExitStatus.BAD_CONFIG,
            hint="add data.eval_path=test.jsonl",
        )
    precision = refuse_launcher_options(config)
    refuse_sharding(config.parallel, "evaluate")
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
        reward = make_reward(config.evaluation)
        console.note(describe_reward(config.evaluation, reward))
        arms = prepare_arms(config, console)
        results = [
            (
                _asking
                if number == 0 and config.evaluation.backend != "transformers"
                else open_evaluator
            )(arm, config, precision, folder, processes, console, reward).run(generate=True)
            for number, arm in enumerate(arms)
        ]
        if processes.is_main:
            report: dict[str, Any] = {**subject, "options": asdict(config.evaluation)}
            if (code := code_of(reward)) is not None:
                report["reward_sha256"] = code
            _write(folder, report, results, arms, config, console)
            forget(folder / FOLDER)
            console.note(f"results  {folder}")
    except StopNow:
        if (folder / FOLDER).is_dir():
            console.note(f"stopped; responses are kept in {folder}: the same command goes on")
        raise
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


def open_evaluator(
    arm: Arm,
    config: Config,
    precision: str,
    folder: Path,
    processes: Processes,
    console: Console,
    reward: RewardFunction,
) -> Evaluator:
    """Load a model and give what evaluates it, its responses kept on disk as they come.

    Args:
        arm: the model and its examples.
        config: of the command.
        precision: as `refuse_launcher_options` gave it.
        folder: responses are kept in its `responses/`.
        processes: share the work.
        console: shows what happens.
        reward: grades.
    """
    if processes.device.type == "cpu":
        keep_freed_memory()
    console.note(f"loading {arm.options.name_or_path}")
    if arm.options.random_init:
        console.warn(f"its weights are drawn from seed {config.seed} (model.random_init=true)")
    model = load_model(arm.source, random_init=arm.options.random_init, seed=config.seed)
    set_threads(processes.local_count, model.num_parameters())
    dataset = arm.dataset
    longest = int(dataset.lengths.max())
    check_fits(model, arm.data.largest_token_id, longest)
    dtype = choose_precision(precision, processes.device)
    policy = Policy(model, dtype).to(processes.device)
    choice = choose_batching(policy, config.trainer.batching, longest)
    evaluator = _evaluator(arm, config, processes, console, reward, policy, choice.batching)
    for line in evaluator.check(model, arm.data.template):
        console.warn(line)
    identity = identity_of(arm, model, config) if processes.is_main else ""
    identity = f"{identity} {dtype} {processes.device.type}"
    backend = Backend(evaluator.generator, identity, config.evaluation.batch_size)
    evaluator.generator = _keeping(backend, folder, processes, console)
    return evaluator


def _asking(
    arm: Arm,
    config: Config,
    precision: str,
    folder: Path,
    processes: Processes,
    console: Console,
    reward: RewardFunction,
) -> Evaluator:
    """Give what evaluates the responses of another backend; see `open_evaluator`."""
    gradable = gradable_of(arm.ground_truths, config.evaluation.num_prompts)
    refuse_nothing_to_ask(gradable, config)
    backend = open_backend(arm, gradable, config, precision, processes, console)
    keeping = _keeping(backend, folder, processes, console)
    # The layout is that of a loss, which is not evaluated.
    evaluator = _evaluator(arm, config, processes, console, reward, None, "padded", keeping)
    for line in evaluator.check(None, arm.data.template):
        console.warn(line)
    return evaluator


def _evaluator(
    arm: Arm,
    config: Config,
    processes: Processes,
    console: Console,
    reward: RewardFunction,
    policy: Policy | None,
    batching: Batching,
    generator: KeptGenerator | None = None,
) -> Evaluator:
    return Evaluator(
        policy,
        arm.tokenizer,
        arm.dataset,
        arm.ground_truths,
        config=config.evaluation,
        processes=processes,
        microbatch_tokens=config.trainer.microbatch_tokens or DEFAULT_MICROBATCH_TOKENS,
        batching=batching,
        seed=config.seed,
        progress=console.progress,
        reward=reward,
        choices=arm.choices,
        warn=console.warn,
        generator=generator,
    )


def _keeping(
    backend: Backend, folder: Path, processes: Processes, console: Console
) -> KeptGenerator:
    """Put what is kept of an earlier command, and will be of this one, before a generator."""
    identity = processes.agree(backend.identity)
    kept = KeptResponses(folder / FOLDER, identity, processes.index)
    if kept.kept:
        console.note(f"going on: {kept.kept:,} responses of an earlier command are there")
    return KeptGenerator(backend.generator, kept, batch_size=backend.batch_size)


def _write(
    folder: Path,
    report: dict[str, Any],
    results: Sequence[EvaluationResult],
    arms: Sequence[Arm],
    config: Config,
    console: Console,
) -> None:
    """Write the results and show them."""
    model, *others = results
    report |= model.metrics
    names = [arm.options.name_or_path for arm in arms]
    if others:
        report["baseline"] = names[1]
        report["baseline_metrics"] = others[0].metrics
    summary = None
    if model.rows:
        groups = arms[0].categories(config.seed)
        baseline = others[0].rows if others else None
        summary = summarize_evaluation(model.rows, baseline, groups=groups, seed=config.seed)
        report |= to_json(summary)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if summary is not None:
            write_generations(folder / GENERATIONS, model.rows)
            for other in others:
                write_generations(folder / BASELINE_GENERATIONS, other.rows)
            write_text(folder / PAGE, _page(summary, model, names, config))
        write_json(folder / RESULT, report)
    except OSError as failure:
        raise UserError(
            "R101",
            f"cannot write to {folder}: {failure.strerror or failure}",
            ExitStatus.CANNOT_CREATE,
            hint="choose another output_root=… or run_name=…",
        ) from failure
    show_examples(console, model.rows, EXAMPLES_SHOWN)
    _show(console, summary, results, names)


def _page(summary: Summary, model: EvaluationResult, names: Sequence[str], config: Config) -> str:
    options = asdict(config.evaluation)
    shown = (
        "backend",
        "reward",
        "max_new_tokens",
        "min_new_tokens",
        "temperature",
        "top_p",
        "stop",
    )
    return to_markdown(
        summary,
        model.rows,
        model=names[0],
        baseline=names[1] if len(names) > 1 else None,
        data=str(config.data.eval_path),
        settings={
            **{f"evaluation.{name}": options[name] for name in shown},
            "data.prompt_template": config.data.prompt_template,
            "seed": config.seed,
        },
        examples=EXAMPLES_SHOWN,
    )


def _show(
    console: Console,
    summary: Summary | None,
    results: Sequence[EvaluationResult],
    names: Sequence[str],
) -> None:
    header: list[str] = ["metric", "value"]
    rows: list[list[str]] = []
    if summary is not None:
        header, rows = brief_table_of(summary)
    named = set() if summary is None else {found.metric for found in summary.findings}
    for name in sorted({name for result in results for name in result.metrics} - named):
        values = [result.metrics.get(name) for result in reversed(results)]  # the baseline first
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        rows.append([name.removeprefix("eval/"), *cells, *[""] * (len(header) - 1 - len(cells))])
    title = names[0] if len(names) == 1 else f"{names[0]} beside {names[1]}"
    console.table(title, header, rows)
