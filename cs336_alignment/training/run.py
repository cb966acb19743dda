"""A run, whole: folder, data, model, loop, export. `train` is what every launcher ends in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from cs336_alignment.config import DEFAULT_MICROBATCH_TOKENS, Config
from cs336_alignment.cores import keep_freed_memory
from cs336_alignment.data.batching import StepPlan
from cs336_alignment.data.splits import ledger_json
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.evaluation.evaluator import Evaluator
from cs336_alignment.evaluation.rewards import code_of
from cs336_alignment.evaluation.sampling import doubtful_sampling
from cs336_alignment.model.fits import check_fits
from cs336_alignment.model.policy import Policy
from cs336_alignment.model.recompute import enable_checkpointing
from cs336_alignment.sharing.hub import announce, push_run
from cs336_alignment.tracking.console import Console
from cs336_alignment.tracking.metrics import MetricsFile
from cs336_alignment.tracking.report import write_own_report
from cs336_alignment.tracking.tracker import RunTracker
from cs336_alignment.tracking.wandb_logger import Logger, NullLogger, WandbLogger
from cs336_alignment.training.averaging import Average, build_average
from cs336_alignment.training.batching_choice import choose_batching
from cs336_alignment.training.best import Criterion, Judge, Verdict
from cs336_alignment.training.checkpoint import restore
from cs336_alignment.training.checkpoint_folders import remove_leftovers
from cs336_alignment.training.checkpoint_writer import CheckpointWriter
from cs336_alignment.training.export import save_sidecars
from cs336_alignment.training.finish import Finish
from cs336_alignment.training.held_out import HeldOutEvaluation
from cs336_alignment.training.inputs import Inputs, load_inputs, plan_of, refuse_other_backends
from cs336_alignment.training.launch_check import (
    check_launch,
    meet,
    naming_lost_processes,
    refuse_lone_and_surplus_processes,
)
from cs336_alignment.training.manifest import build_manifest
from cs336_alignment.training.memory import device_memory, gib
from cs336_alignment.training.optimizer import allocate_state, build_optimizer
from cs336_alignment.training.parallel import (
    Processes,
    is_main_process_before_start,
    refuse_launcher_options,
)
from cs336_alignment.training.preflight import choose_cut, choose_precision, warm_up_compiled
from cs336_alignment.training.rehearsal import rehearse_memory, telling_out_of_memory
from cs336_alignment.training.report import describe_run, resume_command, say_goodbye
from cs336_alignment.training.run_folder import (
    ADAPTER,
    EXPORT,
    LEDGER,
    MANIFEST,
    METRICS,
    STATUS,
    Decision,
    RunFolder,
)
from cs336_alignment.training.run_model import RunModel
from cs336_alignment.training.snapshot import TrainState
from cs336_alignment.training.status import StatusFile
from cs336_alignment.training.step import Cut
from cs336_alignment.training.stop import StopNow, StopRequest
from cs336_alignment.training.trainer import Trainer
from cs336_alignment.training.watchdog import Watchdog

NO_TIME = "R304"  # the error of a run whose time limit is over before its first step


def train(
    config: Config,
    arguments: Sequence[str],
    *,
    verb: str = "train",
    processes: Processes | None = None,
) -> ExitStatus:
    """Train as the config says, or continue or finish what its folder holds.

    Args:
        config: checked.
        arguments: as typed after the verb, for the command that resumes.
        verb: what was typed.
        processes: of the larger whole that this run is a part of; None: it is none, and joins and
            leaves its own.

    Returns:
        DONE; or STOPPED or INTERRUPTED after a request to stop: what was trained is in a
        checkpoint. A part of a whole returns a request that came too late for it, too.

    Raises:
        UserError: as everywhere; `status.json` then holds it too.
    """
    console = Console(enabled=is_main_process_before_start())
    announce(config.hub, console.warn)
    outcome = _train(config, arguments, verb=verb, processes=processes)
    if outcome == ExitStatus.DONE and console.enabled:
        again = resume_command(arguments, verb)
        exports = RunFolder(config).exports(config.lora)
        push_run(exports, config.hub, again=again, note=console.note, warn=console.warn)
    return outcome


def _train(
    config: Config, arguments: Sequence[str], *, verb: str, processes: Processes | None
) -> ExitStatus:
    refuse_lone_and_surplus_processes()
    precision = refuse_launcher_options(config)
    refuse_other_backends(config.evaluation)
    is_main = is_main_process_before_start()
    folder, console = RunFolder(config), Console(enabled=is_main)
    if is_main:
        folder.claim()
    status = StatusFile(folder.path / STATUS, resume_command(arguments, verb), enabled=is_main)
    stop = StopRequest(config.trainer.max_hours, on_leave=status.ended, tell=is_main)
    try:
        with stop, status.covering(), naming_lost_processes():
            left = status.read()
            decision = folder.decide(
                config,
                completed=left.get("state") == "completed",
                saved_step=int(left.get("step", 0)),
            )
            if is_main and not decision.complete:
                status.running()
            # Before the processes wait for each other: one tokenizes, and that can take long.
            inputs = None if decision.complete else load_inputs(config, console)
            joined = processes or meet(config.parallel)
            try:
                decision = joined.agree(decision)
                if decision.complete:
                    return _nothing_to_do(folder, console)
                inputs = inputs or load_inputs(config, console)
                check_launch(joined, config, folder.path, inputs, precision, console.warn)
                run = _Run(config, folder, console, joined, decision, status, stop, inputs)
                outcome = run.to_the_end(precision)
            finally:
                console.stop()
                joined.release() if processes else joined.close()
            status.ended(outcome)
            if processes and outcome == ExitStatus.DONE:
                outcome = joined.agree(stop.status) or outcome
    except StopNow as request:
        console.note("stopped on request before the first step: there was nothing to save")
        return request.status
    finally:
        if status.has_ended:  # the page says how, so it comes after the status
            write_own_report(folder.path, console.warn)
    return outcome


def _no_time(max_hours: float | None) -> UserError:
    return UserError(
        NO_TIME,
        "the time was over before a step was taken: the same command would come no further",
        got=f"trainer.max_hours={max_hours:g}",
        hint="give it more, or evaluate less: trainer.eval_steps, evaluation.generation_steps",
    )


def _nothing_to_do(folder: RunFolder, console: Console) -> ExitStatus:
    exported = EXPORT if (folder.path / EXPORT).is_dir() else ADAPTER
    console.note(
        f"{folder.path} is complete: nothing to do. Its model is in {folder.path / exported}; a "
        "larger trainer.num_train_epochs or trainer.max_steps would continue it."
    )
    return ExitStatus.DONE


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
    inputs: Inputs

    def to_the_end(self, precision: str) -> ExitStatus:
        """Load the model, fail early where something is wrong, then train."""
        config, data, held_out = self.config, self.inputs.data.train, self.inputs.data.held_out
        if self.processes.device.type == "cpu":
            keep_freed_memory()
        dtype = choose_precision(precision, self.processes.device)
        source = RunModel(config, self.inputs, self.processes, self.console)
        source.refuse_too_large(dtype)
        policy, before = source.load(dtype)
        model = policy.model
        parts = [part for part in (data, held_out) if part is not None]
        longest = max(int(part.dataset.lengths.max()) for part in parts)
        check_fits(model, max(part.largest_token_id for part in parts), longest)
        if recompute := config.trainer.gradient_checkpointing:
            enable_checkpointing(model, selective=recompute == "selective")
        choice = choose_batching(
            policy, config.trainer.batching, longest, config.trainer.neftune_alpha
        )
        if config.trainer.compile:
            self.console.note("compiling the layers")
            warm_up_compiled(policy, choice.batching)
        cut = choose_cut(config.trainer, choice.batching)
        plan, steps = plan_of(config, self.inputs.data)
        for line in describe_run(
            config, policy, data, held_out, choice, plan, cut,
            num_processes=self.processes.count, total_steps=len(steps),
        ):  # fmt: skip
            self.console.note(line)
        return self._fit(policy, source, before, plan, cut, len(steps))

    def _fit(
        self, policy: Policy, source: RunModel, before: Mapping[str, int], plan: StepPlan, cut: Cut,
        total_steps: int,
    ) -> ExitStatus:  # fmt: skip
        config, tokenizer = self.config, self.inputs.tokenizer
        data = self.inputs.data.train
        optimizer = build_optimizer(policy.model, config.optimizer)
        allocate_state(optimizer)
        average = build_average(optimizer, config.trainer.ema_decay)
        state = self._resume(policy, optimizer, average, total_steps)
        steps = range(state.step, total_steps)
        rehearse_memory(policy, plan, cut, data.dataset, steps, self.processes, self.console.note)
        manifest = self._manifest(policy, state, total_steps)
        self.processes.wait()  # nobody reads the folder any more: the main process may write
        tracker = self._open_tracker(manifest, state)

        def sidecars(path: Path) -> None:
            self.folder.check_lock()
            save_sidecars(path, policy.model, tokenizer)

        writer = CheckpointWriter(
            self.folder.checkpoints, extra={"manifest": manifest},
            save_sidecars=sidecars, keep=config.trainer.save_total_limit,
            asynchronous=config.trainer.async_save, damaged=self.decision.damaged,
            team=self.processes.team(),
        )  # fmt: skip
        watchdog = Watchdog(
            self.folder.path, self.processes.index, config.trainer.watchdog_minutes,
            self.console.warn,
        )  # fmt: skip

        def poll() -> ExitStatus | None:
            watchdog.beat()
            return self.stop.status

        judge = Judge(
            Criterion.of(config.trainer), config.trainer.early_stopping_patience,
            comparable_since=manifest["evaluation_since_step"],
            patient_since=manifest["patient_since_step"],
            evaluations=lambda: tracker.evaluations,
            saved_steps=lambda: writer.saved_steps,
        )  # fmt: skip
        trainer = Trainer(
            policy, self.processes.wrap(policy), optimizer, data.dataset, plan=plan, cut=cut,
            total_steps=total_steps, state=state, trainer=config.trainer,
            optimizer_config=config.optimizer, seed=config.seed, processes=self.processes,
            tracker=tracker, writer=writer, poll=poll,
            evaluate=self._evaluation(
                policy, cut, state.step, total_steps, tracker, judge, poll, average.shown
            ), average=average,
        )  # fmt: skip
        self.console.start(total_steps, state.step)
        outcome, exported = ExitStatus.INTERNAL, state.step
        try:
            with average.shown():
                self._rehearse_saving(writer, policy, optimizer, total_steps - state.step)
            self.stop.wait_for_steps()
            with watchdog, telling_out_of_memory(self.processes.device):
                fitted = trainer.fit()
            if self.processes.agree(self.stop.out_of_time) and state.step == steps.start:
                raise _no_time(config.trainer.max_hours)
            if fitted == ExitStatus.DONE:
                manifest["stopped_early"] = state.step < total_steps
                finish = Finish(
                    config, self.folder, self.console, self.processes, self.stop, self.status,
                    tokenizer, self.inputs.data, policy, before,
                    whole=lambda gathered: source.in_full(policy.model, gathered),
                )  # fmt: skip
                tracker.draw(config.run_name or "")  # the card shows the curves
                with average.shown():
                    fitted, exported = finish(state, judge, manifest)
            outcome = fitted
        finally:
            tracker.finish(outcome, config.run_name or "")
        say_goodbye(
            self.console, self.folder.path, outcome, step=state.step, exported=exported,
            chosen_by=config.trainer.metric_for_best_model,
            generations=tracker.generations, command=self.status.command,
        )  # fmt: skip
        return outcome

    def _manifest(self, policy: Policy, state: TrainState, total_steps: int) -> dict[str, Any]:
        """Note what this part of the run is made of, and say what is not as in the part before."""
        config, data = self.config, self.inputs.data
        old = self.folder.earlier_part(self.decision.checkpoint)
        manifest = build_manifest(
            config, old=old, model=policy.model, tokenizer=self.inputs.tokenizer, train=data.train,
            held_out=data.held_out, num_processes=self.processes.count,
            precision=str(policy.compute_dtype or policy.model.dtype).removeprefix("torch."),
            step=state.step, reward_sha256=code_of(self.inputs.reward),
        )  # fmt: skip
        since = state.step if self.decision.more_steps else old.get("patient_since_step", 0)
        manifest["patient_since_step"] = since
        manifest["total_steps"] = total_steps
        if manifest["evaluation_since_step"] == state.step + 1:
            self.console.warn(
                "the evaluation data or options changed: results before this step do not compare"
            )
        for line in manifest["changes"].get(str(state.step), []):
            self.console.warn(f"{line}: the last digits of what follows may differ")
        return manifest

    def _resume(
        self, policy: Policy, optimizer: Optimizer, average: Average, total_steps: int
    ) -> TrainState:
        state, checkpoint = TrainState(), self.decision.checkpoint
        if checkpoint is not None:
            with average.shown():
                state = self.processes.on_each(lambda: restore(checkpoint, policy.model, optimizer))
            self.console.note(
                f"resuming   {checkpoint}: step {state.step} of {total_steps} is done"
            )
        if state.step > total_steps:
            raise UserError(
                "C303",
                "the run is already further than the new length",
                expected=f"at least {state.step} steps",
                got=f"{total_steps}",
                hint="raise trainer.max_steps or trainer.num_train_epochs",
            )
        for notice in self.decision.notices:
            self.console.warn(notice)
        return state

    def _rehearse_saving(
        self, writer: CheckpointWriter, policy: Policy, optimizer: Optimizer, steps: int
    ) -> None:
        every = self.config.trainer.save_steps

        def rehearse() -> None:
            saves = 2 + (steps // every if every else 0)  # the last one and the export
            keeps_best = self.config.trainer.metric_for_best_model is not None
            warning = writer.rehearse(policy.model, optimizer, saves, keeps_best=keeps_best)
            if warning is not None:
                self.console.warn(warning)

        if steps and writer.team is not None:
            rehearse()
        elif steps:
            self.processes.on_main(rehearse)

    def _evaluation(
        self,
        policy: Policy,
        cut: Cut,
        first_step: int,
        total_steps: int,
        tracker: RunTracker,
        judge: Judge,
        poll: Callable[[], ExitStatus | None],
        shown: Callable[[], AbstractContextManager[None]],
    ) -> Callable[[int], Verdict]:
        """Make the function that the loop calls at every step and that knows when it is due."""
        generation_steps = self.config.evaluation.generation_steps
        held_out, tokenizer = self.inputs.data.held_out, self.inputs.tokenizer
        if held_out is None:
            if self.config.trainer.eval_steps or generation_steps is not None:
                self.console.warn(
                    "there is no evaluation data (data.eval_path, data.eval_fraction)"
                )
            return lambda _: Verdict()
        evaluator = Evaluator(
            policy, tokenizer, held_out.dataset, held_out.ground_truths,
            config=self.config.evaluation, processes=self.processes,
            microbatch_tokens=cut.microbatch_tokens or DEFAULT_MICROBATCH_TOKENS,
            batching=cut.batching, seed=self.config.seed, progress=self.console.progress,
            reward=self.inputs.reward, choices=held_out.choices,
            groups=held_out.groups, asked=poll, warn=self.console.warn,
        )  # fmt: skip
        if generation_steps is not None and self.processes.shards:
            dtype = policy.compute_dtype or policy.model.dtype
            size = policy.model.num_parameters() * dtype.itemsize
            found = device_memory(self.processes.device, self.processes.local_count)
            text = f"while it generates each process holds the whole model, {gib(size)}"
            way = "evaluation.generation_steps=null, and `cs336-sft evaluate` on model/ later"
            if found is not None and size > found.total:
                raise UserError("R313", text, got=f"{gib(found.total)} for each", hint=way)
            self.console.note(f"{text}; without that: {way}")
        if generation_steps is not None:
            lines = evaluator.check(policy.model, held_out.template)
            for line in (*lines, *doubtful_sampling(self.config.evaluation)):
                self.console.warn(line)
        return HeldOutEvaluation(
            evaluator, self.config.trainer, generation_steps, first_step=first_step,
            total_steps=total_steps, tracker=tracker, judge=judge, processes=self.processes,
            console=self.console, shown=shown,
        )  # fmt: skip

    def _open_tracker(self, manifest: dict[str, Any], state: TrainState) -> RunTracker:
        config, folder = self.config, self.folder
        if not self.processes.is_main:
            return RunTracker(self.console, None, NullLogger(), folder.path)
        remove_leftovers(folder.checkpoints)
        folder.write_json(MANIFEST, manifest)  # first: a new length is new until both are there
        folder.write_config(config)
        folder.write_json(LEDGER, ledger_json(self.inputs.data))
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
