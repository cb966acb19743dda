"""Checkpoints on the spot, or in a thread of their own while training goes on."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cs336_alignment.errors import UserError
from cs336_alignment.files import free_mib, telling
from cs336_alignment.training.checkpoint import save_checkpoint
from cs336_alignment.training.checkpoint_folders import (
    TEMPORARY,
    folder_of,
    list_checkpoints,
    mark_latest,
    saved_steps,
    verify,
)
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.snapshot import Snapshot, TrainState


@dataclass
class CheckpointWriter:
    """Writes a run's checkpoints, one at a time; only the main process has something to write, or
    each of a team its part.

    Args:
        checkpoints: the run's folder of them.
        extra: goes into `trainer_state.json`.
        save_sidecars: writes config and tokenizer into a checkpoint.
        keep: checkpoints that stay.
        asynchronous: copy the tensors, which takes their size in memory once more, and write the
            copy in a thread.
        damaged: checkpoints that go once one is written.
        team: processes that hold a part of the model each, with a group of their own; all of them
            then rehearse, begin and finish.
    """

    checkpoints: Path
    _: KW_ONLY
    extra: Mapping[str, Any]
    save_sidecars: Callable[[Path], None]
    keep: int
    asynchronous: bool
    damaged: Collection[Path] = ()
    team: Processes | None = None

    def __post_init__(self) -> None:
        self._copy: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._seconds = 0.0
        self._best: int | None = None

    def rehearse(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        saves: int,
        *,
        keeps_best: bool = False,
    ) -> str | None:
        """Write and verify a checkpoint of one tensor, before hours are spent on what cannot be
        kept.

        Args:
            module: to be saved later.
            optimizer: of the module, its state allocated.
            saves: how many checkpoints are still to come, the export among them.
            keeps_best: whether the best one stays besides.

        Returns:
            A warning where the disk will not hold all that are to be kept at once, else None.

        Raises:
            UserError: a checkpoint cannot be written, or there is no room for one (74).
        """
        team = self.team
        whole = Snapshot.of(TrainState(), module, optimizer, 0 if team is None else team.index)
        folder = self.checkpoints / f"{TEMPORARY}rehearsal"
        smallest = sorted(whole.weights.items(), key=lambda item: item[1].numel())[:1]
        leads = team is None or team.is_main
        if leads:
            shutil.rmtree(folder, ignore_errors=True)

        def check() -> None:
            if (reason := verify(written)) is not None:
                raise UserError(
                    "R210",
                    f"what is written to {self.checkpoints} does not read back: {reason}",
                    hint="the disk or its driver is failing; choose another output_root=…",
                )

        on_main = team.on_main if team is not None else lambda work: work()
        try:
            written = save_checkpoint(
                folder, Snapshot(whole.state, dict(smallest), {}), extra=self.extra,
                save_sidecars=self.save_sidecars, keep=1, team=team,
            )  # fmt: skip
            on_main(check)
        finally:
            if leads:
                shutil.rmtree(folder, ignore_errors=True)
        if self.asynchronous:  # the copy's memory is asked for now, too
            self._copy = whole.copied(None)
        size = whole.bytes if team is None else sum(team.gather(whole.bytes))
        free, needed = free_mib(self.checkpoints), size / 2**20

        def refuse_no_room() -> None:
            if free < needed:
                raise UserError(
                    "R206",
                    f"there is no room for a checkpoint in {self.checkpoints}",
                    expected=f"{needed:,.1f} MiB",
                    got=f"{free:,.1f} MiB free",
                    hint="make room, or choose an output_root=… on another disk",
                )

        on_main(refuse_no_room)
        # The new one is whole before the oldest goes.
        most = min(saves, self.keep + keeps_best + 1 - len(list_checkpoints(self.checkpoints)))
        if free < most * needed:
            return (
                f"{free:,.0f} MiB are free, and the checkpoints to come may take "
                f"{most * needed:,.0f} MiB at once: make room, or lower trainer.save_total_limit"
            )
        return None

    def begin(self, state: TrainState, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint of this moment, or begin to; `finish` must have been called for the
        one before.
        """
        start = time.perf_counter()
        index = 0 if self.team is None else self.team.index
        snapshot = Snapshot.of(state, module, optimizer, index)
        if not self.asynchronous:
            self._write(snapshot, start)
            return
        snapshot = self._copy = snapshot.copied(self._copy)
        self._thread = threading.Thread(
            target=self._write, args=(snapshot, start), name=f"checkpoint of step {state.step}"
        )
        self._thread.start()

    def _write(self, snapshot: Snapshot, start: float) -> None:
        try:
            save_checkpoint(
                self.checkpoints, snapshot,
                extra=self.extra, save_sidecars=self.save_sidecars, keep=self.keep,
                damaged=self.damaged, best=self._best, team=self.team,
            )  # fmt: skip
            self.damaged = ()
        except BaseException as failure:
            self._failure = failure
        self._seconds = time.perf_counter() - start

    def mark_best(self, best: int, latest: int) -> None:
        """Keep the checkpoint of the best step from now on, whatever its age; `finish` must have
        been called. `latest` is the newest step that has one.

        Raises:
            UserError: the disk is full or failing (74); the checkpoints are intact.
        """
        self._best = best
        hint = "make room and run the same command again; the checkpoints are intact"
        with telling("R211", f"cannot write to {self.checkpoints}", hint):
            mark_latest(self.checkpoints, latest, best=best, keep=self.keep)

    @property
    def saved_steps(self) -> set[int]:
        """The steps that have a checkpoint which, for all that is known, is whole."""
        damaged = {path.name for path in self.damaged}
        steps = saved_steps(self.checkpoints)
        return {step for step in steps if folder_of(self.checkpoints, step).name not in damaged}

    @property
    def has_ended(self) -> bool:
        """Whether the thread is done and `finish` has not been called for it."""
        return self._thread is not None and not self._thread.is_alive()

    def finish(self) -> float:
        """Wait for the checkpoint that was begun; returns the seconds that it took.

        Raises:
            UserError: the disk is full or failing (74); the checkpoints before are intact.
        """
        if self._thread is not None:
            self._thread.join()
        self._thread, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise failure
        return self._seconds
