"""A run, whole: folder, data, model, loop, export. `train` is what every launcher ends in."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerBase

from cs336_alignment.config import DEFAULT_MICROBATCH_TOKENS, Config
from cs336_alignment.data.batching import StepPlan
from cs336_alignment.data.formats import load_template
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
from cs336_alignment.tracking.tracker import RunTracker, show_examples
from cs336_alignment.tracking.wandb_logger import Logger, NullLogger, WandbLogger
from cs336_alignment.training.checkpoint import TrainState, remove_leftovers, restore
from cs336_alignment.training.export import export_model, model_card, save_sidecars
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
from cs336_alignment.training.report import before_and_after, describe_run, show_metric
from cs336_alignment.training.run_folder import (
    LEDGER,
    MANIFEST,
    METRICS,
    Decision,
    RunFolder,
    Status,
)
from cs336_alignment.training.step import Cut
from cs336_alignment.training.stop import StopRequest
from cs336_alignment.training.trainer import SaveOptions, Trainer

EXPORT = "model"
EXAMPLES_SHOWN = 3


def train(config: Config, arguments: Sequence[str]) -> ExitStatus:
    """Train as the config says, or continue or finish what its folder holds.

    Args:
        config: checked.
        arguments: as typed after the verb, for the command that resumes.

    Returns:
        DONE; or STOPPED or INTERRUPTED after a request to stop, with a checkpoint.

    Raises:
        UserError: as everywhere; `status.json` then holds it too.
    """
    precision = refuse_launcher_options(config.trainer.precision)
    is_main = is_main_process_before_start()
    folder, decision = RunFolder(config), Decision()
    if is_main:
        folder.claim()
        decision = folder.decide(config)
    run = _Run(config, folder, Console(enabled=is_main), arguments)
    with run.reporting(is_main and not decision.complete):
        run.processes = Processes(start_processes(config.parallel))
        run.decision = run.processes.agree(decision)
        try:
            run.status = run.to_the_end(precision)
        finally:
            run.processes.close()
    return run.status


class _Run:
    """The parts of a run and the order in which they are made."""

    processes: Processes
    decision: Decision
    threads: int

    def __init__(
        self, config: Config, folder: RunFolder, console: Console, arguments: Sequence[str]
    ) -> None:
        self.config = config
        self.folder = folder
        self.console = console
        self.arguments = arguments
        self.state = TrainState()
        self.status = ExitStatus.DONE
        self.generations: list[dict[str, Any]] = []

    def to_the_end(self, precision: str) -> ExitStatus:
        """Load what the run needs, fail early where something is wrong, then train."""
        config, model_config = self.config, self.config.model
        if self.decision.complete:
            self.console.note(
                f"{self.folder.path} is complete: nothing to do. "
                f"Its model is in {self.folder.path / EXPORT}; a larger "
                "trainer.num_train_epochs or trainer.max_steps would continue it."
            )
            return ExitStatus.DONE
        self.threads = set_threads(self.processes.local_count)
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
            num_processes=self.processes.count, threads=self.threads, total_steps=total_steps,
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
        template = load_template(config.data.prompt_template)
        manifest = build_manifest(
            config, old=self.folder.read_json(MANIFEST), model=policy.model, tokenizer=tokenizer,
            template=template, train=data, held_out=held_out,
            num_processes=self.processes.count, threads=self.threads,
        )  # fmt: skip
        optimizer = build_optimizer(policy.model, config.optimizer)
        self._resume(policy, optimizer, total_steps)
        self.processes.wait()  # nobody reads the folder any more: the main process may write
        tracker = self._open_tracker(manifest, data, held_out)
        with StopRequest(config.trainer.max_hours) as stop:
            trainer = Trainer(
                policy, self.processes.wrap(policy), optimizer, data.dataset, plan=plan, cut=cut,
                total_steps=total_steps, state=self.state, trainer=config.trainer,
                optimizer_config=config.optimizer, seed=config.seed, processes=self.processes,
                tracker=tracker, stop=stop,
                evaluate=self._evaluation(policy, tokenizer, held_out, cut, total_steps, tracker),
                saving=SaveOptions(
                    self.folder.checkpoints, {"manifest": manifest},
                    lambda path: save_sidecars(path, policy.model, tokenizer),
                ),
            )  # fmt: skip
            self.console.start(total_steps, self.state.step)
            status = ExitStatus.INTERNAL
            try:
                status = trainer.fit()
                if status == ExitStatus.DONE:
                    self._export(policy, tokenizer, template.text, total_steps)
            finally:
                tracker.finish(status, config.run_name or "")
        if self.processes.is_main:
            self._say_goodbye(status)
        return status

    def _resume(self, policy: Policy, optimizer: Any, total_steps: int) -> None:
        checkpoint = self.decision.checkpoint
        if checkpoint is not None:
            self.state = restore(checkpoint, policy.model, optimizer, self.processes.device)
            self.console.note(
                f"resuming   {checkpoint}: step {self.state.step} of {total_steps} is done"
            )
        if self.state.step > total_steps:
            raise UserError(
                "C303",
                "the run is already further than the new length",
                ExitStatus.BAD_CONFIG,
                expected=f"at least {self.state.step} steps",
                got=f"{total_steps}",
                hint="raise trainer.max_steps or trainer.num_train_epochs",
            )
        for notice in self.decision.notices:
            self.console.warn(notice)

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
            if every is None:
                return False
            return step in (0, total_steps) or (every > 0 and step % every == 0)

        def evaluate(step: int) -> None:
            generate = due(generation_steps, step)
            if generate or due(eval_steps, step):
                result = evaluator.run(generate=generate)
                tracker.evaluation(step, result.metrics, result.rows)
                self.generations = result.rows or self.generations

        return evaluate

    def _open_tracker(
        self, manifest: dict[str, Any], data: PreparedData, held_out: PreparedData | None
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
        folder.write_status(Status("running", self.state.step, resume_command=self.command))
        metrics = MetricsFile(folder.path / METRICS)
        metrics.truncate_after(self.state.step if self.decision.checkpoint is not None else -1)
        logger: Logger = NullLogger()
        if config.logger.backend == "wandb":
            logger = WandbLogger(
                project=config.logger.project, entity=config.logger.entity,
                group=config.logger.group, run_name=config.run_name or "",
                run_id=manifest["wandb_run_id"], folder=folder.path, config=asdict(config),
                note=self.console.note, warn=self.console.warn,
            )  # fmt: skip
        return RunTracker(self.console, metrics, logger, folder.path)

    def _export(
        self, policy: Policy, tokenizer: PreTrainedTokenizerBase, template: str, total_steps: int
    ) -> None:
        if self.processes.is_main:
            config, optimizer = self.config, self.config.optimizer
            facts = {
                "learning rate": f"{optimizer.learning_rate:g}, {optimizer.lr_scheduler_type}",
                "examples a step": str(config.trainer.global_batch_size),
                "steps": str(total_steps),
                "trained tokens": f"{self.state.response_tokens_seen:,}",
                "seed": str(config.seed),
            }
            card = model_card(
                base_model=config.model.name_or_path,
                run_name=config.run_name or "",
                data=config.data.train_path,
                facts=facts,
                results=before_and_after(self.folder.path / METRICS),
                prompt_template=template,
            )
            export_model(self.folder.path / EXPORT, policy.model, tokenizer, card)
        self.processes.wait()

    def _say_goodbye(self, status: ExitStatus) -> None:
        console, path = self.console, self.folder.path
        if status != ExitStatus.DONE:
            console.note(f"stopped on request after step {self.state.step}; checkpoint written")
            console.note(f"to continue: {self.command}")
            return
        if self.generations:
            console.note(f"\nThe first {EXAMPLES_SHOWN} generations after training:\n")
            show_examples(console, self.generations, EXAMPLES_SHOWN)
        if results := before_and_after(path / METRICS):
            cells = [
                [name, show_metric(name, before), show_metric(name, after)]
                for name, before, after in results
            ]
            console.table("Held-out data", ["metric", "before", "after"], cells)
        console.note(f"model    {path / EXPORT}  (loads with transformers' from_pretrained)")
        console.note(f"metrics  {path / METRICS}, picture {path / 'loss.png'}")
        if self.generations:
            console.note(f"texts    {path / 'generations'}")

    @property
    def command(self) -> str:
        """The command that continues this run."""
        words = shlex.join(self.arguments)
        if self.processes.count == 1:
            return f"cs336-sft train {words}"
        launcher = f"torchrun --standalone --nproc_per_node {self.processes.local_count}"
        return f"{launcher} -m cs336_alignment.cli train {words}"

    @contextmanager
    def reporting(self, owns_folder: bool) -> Iterator[None]:
        """Write how it ended into `status.json`, whatever ends it."""

        def write(state: str, status: ExitStatus, error: str | None = None) -> None:
            self.console.stop()
            if owns_folder:
                command = self.command if hasattr(self, "processes") else None
                # Before a checkpoint is loaded the folder knows the step better.
                step = max(self.state.step, self.folder.read_status().get("step", 0))
                self.folder.write_status(Status(state, step, int(status), error, command))

        try:
            yield
            write("completed" if self.status == ExitStatus.DONE else "preempted", self.status)
        except UserError as error:
            write("failed", error.status, str(error))
            raise
        except KeyboardInterrupt:
            write("preempted", ExitStatus.INTERRUPTED)
            raise
        except OSError as failure:
            full = UserError(
                "R209",
                f"cannot write to {self.folder.path}: {failure.strerror or failure}",
                ExitStatus.IO,
                hint="make room and run the same command again",
            )
            with suppress(OSError):
                write("failed", full.status, str(full))
            raise full from failure
        except Exception as failure:
            write("failed", ExitStatus.INTERNAL, f"{type(failure).__name__}: {failure}")
            raise
