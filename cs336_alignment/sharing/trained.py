"""What a run trained: its folder, which of its weights are meant, and how they become a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.compose import config_of_run
from cs336_alignment.config import Config
from cs336_alignment.errors import UserError
from cs336_alignment.model.loading import (
    base_of,
    build_model,
    load_adapted,
    load_model,
    load_tokenizer,
)
from cs336_alignment.model.lora import add_adapter, merge_adapter
from cs336_alignment.model.source import ModelSource, resolve_model
from cs336_alignment.report_command import find_run
from cs336_alignment.sharing.export_folder import read_json
from cs336_alignment.training.checkpoint import restore_weights
from cs336_alignment.training.checkpoint_folders import (
    INDEX,
    SHARDED,
    STATE,
    find_latest,
    folder_of,
    verify,
)
from cs336_alignment.training.run_folder import (
    ADAPTER,
    CONFIG,
    EXPORT,
    LEDGER,
    MANIFEST,
    METRICS,
    STATUS,
    RunFolder,
)


@dataclass(frozen=True)
class TrainedRun:
    """A run as its folder tells it.

    Attributes:
        folder: of the run.
        checkpoint: `best`, `latest` or a step that was named with it; None: none was.
        config: that it was trained with; its name and place are those of the folder now.
        manifest: `manifest.json`.
        ledger: `data_ledger.json`.
    """

    folder: Path
    checkpoint: str | None
    config: Config
    manifest: dict[str, Any]
    ledger: dict[str, Any]

    @property
    def kind(self) -> str:
        """The format of its training rows; "" if unknown."""
        return str(self.ledger.get("train", {}).get("format", "")).partition(" ")[0]


def open_run(name: str, root: Path, checkpoint: str | None) -> TrainedRun:
    """Open a run that a word of the command line means.

    Args:
        name: a run's folder, its name, the folder of its export or of one of its checkpoints.
        root: where named runs are.
        checkpoint: as asked for besides; it goes before that of the name.

    Raises:
        UserError: there is no such run, or it never began (66); its config cannot be read (74).
    """
    given = Path(name).expanduser()
    if given.parent.name == "checkpoints" and (given.parent.parent / CONFIG).is_file():
        checkpoint = checkpoint or given.name.removeprefix("step-")
        given = given.parent.parent
    elif given.name == EXPORT and (given.parent / CONFIG).is_file():
        given = given.parent
    folder = find_run(str(given), root)
    if not any((folder / name).exists() for name in (CONFIG, MANIFEST, METRICS)):
        error = str(read_json(folder / STATUS).get("error") or "")
        raise UserError(
            "R332",
            f"the run {folder} ended before it began, and left no weights",
            got=error.partition("\n")[0] or None,
            hint="mend that, and train it",
        )
    config = config_of_run(folder / CONFIG)
    config.run_name, config.output_root = folder.resolve().name, str(folder.parent)
    manifest, ledger = read_json(folder / MANIFEST), read_json(folder / LEDGER)
    return TrainedRun(folder, checkpoint, config, manifest, ledger)


def find_weights(
    run: TrainedRun, warn: Callable[[str], None], *, adapter: bool = False
) -> tuple[Path, int]:
    """Find the folder of the weights that are meant, and their step: without a checkpoint's name
    the run's own export, or the best or latest checkpoint of a run that has none yet.

    Args:
        run: the run.
        warn: is told of checkpoints that are passed over.
        adapter: whether those of adapters alone are meant.

    Raises:
        UserError: there are none (66), they are damaged (74), or the run trained no adapters (78).
    """
    if adapter and not run.config.lora.active:
        raise UserError(
            "C175",
            f"{run.folder} trained all weights, and no adapter",
            got="export.format=adapter",
            hint="export.format=hf",
        )
    checkpoints, wanted = run.folder / "checkpoints", run.checkpoint
    own = run.folder / (ADAPTER if adapter else EXPORT)
    if wanted is None and own.is_dir():
        if (
            reason := RunFolder(run.config).damage(own, "adapter" if adapter else "export")
        ) is not None:
            raise UserError(
                "R203",
                f"the model of the run is damaged: {reason}",
                hint="the command that trained it writes it anew; or export.checkpoint=latest",
            )
        return own, int(run.manifest.get("export_step", 0))
    best = read_json(checkpoints / INDEX).get("best")
    if wanted == "latest" or (wanted is None and best is None):
        folder, skipped = find_latest(checkpoints)
        for line in skipped.values():
            warn(f"passed over a damaged checkpoint: {line}")
    elif wanted is None or wanted == "best":
        folder = None if best is None else checkpoints / str(best)
    else:
        folder = folder_of(checkpoints, int(wanted))
    if folder is None or not folder.is_dir():
        there = sorted(path.name for path in checkpoints.glob("step-*"))
        raise UserError(
            "R202",
            f"there is no whole checkpoint {wanted or ''} in {checkpoints}".replace("  ", " "),
            got=", ".join(there) or "none",
            hint="export.checkpoint=latest, or the number of a step that is there",
        )
    if (reason := verify(folder)) is not None:
        raise UserError(
            "R203",
            f"the checkpoint {folder} is damaged: {reason}",
            hint="export.checkpoint=latest takes the latest that is whole",
        )
    return folder, int(read_json(folder / STATE)["progress"]["step"])


def load_trained(
    folder: Path, config: Config, *, adapter: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a model, in float32, and its tokenizer of a run's export or checkpoint.

    Args:
        folder: of either.
        config: of the run.
        adapter: leave adapters as they are; else they are merged.

    Raises:
        UserError: they cannot be loaded (66).
    """
    source = resolve_model(str(folder), None, config.model.trust_remote_code)
    tokenizer = load_tokenizer(source)
    if (folder / SHARDED).is_dir():
        return _join_parts(folder, source, config, adapter=adapter), tokenizer
    if adapter:
        return load_adapted(source), tokenizer
    return load_model(source, random_init=False, seed=config.seed), tokenizer


def _join_parts(
    folder: Path, source: ModelSource, config: Config, *, adapter: bool
) -> PreTrainedModel:
    """Make a whole model of a checkpoint of which several processes wrote a part each."""
    if config.lora.active:
        options = config.model
        source = resolve_model(options.name_or_path, options.revision, options.trust_remote_code)
        model = load_model(source, random_init=False, seed=config.seed)
        add_adapter(model, config.lora, base_of(source, model), seed=config.seed)
    else:
        model = build_model(source)
    restore_weights(folder, model)
    if config.lora.active and not adapter:
        merge_adapter(model)
    return model
