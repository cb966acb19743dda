"""The end of a run that was trained: choose the step, export it, and check what was exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.config import Config
from cs336_alignment.data.splits import RunData
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.files import sha256_of
from cs336_alignment.model.adapters import is_adapted
from cs336_alignment.model.compile import in_eager
from cs336_alignment.model.lora import merge_adapter
from cs336_alignment.model.policy import Policy
from cs336_alignment.sharing.card import CURVES, Card
from cs336_alignment.tracking.console import Console
from cs336_alignment.training import reload_child
from cs336_alignment.training.best import Judge, Score
from cs336_alignment.training.checkpoint import restore_weights
from cs336_alignment.training.checkpoint_folders import folder_of, verify
from cs336_alignment.training.export import export_model
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.reload_check import LIMIT_SECONDS, ReloadResult, check_export
from cs336_alignment.training.run_folder import MANIFEST, RunFolder
from cs336_alignment.training.shards import whole_tensors
from cs336_alignment.training.snapshot import TrainState, module_tensors
from cs336_alignment.training.status import StatusFile
from cs336_alignment.training.stop import StopRequest


@dataclass
class Finish:
    """What the end needs of a run. A kill anywhere in it costs nothing: the same command, with all
    steps done, comes here again.

    Attributes:
        config: of the run.
        folder: of the run.
        console: of this process.
        processes: all of them come here.
        stop: asked while the export is checked.
        status: takes the outcome of the check.
        tokenizer: as trained with.
        data: trained and evaluated on.
        policy: as trained, not wrapped.
        base: see `bit_sums`; empty off the main process.
        whole: gives the trained model, its frozen weights as they are in the base model; is given
            what was gathered of a sharded one.
    """

    config: Config
    folder: RunFolder
    console: Console
    processes: Processes
    stop: StopRequest
    status: StatusFile
    tokenizer: PreTrainedTokenizerBase
    data: RunData
    policy: Policy
    base: Mapping[str, int]
    whole: Callable[[Mapping[str, Tensor] | None], PreTrainedModel]

    def __call__(
        self, state: TrainState, judge: Judge, manifest: Mapping[str, Any]
    ) -> tuple[ExitStatus, int]:
        """Do it all.

        Args:
            state: at the last step.
            judge: chooses the step.
            manifest: to which is added what was exported.

        Returns:
            DONE, or the status of a request to stop that came during the check; and the step that
            was exported.

        Raises:
            UserError: the disk refuses (74); the export is not what was trained (70).
        """

        model, noted = self.policy.model, dict(manifest)
        weights: dict[str, Tensor] | None = None
        choose = partial(self._choose, state, judge)
        score: Score | None = self.processes.agree(self.processes.on_main(choose))
        if score is not None and score.step != state.step:
            folder = folder_of(self.folder.checkpoints, score.step)
            state = self.processes.on_each(partial(restore_weights, folder, self.policy.model))
        if self.processes.shards:  # a tensor at a time, all of them in main's memory
            tensors = whole_tensors(module_tensors(self.policy.model).items())
            keep = self.processes.is_main
            weights = {name: tensor.cpu() for name, tensor in tensors if keep}
        sharded, incomplete = self.processes.shards, is_adapted(model)
        for key, target in self.folder.exports(self.config.lora).items():
            if incomplete and (key == "export" or not sharded):  # no base for adapters alone
                model = self.processes.on_main(partial(self.whole, weights)) or model
                weights = None
                sharded = incomplete = False
            export = partial(self._export, model, key, target, state, score, judge, noted, weights)
            self.processes.on_main(export)
            if (outcome := self._check(model, target, state, sharded)) != ExitStatus.DONE:
                return outcome, state.step
        return ExitStatus.DONE, state.step

    def _choose(self, state: TrainState, judge: Judge) -> Score | None:
        """Find the best step whose weights are there, if one is to be chosen."""
        metric = self.config.trainer.metric_for_best_model
        for score in judge.choices(state.step):
            folder = folder_of(self.folder.checkpoints, score.step)
            if score.step != state.step and (reason := verify(folder)) is not None:
                self.console.warn(
                    f"{folder} has the best {metric} and is damaged ({reason}): the next best is "
                    "exported"
                )
                continue
            self.console.note(
                f"exporting step {score.step} of {state.step}: the best {metric}, {score.value:.4f}"
            )
            return score
        if metric is not None:
            self.console.warn(f"no step has a {metric} to choose by: the last one is exported")
        return None

    def _export(
        self,
        model: PreTrainedModel,
        key: str,
        target: Path,
        state: TrainState,
        score: Score | None,
        judge: Judge,
        manifest: dict[str, Any],
        weights: dict[str, Tensor] | None,
    ) -> None:
        metric, best, why = self.config.trainer.metric_for_best_model, None, None
        if metric is not None:
            best = {
                "metric": metric,
                "greater_is_better": judge.criterion is not None and judge.criterion.greater,
                "step": None if score is None else score.step,
                "value": None if score is None else score.value,
            }
        if score is not None:
            why = f"the best {metric}: {score.value:.4f}"
        if is_adapted(model) and key == "export":
            merge_adapter(model)
        run, adapter = self.folder.path, is_adapted(model)
        template, trained = self.data.train.template, state.response_tokens_seen
        card = Card(
            self.config, run, state.step, why, trained, template, target.name, adapter=adapter
        )
        export_model(target, model, self.tokenizer, str(card), [run / CURVES], weights=weights)
        hashes = {path.name: sha256_of(path) for path in target.glob("*.safetensors")}
        manifest |= {key: hashes, "export_step": state.step, "best": best}
        self.folder.write_json(MANIFEST, manifest)

    def _check(
        self, model: PreTrainedModel, target: Path, state: TrainState, sharded: bool
    ) -> ExitStatus:
        """Load the export in a fresh process and compare."""
        if not self.config.trainer.reload_check:
            return ExitStatus.DONE
        result: ReloadResult | None = None
        checksums = None
        if sharded:
            tensors = whole_tensors(self.policy.model.state_dict().items())
            checksums = reload_child.checksums(tensors)
        if self.processes.is_main:
            self.console.note(f"loading {target} in a fresh process")
            with in_eager():
                result = self._compare(model, target, state, checksums)
        result, asked = self.processes.agree((result, self.stop.status))
        assert result is not None
        if result.outcome == "stopped":
            return ExitStatus(asked)
        self.status.reload_check = str(result)
        for warning in result.warnings:
            self.console.warn(warning)
        self.console.note(f"reload check {result}")

        def refuse() -> None:
            if result.outcome == "failed":
                raise UserError(
                    "R305",
                    f"{target} is not the model that was trained",
                    got="; ".join(result.reasons),
                    hint="the checkpoints are intact; the same command exports and checks again",
                )

        self.processes.on_main(refuse)
        return ExitStatus.DONE

    def _compare(
        self,
        model: PreTrainedModel,
        target: Path,
        state: TrainState,
        checksums: Mapping[str, list[Any]] | None,
    ) -> ReloadResult:
        config, template = self.config, self.data.train.template
        # A moving average may still round to where it began.
        still = config.optimizer.learning_rate == 0 or config.trainer.ema_decay is not None
        still = still or state.skipped_steps >= state.step
        limit = LIMIT_SECONDS
        if self.processes.count > 1:  # the others wait in a collective that has a limit, too
            limit = min(limit, 30 * config.parallel.timeout_minutes)
        return check_export(
            target,
            model,
            self.tokenizer,
            (self.data.held_out or self.data.train).dataset,
            base={} if still else self.base,
            texts=[] if template is None else [template.text],
            trust_remote_code=config.model.trust_remote_code,
            limit_seconds=limit,
            # The time limit ended the steps; a check of seconds would only be put off.
            asked=lambda: self.stop.status is not None and not self.stop.out_of_time,
            checksums=checksums,
        )
