"""A run, whole: folder, data, model, loop, export. `train` is what every launcher ends in."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedTokenizerBase

from cs336_alignment.config import Config
from cs336_alignment.data.batching import StepPlan
from cs336_alignment.data.formats import load_template
from cs336_alignment.data.prepare import PreparedData, prepare
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.evaluation.evaluator import Evaluator
from cs336_alignment.model.loading import check_fits, load_model, load_tokenizer, resolve_model
from cs336_alignment.model.policy import Policy
from cs336_alignment.tracking.console import Console
from cs336_alignment.tracking.metrics import MetricsFile, read_metrics
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
from cs336_alignment.training.preflight import (
    Batching,
    choose_batching,
    choose_cut,
    choose_precision,
    describe_batches,
    dropout_options,
)
from cs336_alignment.training.run_folder import LEDGER, MANIFEST, METRICS, Decision, RunFolder, Status
from cs336_alignment.training.step import Cut
from cs336_alignment.training.stop import StopRequest
from cs336_alignment.training.trainer import SaveOptions, Trainer

EXPORT = "model"
EXAMPLES_SHOWN = 3
COMPARED = ("eval/loss", "eval/format_reward", "eval/answer_reward", "eval/stop_rate")


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


@dataclass
class _Data:
    train: PreparedData
    held_out: PreparedData | None


class _Run:
    """The parts of a run and the order in which they are made."""

    processes: Processes
    decision: Decision

    def __init__(
        self, config: Config, folder: RunFolder, console: Console, arguments: Sequence[str]
    ) -> None:
        self.config = config
        self.folder = folder
        self.console = console
        self.arguments = arguments
        self.state = TrainState()

    def to_the_end(self, precision: str) -> ExitStatus:
        if self.decision.complete:
            self.console.note(
                f"{self.folder.path} is complete: nothing to do. Its model is in {self.folder.path / EXPORT}; "
                "a larger trainer.num_train_epochs or trainer.max_steps would continue it."
            )
            return ExitStatus.DONE
        config, device = self.config, self.processes.device
        self.threads = set_threads(self.processes.local_count)
        source = resolve_model(
            config.model.name_or_path, config.model.revision, config.model.trust_remote_code
        )
        tokenizer = load_tokenizer(source)
        data = self._prepare(tokenizer)
        self.console.note(f"loading {config.model.name_or_path}")
        model = load_model(source, random_init=config.model.random_init, seed=config.seed)
        check_fits(model, int(data.train.dataset.input_ids.max()), max(data.train.dataset.lengths))
        if config.trainer.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        policy = Policy(model, choose_precision(precision, device)).to(device)
        batching = choose_batching(policy, config.trainer.batching, max(data.train.dataset.lengths))
        cut = choose_cut(config.trainer, flat=batching.flat)
        return self._fit(policy, tokenizer, data, batching, cut)

    def _prepare(self, tokenizer: PreTrainedTokenizerBase) -> _Data:
        config = self.config.data
        prepared = []
        for path, split, limit in (
            (config.train_path, "train", config.max_train_examples),
            (config.eval_path, "test", config.max_eval_examples),
        ):
            if path is None:
                continue
            self.console.note(f"reading {path}")
            with self.console.progress(f"tokenizing {split}", 0) as advance:
                prepared.append(
                    prepare(path, config, tokenizer, seed=self.config.seed, split=split, max_examples=limit,
                            advance=advance)
                )  # fmt: skip
        return _Data(prepared[0], prepared[1] if len(prepared) > 1 else None)

    def _fit(
        self, policy: Policy, tokenizer: PreTrainedTokenizerBase, data: _Data, batching: Batching, cut: Cut
    ) -> ExitStatus:
        config, dataset = self.config, data.train.dataset
        plan = StepPlan(len(dataset), config.trainer.global_batch_size, config.seed, config.data.shuffle)
        total_steps = plan.total_steps(config.trainer.num_train_epochs, config.trainer.max_steps)
        template = load_template(config.data.prompt_template)
        manifest = build_manifest(
            config, old=self.folder.read_json(MANIFEST), model=policy.model, tokenizer=tokenizer,
            template=template, train=data.train, held_out=data.held_out,
            num_processes=self.processes.count, threads=self.threads,
        )  # fmt: skip
        optimizer = build_optimizer(policy, config.optimizer)
        if self.decision.checkpoint is not None:
            self.state = restore(
                self.decision.checkpoint, policy.model, optimizer, self.processes.device
            )
        if self.state.step > total_steps:
            raise UserError(
                "C303", "the run is already further than the new length", ExitStatus.BAD_CONFIG,
                expected=f"at least {self.state.step} steps", got=f"{total_steps}",
                hint="raise trainer.max_steps or trainer.num_train_epochs",
            )  # fmt: skip
        self._describe(policy, data, batching, plan, cut, total_steps)
        self.processes.wait()  # nobody reads the folder any more: the main process may write
        tracker = self._open_tracker(manifest, data)
        evaluator = self._evaluator(policy, tokenizer, data, cut)

        def evaluate(step: int) -> None:
            if evaluator is not None and self._evaluation_due(step, total_steps):
                generate = self._generation_due(step, total_steps)
                result = evaluator.run(generate=generate)
                tracker.evaluation(step, result.metrics, result.rows)
                self.shown = result.rows or self.shown

        self.shown: list[dict[str, object]] = []
        with StopRequest(config.trainer.max_hours) as stop:
            trainer = Trainer(
                policy, self.processes.wrap(policy), optimizer, dataset, plan=plan, cut=cut,
                total_steps=total_steps, state=self.state, trainer=config.trainer,
                optimizer_config=config.optimizer, seed=config.seed, processes=self.processes,
                tracker=tracker, evaluate=evaluate, stop=stop,
                saving=SaveOptions(
                    self.folder.checkpoints, {"manifest": manifest},
                    lambda path: save_sidecars(path, policy.model, tokenizer),
                ),
            )  # fmt: skip
            self.console.start(total_steps, self.state.step)
            try:
                status = trainer.fit()
            except BaseException:
                tracker.finish(ExitStatus.INTERNAL, config.run_name or "")
                raise
        if status == ExitStatus.DONE:
            self._export(policy, tokenizer, template.text, total_steps)
        tracker.finish(status, config.run_name or "")
        self._say_goodbye(status)
        return status

    def _evaluation_due(self, step: int, total_steps: int) -> bool:
        every = self.config.trainer.eval_steps
        periodic = every > 0 and step % every == 0
        return step in (0, total_steps) or periodic or self._generation_due(step, total_steps)

    def _generation_due(self, step: int, total_steps: int) -> bool:
        every = self.config.evaluation.generation_steps
        if every is None:
            return False
        return step in (0, total_steps) or (every > 0 and step % every == 0)

    def _evaluator(
        self, policy: Policy, tokenizer: PreTrainedTokenizerBase, data: _Data, cut: Cut
    ) -> Evaluator | None:
        if data.held_out is None:
            return None
        evaluator = Evaluator(
            policy, tokenizer, data.held_out.dataset, data.held_out.examples,
            config=self.config.evaluation, processes=self.processes,
            microbatch_tokens=cut.microbatch_tokens or 4096, flat=cut.flat, seed=self.config.seed,
            add_special_tokens=self.config.data.add_special_tokens, progress=self.console.progress,
        )  # fmt: skip
        if self.config.evaluation.generation_steps is not None and not evaluator.prompts:
            self.console.warn("no evaluation row has a ground truth, so nothing is generated")
        return evaluator

    def _open_tracker(self, manifest: dict[str, object], data: _Data) -> RunTracker:
        config, folder = self.config, self.folder
        if not self.processes.is_main:
            return RunTracker(self.console, None, NullLogger(), folder.path)
        remove_leftovers(folder.checkpoints)
        folder.write_config(config)
        folder.write_json(MANIFEST, manifest)
        ledger = {"train": asdict(data.train.ledger)}
        if data.held_out is not None:
            ledger["eval"] = asdict(data.held_out.ledger)
        folder.write_json(LEDGER, ledger)
        folder.write_status(Status("running", self.state.step, resume_command=self.command))
        metrics = MetricsFile(folder.path / METRICS)
        metrics.truncate_after(self.state.step if self.decision.checkpoint is not None else -1)
        logger: Logger = NullLogger()
        if config.logger.backend == "wandb":
            logger = WandbLogger(
                project=config.logger.project, entity=config.logger.entity, group=config.logger.group,
                run_name=config.run_name or "", run_id=str(manifest["wandb_run_id"]), folder=folder.path,
                config=asdict(config), note=self.console.note, warn=self.console.warn,
            )  # fmt: skip
        return RunTracker(self.console, metrics, logger, folder.path)

    def _describe(
        self, policy: Policy, data: _Data, batching: Batching, plan: StepPlan, cut: Cut, total_steps: int
    ) -> None:
        config, processes = self.config, self.processes
        parameters = sum(p.numel() for p in policy.parameters())
        dtype = next(policy.parameters()).dtype
        compute = policy.autocast_dtype or dtype
        lines = [
            ("run", str(self.folder.path)),
            ("model", f"{config.model.name_or_path}, {parameters:,} parameters, all trained"),
            ("precision", f"weights {_short(dtype)}, compute {_short(compute)}, optimizer state {_short(dtype)}"),
            ("processes", f"{processes.count} on {processes.device.type}, {self.threads} "
             f"thread{'s' if self.threads > 1 else ''} each"),
        ]  # fmt: skip
        for name, part in (("data", data.train), ("held out", data.held_out)):
            if part is not None:
                lines.append((name, _ledger_line(part)))
        lines += [
            ("batches" if i == 0 else "", line)
            for i, line in enumerate(
                describe_batches(plan, cut, data.train.dataset.lengths, processes.count, total_steps)
            )
        ]
        lines.append(("rows", batching.reason))
        lines.append(("loss", f"{config.trainer.loss_normalization} normalization"))
        if policy.head is None:
            lines.append(("LM head", "the model's own: it is no plain linear layer, so whole logits are formed"))
        if names := dropout_options(policy):
            lines.append(("dropout", f"{', '.join(names)}: results repeat, but depend on the cut into microbatches"))
        if self.decision.checkpoint is not None:
            lines.append(("resuming", f"{self.decision.checkpoint}, step {self.state.step} of {total_steps}"))
        for name, text in lines:
            self.console.note(f"{name:<10} {text}")
        for notice in self.decision.notices:
            self.console.warn(notice)

    def _export(
        self, policy: Policy, tokenizer: PreTrainedTokenizerBase, template: str, total_steps: int
    ) -> None:
        if self.processes.is_main:
            config = self.config
            facts = {
                "learning rate": f"{config.optimizer.learning_rate:g}, {config.optimizer.lr_scheduler_type}",
                "examples a step": str(config.trainer.global_batch_size),
                "steps": str(total_steps),
                "trained tokens": f"{self.state.response_tokens_seen:,}",
                "seed": str(config.seed),
            }
            card = model_card(
                base_model=config.model.name_or_path, run_name=config.run_name or "",
                data=config.data.train_path, facts=facts, results=self._before_and_after(),
                prompt_template=template,
            )  # fmt: skip
            export_model(self.folder.path / EXPORT, policy.model, tokenizer, card)
        self.processes.wait()

    def _before_and_after(self) -> list[tuple[str, float, float]]:
        rows = read_metrics(self.folder.path / METRICS)
        results = []
        for name in COMPARED:
            values = [row[name] for row in rows if row.get(name) is not None]
            if len(values) > 1:
                results.append((name, values[0], values[-1]))
        return results

    def _say_goodbye(self, status: ExitStatus) -> None:
        if not self.processes.is_main:
            return
        console, path = self.console, self.folder.path
        if status != ExitStatus.DONE:
            console.note(f"stopped on request after step {self.state.step}; to continue: {self.command}")
            return
        if self.shown:
            console.note("\nThe first generations after training:\n")
            show_examples(console, self.shown, EXAMPLES_SHOWN)
        results = self._before_and_after()
        if results:
            cells = [[name, _number(name, before), _number(name, after)] for name, before, after in results]
            console.table("Held-out data", ["metric", "before", "after"], cells)
        console.note(f"model     {path / EXPORT}  (loads with transformers' from_pretrained)")
        console.note(f"metrics   {path / METRICS}, picture {path / 'loss.png'}")
        if self.shown:
            console.note(f"texts     {path / 'generations'}")

    @property
    def command(self) -> str:
        """The command that continues this run."""
        words = shlex.join(self.arguments)
        if self.processes.count == 1:
            return f"cs336-sft train {words}"
        count = self.processes.local_count
        return f"torchrun --standalone --nproc_per_node {count} -m cs336_alignment.cli train {words}"

    @contextmanager
    def reporting(self, owns_folder: bool) -> Iterator[None]:
        """Write how it ended into `status.json`, whatever ends it."""

        def write(state: str, status: ExitStatus, error: str | None = None) -> None:
            if owns_folder:
                command = self.command if hasattr(self, "processes") else None
                self.folder.write_status(Status(state, self.state.step, int(status), error, command))

        self.status = ExitStatus.DONE
        try:
            yield
            write("completed" if self.status == ExitStatus.DONE else "preempted", self.status)
        except UserError as error:
            self.console.stop()
            write("failed", error.status, str(error))
            raise
        except KeyboardInterrupt:
            self.console.stop()
            write("preempted", ExitStatus.INTERRUPTED)
            raise
        except Exception as failure:
            self.console.stop()
            write("failed", ExitStatus.INTERNAL, f"{type(failure).__name__}: {failure}")
            raise


def _short(dtype: torch.dtype) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float64": "fp64"}.get(name := str(dtype)[6:], name)


def _number(name: str, value: float) -> str:
    return f"{value:.4f}" if name == "eval/loss" else f"{100 * value:.1f} %"


def _ledger_line(part: PreparedData) -> str:
    ledger = part.ledger
    line = (
        f"{ledger.kept:,} of {ledger.rows_read:,} rows of {ledger.source}: {ledger.tokens:,} tokens, "
        f"{ledger.response_tokens:,} of them trained; longest {ledger.longest:,}"
    )
    if ledger.rows_beyond_limit:
        line += f"; {ledger.rows_beyond_limit:,} beyond the limit of examples"
    if ledger.dropped:
        line += "; dropped " + ", ".join(f"{n:,} {reason}" for reason, n in ledger.dropped.items())
    if ledger.truncated:
        line += f"; {ledger.truncated:,} truncated"
    return line
