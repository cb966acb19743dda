"""The folder of a run: who holds it, how far it came, and whether a command may continue it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from cs336_alignment.config import Config, LoraConfig
from cs336_alignment.errors import Place, UserError
from cs336_alignment.files import sha256_of, telling, write_json, write_text
from cs336_alignment.training.best import Criterion
from cs336_alignment.training.checkpoint_folders import STATE, find_latest, list_checkpoints, verify
from cs336_alignment.training.earlier_config import compare, read_config, unreadable

CONFIG = "config.yaml"
STATUS = "status.json"
MANIFEST = "manifest.json"
LEDGER = "data_ledger.json"
METRICS = "metrics.jsonl"
EXPORT = "model"
ADAPTER = "adapter"
LOCK = "run.lock"

# What a folder holds, by what nothing else leaves there.
KINDS = {"a run": METRICS, "an expert iteration": "iteration-01", "a sweep": "study.db"}


@dataclass(frozen=True)
class Decision:
    """What a command finds in its folder.

    Attributes:
        complete: nothing is left to do.
        checkpoint: where training continues; None: from the start.
        notices: lines to show before training.
        damaged: checkpoints later than that one, which go once another one is saved.
        more_steps: a run that had ended early was given another length.
    """

    complete: bool = False
    checkpoint: Path | None = None
    notices: tuple[str, ...] = ()
    damaged: tuple[Path, ...] = ()
    more_steps: bool = False


class RunFolder:
    """One run's folder. Only the main process writes.

    Args:
        config: of the run; the folder is `output_root/run_name`.
    """

    def __init__(self, config: Config) -> None:
        assert config.run_name is not None
        self.path = Path(config.output_root).expanduser() / config.run_name
        self.checkpoints = self.path / "checkpoints"
        self._lock: IO[str] | None = None

    def claim(self, kind: str = "a run") -> None:
        """Create the folder and lock it for the life of this process.

        Args:
            kind: of `KINDS`, what it is to hold.

        Raises:
            UserError: it cannot be created or written, is a link, holds something of another kind,
                or another process holds it (73).
        """
        for other, name in KINDS.items():
            if other != kind and (self.path / name).exists():
                raise UserError(
                    "R106",
                    f"{self.path} holds {other}, and this would be {kind}: it would be overwritten",
                    hint="choose another run_name=…",
                )
        hint = "choose another output_root=… or run_name=…"
        with telling("R101", f"cannot write to the run folder {self.path}", hint):
            self.path.mkdir(parents=True, exist_ok=True)
            if self.path.is_symlink():
                raise OSError(0, "it is a symbolic link")
            self._lock = (self.path / LOCK).open("a+", encoding="utf-8")
        hint = "choose an output_root=… on another file system"  # this one may have no locks
        with telling("R101", f"cannot lock the run folder {self.path}", hint):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as failure:
                self._lock.seek(0)
                raise UserError(
                    "R102",
                    f"another process is running in {self.path}",
                    got=self._lock.read().strip() or None,
                    hint="wait for it, or choose another run_name=…",
                ) from failure
        # A child that outlives this process must not go on holding the lock.
        os.register_at_fork(after_in_child=self._lock.close)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the name
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._lock.flush()

    def check_lock(self) -> None:
        """See that the folder is still this process's, before something is written into it.

        Raises:
            UserError: the lock's file was taken away, so another process may write here, too (73).
        """
        assert self._lock is not None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat((self.path / LOCK).stat(), os.fstat(self._lock.fileno())):
                return
        raise UserError(
            "R102",
            f"{self.path / LOCK} was deleted or replaced while this run went on",
            hint="another process may be running there; when none is, the same command goes on",
        )

    def decide(self, config: Config, *, completed: bool, saved_step: int = 0) -> Decision:
        """Read the folder and say whether this command starts, continues or has nothing to do.

        Args:
            config: of the command.
            completed: whether the run in the folder came to its end.
            saved_step: steps that a checkpoint of the run held, by its own word.

        Raises:
            UserError: `resume=never` on a folder that holds a run (73); a changed key (78);
                checkpoints of which none verifies (74).
        """
        path, named = self.path / CONFIG, None
        old = read_config(path) if path.is_file() or list_checkpoints(self.checkpoints) else None
        if config.trainer.resume not in ("auto", "never"):
            named = Path(config.trainer.resume).expanduser()
            if not named.is_dir():
                raise UserError(
                    "R202",
                    f"there is no checkpoint {named}",
                    hint="trainer.resume=outputs/NAME/checkpoints/step-000100",
                )
        if old is None:
            return Decision() if named is None else self._from_named(named)
        if config.trainer.resume == "never":
            raise UserError(
                "R103",
                f"{self.path} holds a run, and trainer.resume=never",
                hint="choose another run_name=…, or leave trainer.resume=auto to continue it",
            )
        checkpoint, skipped = find_latest(self.checkpoints)
        exported = any((self.path / name).is_dir() for name in (EXPORT, ADAPTER))
        if checkpoint is None and not skipped and not saved_step and not exported:
            # Nothing was trained that another config could spoil.
            return Decision() if named is None else self._from_named(named)
        notices, lengthened = compare(old, config, Place(path))
        ended_early = completed and bool(self.earlier_manifest().get("stopped_early"))
        patient = old.get("trainer.early_stopping_patience")
        goes_on = lengthened or (ended_early and _is_more(patient, config))
        if completed and not goes_on:
            exports = self.exports(config.lora).items()
            damage = [self.damage(folder, key) for key, folder in exports]
            reason = next(filter(None, damage), None) or self._other_choice(config)
            if reason is None:
                return Decision(complete=True)
            notices.append(f"the model is written once more: {reason}")
        if checkpoint is None:
            raise UserError(
                "R201",
                f"no checkpoint in {self.checkpoints} is whole",
                got="; ".join(skipped.values()) or f"none, and step {saved_step} was reached",
                hint="restore one from a copy, or start anew with another run_name=…",
            )
        if named is not None and named.resolve() != checkpoint.resolve():
            self._refuse_going_back(named, checkpoint, config)
            notices.append(f"trainer.resume={named} was where this run began; it is further now")
        notices += [
            f"passed over a damaged checkpoint, which goes with the next save: {line}"
            for line in skipped.values()
        ]
        return Decision(
            checkpoint=checkpoint,
            notices=tuple(notices),
            damaged=tuple(skipped),
            more_steps=ended_early and lengthened,
        )

    def _other_choice(self, config: Config) -> str | None:
        """Say that the export was chosen by another criterion than is asked for; None: it was
        not.
        """
        best = self.earlier_manifest().get("best") or {}
        metric, criterion = config.trainer.metric_for_best_model, Criterion.of(config.trainer)
        if best.get("metric") != metric:
            return f"trainer.metric_for_best_model was {best.get('metric')} and is {metric}"
        if criterion is not None and best.get("greater_is_better") == (not criterion.greater):
            return f"trainer.greater_is_better is {str(criterion.greater).lower()} now"
        return None

    def exports(self, lora: LoraConfig) -> dict[str, Path]:
        """Give the folders that a run's end writes, by the manifest's name for their hashes."""
        found = {}
        if lora.active and lora.export != "merged":
            found["adapter"] = self.path / ADAPTER
        if not lora.active or lora.export != "adapter":
            found["export"] = self.path / EXPORT
        return found

    def damage(self, export: Path, key: str = "export") -> str | None:
        """Say what is wrong with exported weights, whose hashes the manifest has under a key;
        None: nothing.
        """
        if not export.is_dir():
            return f"there is no {export}"
        for name, digest in self.earlier_manifest().get(key, {}).items():
            if not (export / name).is_file():
                return f"{export / name} is missing"
            if sha256_of(export / name) != digest:
                return f"{export / name} differs from its sha256"
        return None

    def _refuse_going_back(self, named: Path, latest: Path, config: Config) -> None:
        if named.resolve().parent == self.checkpoints.resolve():
            raise UserError(
                "C304",
                f"{named} is not the latest checkpoint of its own run",
                expected=str(latest),
                hint=f"to train from it into another folder: run_name={config.run_name}-2",
            )

    def _from_named(self, checkpoint: Path) -> Decision:
        if (reason := verify(checkpoint)) is not None:
            raise UserError("R203", f"the checkpoint {checkpoint} is damaged: {reason}")
        return Decision(checkpoint=checkpoint, notices=(f"starting from {checkpoint}",))

    def write_config(self, config: Config) -> None:
        """Write `config.yaml`, every key with its value."""
        text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
        write_text(self.path / CONFIG, text)

    def write_json(self, name: str, value: Any) -> None:
        """Replace another JSON file of the folder."""
        write_json(self.path / name, value)

    def earlier_part(self, checkpoint: Path | None) -> dict[str, Any]:
        """Read what the part of this run that is continued noted of itself.

        Args:
            checkpoint: that training continues from.

        Returns:
            Its manifest, from the checkpoint if the folder's is lost; of a run that saved nothing
            its wandb id alone, since all else may have been mended before the new start.

        Raises:
            UserError: it cannot be read, so what the run was made of is unknown (74).
        """
        manifest = self.earlier_manifest()
        if checkpoint is None or checkpoint.resolve().parent != self.checkpoints.resolve():
            return {key: manifest[key] for key in ("wandb_run_id",) if key in manifest}
        return manifest or dict(_read_json(checkpoint / STATE).get("manifest", {}))

    def earlier_manifest(self) -> dict[str, Any]:
        """Read the manifest; {} if there is none.

        Raises:
            UserError: it cannot be read (74).
        """
        path = self.path / MANIFEST
        return _read_json(path) if path.is_file() else {}


def _is_more(patience: int | None, config: Config) -> bool:
    """Whether the command waits longer for a better evaluation than the run did."""
    new = config.trainer.early_stopping_patience
    return patience is not None and (new is None or new > patience)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as failure:
        raise unreadable(path, failure) from failure
