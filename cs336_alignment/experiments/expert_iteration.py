"""`cs336-sft expert-iteration`: sample, verify, train on what is correct, and again with the model
that came out of it.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cs336_alignment.config import (
    ColumnsConfig,
    Config,
    ModelConfig,
    SourceConfig,
)
from cs336_alignment.config_clashes import clash
from cs336_alignment.data.splits import ledger_json, prepare_run
from cs336_alignment.errors import ExitStatus, UserError, UserErrors
from cs336_alignment.evaluation.verify import verifying
from cs336_alignment.experiments.expert_summary import choose_iteration, show_summary
from cs336_alignment.experiments.samples import ROWS, Sampler
from cs336_alignment.files import flush_tree, sha256_of
from cs336_alignment.model.loading import open_model
from cs336_alignment.tracking.console import Console
from cs336_alignment.training.earlier_config import (
    FREE,
    FREE_SECTIONS,
    LENGTH,
    NOTICED,
    refuse_changes,
)
from cs336_alignment.training.manifest import git_commit, versions
from cs336_alignment.training.parallel import (
    Processes,
    is_main_process_before_start,
    join,
    refuse_launcher_options,
    refuse_sharding,
)
from cs336_alignment.training.report import ledger_line, resume_command
from cs336_alignment.training.run import NO_TIME, train
from cs336_alignment.training.run_folder import (
    CONFIG,
    EXPORT,
    LEDGER,
    MANIFEST,
    STATUS,
    RunFolder,
)
from cs336_alignment.training.status import StatusFile
from cs336_alignment.training.stop import StopNow, StopRequest

VERB = "expert-iteration"
# Of the evaluation, what decides which responses are sampled and kept.
SAMPLED_BY = frozenset(
    f"evaluation.{name}" for name in ("max_new_tokens", "min_new_tokens", "stop", "reward")
)


def expert_iteration(config: Config, arguments: Sequence[str]) -> ExitStatus:
    """Run the iterations, each a run of its own in `<output_root>/<run_name>/iteration-01/` and so
    on, or continue them where they stopped.

    Args:
        config: checked.
        arguments: as typed after the verb, for the command that continues.

    Returns:
        DONE; or STOPPED or INTERRUPTED after a request to stop.

    Raises:
        UserError: an option changed (78), nothing to train on (65), and as everywhere.
    """
    _refuse_combinations(config)
    precision = refuse_launcher_options(config)
    refuse_sharding(config.parallel, VERB)
    is_main = is_main_process_before_start()
    folder, console = RunFolder(config), Console(enabled=is_main)
    if is_main:
        folder.claim("an expert iteration")
    status = StatusFile(folder.path / STATUS, resume_command(arguments, VERB), enabled=is_main)
    stop = StopRequest(config.trainer.max_hours, on_leave=status.ended, tell=is_main)
    try:
        with stop, status.covering():
            refuse_other_iterations(folder.path, config)
            if _is_complete(folder, config, status.read()):
                console.note(
                    f"{folder.path} is complete: nothing to do. Its model is in "
                    f"{folder.path / EXPORT}; a larger expert_iteration.iterations would continue."
                )
                return ExitStatus.DONE
            processes = join(config.parallel)
            try:
                whole = _Whole(config, folder, console, processes, status, stop, arguments)
                outcome = whole.to_the_end(precision)
            finally:
                console.stop()
                processes.close()
            status.ended(outcome)
    except StopNow as request:
        console.note(f"stopped; what is done is in {folder.path}: the same command goes on")
        return request.status
    return outcome


@dataclasses.dataclass
class _Whole:
    config: Config
    folder: RunFolder
    console: Console
    processes: Processes
    status: StatusFile
    stop: StopRequest
    arguments: Sequence[str]

    def to_the_end(self, precision: str) -> ExitStatus:
        """Take the iterations one after another, then say what they came to."""
        config, begin = self.config, time.monotonic()
        model = config.model
        _, tokenizer = open_model(model)
        with verifying(config.evaluation) as verify:
            prepared = prepare_run(
                config.data, tokenizer, seed=config.seed, progress=self.console.progress,
                note=self.console.note, verify=verify,
            )  # fmt: skip
        data = prepared.train
        for ledger in data.ledgers:
            self.console.note(f"{'questions':<10} {ledger_line(ledger)}")
        for line in prepared.warnings:
            self.console.warn(line)
        if data.mixture is not None:
            self.console.warn("questions are drawn evenly: the weights of data.sources do not hold")
        sampler = Sampler(
            config, data, tokenizer, precision=precision, processes=self.processes,
            console=self.console, asked=lambda: self.stop.status,
        )  # fmt: skip
        lacking = len(data.dataset) - len(sampler.gradable)
        if not len(sampler.gradable):
            raise _no_truths(config)
        if lacking:
            self.console.warn(f"{lacking:,} rows have no ground truth: they are not asked")
        manifest = {
            "versions": versions(),
            "git_commit": git_commit(),
            "data_sha256": data.fingerprint,
            "num_processes": self.processes.count,
        }
        self.processes.on_main(lambda: self._begin(manifest, ledger_json(prepared)))
        for number in range(1, config.expert_iteration.iterations + 1):
            self.console.note(f"\niteration {number} of {config.expert_iteration.iterations}")
            part = folder_of(self.folder.path, number)
            sampled = sampler(number, model, part, is_trained=_has_trained(part))
            run = config_of_iteration(config, number, model)
            run.trainer.max_hours = self._hours_left(begin)
            try:
                outcome = train(run, self.arguments, verb=VERB, processes=self.processes)
            except UserError as error:
                if error.code != NO_TIME or not sampled:
                    raise
                outcome = ExitStatus.STOPPED  # the time went into samples, and these are kept
            if outcome != ExitStatus.DONE:
                return outcome
            self.processes.on_main(lambda done=number: self.status.running(done))  # type: ignore[misc]
            model = replace(run_model(part), freeze=config.model.freeze)
        self.processes.on_main(lambda: self._end(manifest))
        return ExitStatus.DONE

    def _hours_left(self, begin: float) -> float | None:
        hours = self.config.trainer.max_hours
        if hours is None:
            return None
        left = hours - (time.monotonic() - begin) / 3600
        if self.processes.agree(left <= 0):
            raise StopNow(ExitStatus.STOPPED)
        return max(left, 1e-6)

    def _begin(self, manifest: dict[str, Any], ledger: dict[str, Any]) -> None:
        folder = self.folder
        if _trained(folder.path):
            old = folder.earlier_manifest()
            if old.get("data_sha256", manifest["data_sha256"]) != manifest["data_sha256"]:
                raise UserError(
                    "C302",
                    "the training data differs from what these iterations were started with",
                    expected=f"data_sha256 {str(old['data_sha256'])[:16]}",
                    got=str(manifest["data_sha256"])[:16],
                    hint=f"to start another: run_name={self.config.run_name}-2",
                )
        folder.write_json(MANIFEST, manifest)
        folder.write_json(LEDGER, ledger)
        folder.write_config(self.config)
        self.status.running()

    def _end(self, manifest: dict[str, Any]) -> None:
        """Show the summary and put the model of the chosen iteration where a run has it."""
        self.folder.check_lock()
        parts = [
            folder_of(self.folder.path, number)
            for number in range(1, self.config.expert_iteration.iterations + 1)
        ]
        metric = self.config.expert_iteration.metric_for_best_model
        chosen, value = choose_iteration(parts, metric)
        if metric is not None and value is None:
            self.console.warn(f"no iteration has a {metric} to choose by: the last one is taken")
        target = self.folder.path / EXPORT
        copy_whole(parts[chosen - 1] / EXPORT, target)
        weights = {path.name: sha256_of(path) for path in sorted(target.glob("*.safetensors"))}
        more = {"export": weights, "export_iteration": chosen}
        if metric is not None:
            more["best"] = {"metric": metric, "iteration": chosen, "value": value}
        self.folder.write_json(MANIFEST, {**manifest, **more})
        show_summary(self.folder.path, parts, chosen, self.console)
        self.console.note(f"model    {target}  (of iteration {chosen})")


def folder_of(whole: Path, number: int) -> Path:
    """Give the folder of an iteration, a run of its own."""
    return whole / f"iteration-{number:02d}"


def run_model(part: Path) -> ModelConfig:
    """Name the model that an iteration ended with."""
    return ModelConfig(name_or_path=str(part / EXPORT))


def config_of_iteration(config: Config, number: int, model: ModelConfig) -> Config:
    """Make the config of an iteration's run: the command's, on the rows that were kept.

    Args:
        config: of the command.
        number: of the iteration, from 1.
        model: that it starts from.
    """
    whole = Path(config.output_root).expanduser() / (config.run_name or "")
    part = folder_of(whole, number)
    # What the command's columns are called says nothing about these rows, but all about the
    # evaluation data, which are read as the command says.
    columns = dict.fromkeys(asdict(ColumnsConfig()), "")
    columns |= {name: name for name in ("prompt", "response", "ground_truth")}
    rows = SourceConfig(str(part / ROWS), None, "prompt_response", ColumnsConfig(**columns))
    evaluation = config.evaluation
    if config.data.eval_path is not None and evaluation.generation_steps is None:
        evaluation = replace(evaluation, generation_steps=0)
    return replace(
        config,
        model=model,
        data=replace(
            config.data, train_path=rows.path, sources=[rows], max_train_examples=None,
            filter="none",
        ),
        trainer=replace(config.trainer, resume="auto"),
        evaluation=evaluation,
        logger=replace(config.logger, group=config.logger.group or config.run_name),
        output_root=str(whole),
        run_name=part.name,
    )  # fmt: skip


def copy_whole(source: Path, target: Path) -> None:
    """Copy a folder so that readers see all of it or what was there before."""
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    flush_tree(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def refuse_other_iterations(folder: Path, config: Config) -> None:
    """Refuse a command that would change what the iterations in a folder were made with.

    Raises:
        UserError: a key differs that changes them (78); `resume=never` on a folder that holds some
            (73).
    """
    path = folder / CONFIG
    if not path.is_file():
        return
    if config.trainer.resume == "never":
        raise UserError(
            "R103",
            f"{folder} holds iterations, and trainer.resume=never",
            hint="choose another run_name=…, or leave trainer.resume=auto to continue them",
        )
    if not _trained(folder):  # nothing that another config could spoil
        return
    iterations, done = config.expert_iteration.iterations, _trained(folder)
    if iterations < done:
        raise UserError(
            "C303",
            "there are more iterations already than are asked for",
            expected=f"expert_iteration.iterations of at least {done}",
            got=f"{iterations}",
        )
    refuse_changes(path, config, lambda key: _may_change(key, config), "iterations")


def _may_change(key: str, config: Config) -> bool:
    """Whether a key leaves rows and weights as they are, but for the order of sums."""
    if key in ("run_name", "output_root"):
        return False  # an iteration's config names its rows and its model by their paths
    if key in ("expert_iteration.iterations", "expert_iteration.metric_for_best_model"):
        return True
    if key.startswith("expert_iteration.") or key in SAMPLED_BY:
        return False
    if config.trainer.metric_for_best_model is not None and (
        key.startswith("evaluation.") or key.startswith("data.eval") or "eval" in key
    ):
        return False  # the evaluation chooses the step that the next iteration starts from
    if key in ("trainer.metric_for_best_model", "trainer.greater_is_better"):
        return False
    rounding = NOTICED - LENGTH - {"trainer.early_stopping_patience"}
    return key in FREE or key in rounding or key.startswith(FREE_SECTIONS)


def _refuse_combinations(config: Config) -> None:
    errors = []
    data, best = config.data, config.expert_iteration.metric_for_best_model
    if config.model.random_init:
        errors.append(
            clash("model.random_init", VERB, "random weights answer nothing: train a model first")
        )
    if config.model.new_tokens:
        errors.append(
            clash("model.new_tokens", VERB, "no answer would hold them: train a model first")
        )
    if config.lora.adapter_path is not None:
        errors.append(
            clash("lora.adapter_path", VERB, "give the adapter's folder as model.name_or_path, and "
                  "lora.r for new adapters")
        )  # fmt: skip
    if config.lora.export == "adapter":
        errors.append(
            clash("lora.export=adapter", VERB, "an iteration samples from the merged model of the "
                  "one before: lora.export=both")
        )  # fmt: skip
    if data.eval_fraction:
        errors.append(
            clash("data.eval_fraction", VERB, "every iteration has rows of its own: give "
                  "data.eval_path")
        )  # fmt: skip
    if config.evaluation.backend != "transformers":
        errors.append(
            clash("evaluation.backend", VERB, "the weights change from iteration to iteration, and "
                  "those of another backend do not: evaluation.backend=transformers")
        )  # fmt: skip
    if config.trainer.resume not in ("auto", "never"):
        errors.append(
            clash("trainer.resume=PATH", VERB, "give the checkpoint as model.name_or_path=PATH")
        )
    if best is not None and data.eval_path is None:
        errors.append(
            clash("expert_iteration.metric_for_best_model", "data.eval_path=null", "without "
                  "evaluation data no iteration is known to be the best")
        )  # fmt: skip
    if errors:
        raise UserErrors(errors)


def _is_complete(folder: RunFolder, config: Config, left: dict[str, Any]) -> bool:
    options = config.expert_iteration
    if left.get("state") != "completed" or left.get("step") != options.iterations:
        return False
    chosen_by = (folder.earlier_manifest().get("best") or {}).get("metric")
    export = folder.path / EXPORT
    return chosen_by == options.metric_for_best_model and folder.damage(export) is None


def _trained(folder: Path) -> int:
    """Count the iterations in which steps were taken."""
    return sum(_has_trained(part) for part in folder.glob("iteration-*"))


def _has_trained(part: Path) -> bool:
    return (part / EXPORT).is_dir() or any((part / "checkpoints").glob("step-*"))


def _no_truths(config: Config) -> UserError:
    return UserError(
        "D342",
        f"no row of {config.data.train_path} has a ground truth, so no response can be verified",
        hint="name the column: data.columns.ground_truth=answer, say",
    )
