"""A run, whole: folder, data, model, loop, export. `train` is what every launcher ends in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from cs336_alignment.config import DEFAULT_MICROBATCH_TOKENS, Config
from cs336_alignment.data.batching import StepPlan
from cs336_alignment.data.prepare import PreparedData, prepare
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.evaluation.evaluator import Evaluator
from cs336_alignment.model.loading import (
    check_fits,
    enable_checkpointing,
    load_model,
    load_tokenizer,
    resolve_model,
)
from cs336_alignment.model.policy import Policy
from cs336_alignment.tracking.console import Console
from cs336_alignment.tracking.metrics import MetricsFile
from cs336_alignment.tracking.tracker import RunTracker
from cs336_alignment.tracking.wandb_logger import Logger, NullLogger, WandbLogger
from cs336_alignment.training.checkpoint import TrainState, remove_leftovers, restore
from cs336_alignment.training.export import export_model, save_sidecars
from cs336_alignment.training.manifest import build_manifest
from cs336_alignment.training.optimizer import build_optimizer
from cs336_alignment.training.parallel import (
    Processes,
    is_main_process_before_start,
    refuse_launcher_options,
    set_threads,
    start_processes,
)
from cs336_alignment.training.preflight import choose_batching, choose_cut, choose_precision
from cs336_alignment.training.report import (
    describe_run,
    resume_command,
    say_goodbye,
    write_card,
)
from cs336_alignment.training.run_folder import (
    EXPORT,
    LEDGER,
    MANIFEST,
    METRICS,
    STATUS,
    Decision,
    RunFolder,
)
from cs336_alignment.training.status import StatusFile
from cs336_alignment.training.step import Cut
from cs336_alignment.training.stop import StopNow, StopRequest
from cs336_alignment.training.trainer import SaveOptions, Trainer, is_due


def train(config: Config, arguments: Sequence[str]) -> ExitStatus:
    """Train as the config says, or continue or finish what its folder holds.

    Args:
        config: checked.
        arguments: as typed after the verb, for the command that resumes.

    Returns:
        DONE; or STOPPED or INTERRUPTED after a request to stop: what was trained is in a
        checkpoint.

    Raises:
        UserError: as everywhere; `status.json` then holds it too.
    """
    precision = refuse_launcher_options(config.trainer.precision)
    is_main = is_main_process_before_start()
    folder, console = RunFolder(config), Console(enabled=is_main)
    if is_main:
        folder.claim()
    status = StatusFile(folder.path / STATUS, resume_command(arguments), enabled=is_main)
    stop = StopRequest(config.trainer.max_hours, on_leave=status.ended, tell=is_main)
    try:
        with stop, status.covering():
            decision = Decision()
            if is_main:
                completed = status.read().get("state") == "completed"
                decision = folder.decide(config, completed=completed)
            if is_main and not decision.complete:
                status.running()
            processes = Processes(start_processes(config.parallel))
            try:
                decision = processes.agree(decision)
                run = _Run(config, folder, console, processes, decision, status, stop)
                if decision.complete:
                    return run.nothing_to_do()
                outcome = run.to_the_end(precision)
            finally:
                console.stop()
                processes.close()
            status.ended(outcome)
    except StopNow as request:
        console.note("stopped on request before the first step: there was nothing to save")
        return request.status
    return outcome


@dataclass
class _Run:
    """The parts of a run and the order in which they are made."""

    config: Config
    folder: RunFolder
    console: Console
    processes: Processes
    decision: Decision
    status: StatusFile
    stop: StopRequest

    def nothing_to_do(self) -> ExitStatus:
        """Say that the folder holds a finished run."""
        self.console.note(
            f"{self.folder.path} is complete: nothing to do. Its model is in "
            f"{self.folder.path / EXPORT}; a larger trainer.num_train_epochs or "
            "trainer.max_steps would continue it."
        )
        return ExitStatus.DONE

    def to_the_end(self, precision: str) -> ExitStatus:
        """Load what the run needs, fail early where something is wrong, then train."""
        config, model_config = self.config, self.config.model
        set_threads(self.processes.local_count)
        source = resolve_model(
            model_config.name_or_path, model_config.revision, model_config.trust_remote_code
        )
        tokenizer = load_tokenizer(source)
        data, held_out = self._prepare(tokenizer)
        self.console.note(f"loading {model_config.name_or_path}")
        model = load_model(source, random_init=model_config.random_init, seed=config.seed)
        parts = [part.dataset for part in (data, held_out) if part is not None]
        longest = max(max(part.lengths) for part in parts)
        check_fits(model, max(int(part.input_ids.max()) for part in parts), longest)
        if config.trainer.gradient_checkpointing:
            enable_checkpointing(model)
        device = self.processes.device
        policy = Policy(model, choose_precision(precision, device)).to(device)
        batching = choose_batching(policy, config.trainer.batching, longest)
        cut = choose_cut(config.trainer, flat=batching.flat)
        plan = StepPlan(
            len(data.dataset), config.trainer.global_batch_size, config.seed, config.data.shuffle
        )
        total_steps = plan.total_steps(config.trainer.num_train_epochs, config.trainer.max_steps)
        for line in describe_run(
            config, policy, data, held_out, batching, plan, cut,
            num_processes=self.processes.count, total_steps=total_steps,
        ):  # fmt: skip
            self.console.note(line)
        return self._fit(policy, tokenizer, data, held_out, plan, cut, total_steps)

    def _prepare(
        self, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[PreparedData, PreparedData | None]:
        config = self.config.data

        def read(path: str, split: str, limit: int | None) -> PreparedData:
            self.console.note(f"reading {path}")
            return prepare(
                path, config, tokenizer, seed=self.config.seed, split=split, max_examples=limit,
                progress=self.console.progress,
            )  # fmt: skip

        data = read(config.train_path, "train", config.max_train_examples)
        if config.eval_path is None:
            return data, None
        return data, read(config.eval_path, "test", config.max_eval_examples)

    def _fit(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        data: PreparedData,
        held_out: PreparedData | None,
        plan: StepPlan,
        cut: Cut,
        total_steps: int,
    ) -> ExitStatus:
        config = self.config
        optimizer = build_optimizer(policy.model, config.optimizer)
        state = self._resume(policy, optimizer, total_steps)
        manifest = build_manifest(
            config, old=self.folder.read_manifest(), model=policy.model, tokenizer=tokenizer,
            train=data, held_out=held_out, num_processes=self.processes.count, step=state.step,
        )  # fmt: skip
        if manifest["evaluation_since_step"] == state.step + 1:
            self.console.warn(
                "the evaluation data or options changed: results before this step do not compare"
            )
        self.processes.wait()  # nobody reads the folder any more: the main process may write
        tracker = self._open_tracker(manifest, data, held_out, state)
        trainer = Trainer(
            policy, self.processes.wrap(policy), optimizer, data.dataset, plan=plan, cut=cut,
            total_steps=total_steps, state=state, trainer=config.trainer,
            optimizer_config=config.optimizer, seed=config.seed, processes=self.processes,
            tracker=tracker, stop=self.stop,
            evaluate=self._evaluation(policy, tokenizer, held_out, cut, total_steps, tracker),
            saving=SaveOptions(
                self.folder.checkpoints, {"manifest": manifest},
                lambda path: save_sidecars(path, policy.model, tokenizer),
            ),
        )  # fmt: skip
        self.console.start(total_steps, state.step)
        outcome = ExitStatus.INTERNAL
        try:
            outcome = trainer.fit()
            if outcome == ExitStatus.DONE:
                self._export(policy, tokenizer, state, data.template.text)
        finally:
            tracker.finish(outcome, config.run_name or "")
        say_goodbye(
            self.console, self.folder.path, outcome, step=state.step,
            generations=tracker.generations, command=self.status.command,
        )  # fmt: skip
        return outcome

    def _resume(self, policy: Policy, optimizer: Optimizer, total_steps: int) -> TrainState:
        state, checkpoint = TrainState(), self.decision.checkpoint
        if checkpoint is not None:
            state = restore(checkpoint, policy.model, optimizer, self.processes.device)
            self.console.note(
                f"resuming   {checkpoint}: step {state.step} of {total_steps} is done"
            )
        if state.step > total_steps:
            raise UserError(
                "C303",
                "the run is already further than the new length",
                ExitStatus.BAD_CONFIG,
                expected=f"at least {state.step} steps",
                got=f"{total_steps}",
                hint="raise trainer.max_steps or trainer.num_train_epochs",
            )
        for notice in self.decision.notices:
            self.console.warn(notice)
        return state

    def _evaluation(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        held_out: PreparedData | None,
        cut: Cut,
        total_steps: int,
        tracker: RunTracker,
    ) -> Callable[[int], None]:
        """Make the function that the loop calls at every step and that knows when it is due."""
        if held_out is None:
            return lambda _: None
        evaluator = Evaluator(
            policy, tokenizer, held_out.dataset, held_out.examples,
            config=self.config.evaluation, processes=self.processes,
            microbatch_tokens=cut.microbatch_tokens or DEFAULT_MICROBATCH_TOKENS, flat=cut.flat,
            seed=self.config.seed, add_special_tokens=self.config.data.add_special_tokens,
            progress=self.console.progress,
        )  # fmt: skip
        eval_steps = self.config.trainer.eval_steps
        generation_steps = self.config.evaluation.generation_steps
        if generation_steps is not None and not evaluator.prompts:
            self.console.warn("no evaluation row has a ground truth, so nothing is generated")

        def due(every: int | None, step: int) -> bool:
            return every is not None and (step in (0, total_steps) or is_due(every, step))

        def evaluate(step: int) -> None:
            generate = due(generation_steps, step)
            if generate or due(eval_steps, step):
                result = evaluator.run(generate=generate)
                tracker.evaluation(step, result.metrics, result.rows)

        return evaluate

    def _open_tracker(
        self,
        manifest: dict[str, Any],
        data: PreparedData,
        held_out: PreparedData | None,
        state: TrainState,
    ) -> RunTracker:
        config, folder = self.config, self.folder
        if not self.processes.is_main:
            return RunTracker(self.console, None, NullLogger(), folder.path)
        remove_leftovers(folder.checkpoints)
        folder.write_config(config)
        folder.write_json(MANIFEST, manifest)
        ledgers = {"train": data, "eval": held_out}
        folder.write_json(
            LEDGER, {name: asdict(part.ledger) for name, part in ledgers.items() if part}
        )
        self.status.running(state.step)
        metrics = MetricsFile(folder.path / METRICS)
        metrics.truncate_after(state.step if self.decision.checkpoint is not None else -1)
        logger: Logger = NullLogger()
        if config.logger.backend == "wandb":
            logger = WandbLogger(
                project=config.logger.project, entity=config.logger.entity,
                group=config.logger.group, run_name=config.run_name or "",
                run_id=manifest["wandb_run_id"], folder=folder.path, config=asdict(config),
                note=self.console.note, warn=self.console.warn,
            )  # fmt: skip
        return RunTracker(self.console, metrics, logger, folder.path, self.status.running)

    def _export(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        state: TrainState,
        template: str,
    ) -> None:
        if self.processes.is_main:
            card = write_card(self.config, state, self.folder.path, template)
            export_model(self.folder.path / EXPORT, policy.model, tokenizer, card)
        self.processes.wait()
