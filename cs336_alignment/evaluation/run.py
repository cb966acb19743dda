"""`cs336-sft evaluate`: loss, generations and rewards of any model folder, checkpoint or hub id,
alone or beside a baseline.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from cs336_alignment.evaluation.kept_responses import FOLDER, KeptGenerator, KeptResponses, forget
from cs336_alignment.evaluation.rewards import RewardFunction, code_of, describe_reward, make_reward
from cs336_alignment.evaluation.summary import Summary, summarize_evaluation, to_json
from cs336_alignment.evaluation.summary_page import brief_table_of, to_markdown
from cs336_alignment.files import telling, write_json, write_text
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.fits import check_fits
from cs336_alignment.model.loading import load_model
from cs336_alignment.model.policy import Policy
from cs336_alignment.tracking.console import Console
from cs336_alignment.tracking.tracker import show_examples, write_generations
from cs336_alignment.training.batching_choice import choose_batching
from cs336_alignment.training.parallel import (
    Processes,
    join,
    refuse_launcher_options,
    refuse_sharding,
    set_threads,
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
        raise UserError("C111", "data.eval_path is not given", hint="add data.eval_path=test.jsonl")
    precision = refuse_launcher_options(config)
    refuse_sharding(config.parallel, "evaluate")
    folder = Path(config.output_root).expanduser() / (config.run_name or "")
    subject = {
        "model": config.model.name_or_path,
        "revision": config.model.revision,
        "data": config.data.eval_path,
    }
    _refuse_another(folder / RESULT, subject)
    processes = join(config.parallel)
    console = Console(enabled=processes.is_main)
    try:
        reward = make_reward(config.evaluation)
        console.note(describe_reward(config.evaluation, reward))
        arms = prepare_arms(config, console)
        opening = Opening(config, precision, folder, processes, console, reward)
        first = opening.model if config.evaluation.backend == "transformers" else opening.backend
        opens = [first, *[opening.model] * (len(arms) - 1)]
        results = [open_(arm).run(generate=True) for open_, arm in zip(opens, arms, strict=True)]
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
            expected=f"{subject['model']} on {subject['data']}",
            got=f"{old.get('model')} on {old.get('data')}",
            hint="choose another run_name=…",
        )


@dataclass(frozen=True)
class Opening:
    """Makes evaluators, their responses kept on disk as they come.

    Attributes:
        config: the whole configuration.
        precision: as the launcher or the config asks for it.
        folder: of the evaluation; responses are kept in it.
        processes: who shares the work.
        console: for notes and progress.
        reward: grades responses.
    """

    config: Config
    precision: str
    folder: Path
    processes: Processes
    console: Console
    reward: RewardFunction

    def model(self, arm: Arm) -> Evaluator:
        """Load an arm's model and give what evaluates it.

        Raises:
            UserError: the model cannot be loaded, or the data do not fit it (66, 78).
        """
        config, processes, console = self.config, self.processes, self.console
        if processes.device.type == "cpu":
            keep_freed_memory()
        console.note(f"loading {arm.options.name_or_path}")
        if arm.options.random_init:
            console.warn(f"its weights are drawn from seed {config.seed} (model.random_init=true)")
        model = load_model(arm.source, random_init=arm.options.random_init, seed=config.seed)
        set_threads(processes.local_count, model.num_parameters())
        longest = int(arm.dataset.lengths.max())
        check_fits(model, arm.data.largest_token_id, longest)
        dtype = choose_precision(self.precision, processes.device)
        policy = Policy(model, dtype).to(processes.device)
        choice = choose_batching(policy, config.trainer.batching, longest)
        evaluator = self._evaluator(arm, policy, choice.batching)
        identity = identity_of(arm, model, config) if processes.is_main else ""
        identity = f"{identity} {dtype} {processes.device.type}"
        assert evaluator.generator is not None
        backend = Backend(evaluator.generator, identity, config.evaluation.batch_size)
        evaluator.generator = self._keeping(backend)
        return evaluator

    def backend(self, arm: Arm) -> Evaluator:
        """Give what evaluates the responses of another backend."""
        gradable = gradable_of(arm.ground_truths, self.config.evaluation.num_prompts)
        refuse_nothing_to_ask(gradable, self.config)
        backend = open_backend(
            arm, gradable, self.config, self.precision, self.processes, self.console
        )
        # The layout is that of a loss, which is not evaluated.
        return self._evaluator(arm, None, "padded", self._keeping(backend))

    def _evaluator(
        self, arm: Arm, policy: Policy | None, batching: Batching,
        generator: KeptGenerator | None = None,
    ) -> Evaluator:  # fmt: skip
        config = self.config
        evaluator = Evaluator(
            policy, arm.tokenizer, arm.dataset, arm.ground_truths, config=config.evaluation,
            processes=self.processes, batching=batching, seed=config.seed,
            microbatch_tokens=config.trainer.microbatch_tokens or DEFAULT_MICROBATCH_TOKENS,
            progress=self.console.progress, reward=self.reward, choices=arm.choices,
            warn=self.console.warn, generator=generator,
        )  # fmt: skip
        for line in evaluator.check(None if policy is None else policy.model, arm.data.template):
            self.console.warn(line)
        return evaluator

    def _keeping(self, backend: Backend) -> KeptGenerator:
        """Put what is kept of an earlier command, and will be of this one, before a generator."""
        identity = self.processes.agree(backend.identity)
        kept = KeptResponses(self.folder / FOLDER, identity, self.processes.index)
        if kept.kept:
            self.console.note(f"going on: {kept.kept:,} responses of an earlier command are there")
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
    with telling(
        "R101",
        f"cannot write to {folder}",
        "choose another output_root=… or run_name=…",
    ):
        folder.mkdir(parents=True, exist_ok=True)
        if summary is not None:
            write_generations(folder / GENERATIONS, model.rows)
            for other in others:
                write_generations(folder / BASELINE_GENERATIONS, other.rows)
            write_text(folder / PAGE, _page(summary, model, names, config))
        write_json(folder / RESULT, report)
    show_examples(console, model.rows, EXAMPLES_SHOWN)
    _show(console, summary, results, names)


def _page(summary: Summary, model: EvaluationResult, names: Sequence[str], config: Config) -> str:
    options = asdict(config.evaluation)
    shown = (
        "backend", "reward", "max_new_tokens", "min_new_tokens", "temperature", "top_p", "stop",
    )  # fmt: skip
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
