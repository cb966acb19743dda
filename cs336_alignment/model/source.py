"""Where a model comes from: a local folder, the hub, or the package; and its files' names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cs336_alignment.errors import UserError

BUILTIN = "builtin:"
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, resolved once at the start.

    Attributes:
        location: a local folder, or a hub id.
        revision: of the hub repository; None: its default branch.
        trust_remote_code: whether code in the repository may run.
    """

    location: str
    revision: str | None
    trust_remote_code: bool

    @property
    def is_local(self) -> bool:
        """Whether the location is a folder on this machine."""
        return Path(self.location).is_dir()


def resolve_model(name_or_path: str, revision: str | None, trust_remote_code: bool) -> ModelSource:
    """Resolve what the user gave: a folder, a hub id, or `builtin:arithmetic`.

    Raises:
        UserError: it looks like a path and there is no such folder (66); a revision of something
            that is not on the hub (78).
    """
    given = Path(name_or_path).expanduser()
    if revision is not None and (name_or_path.startswith(BUILTIN) or given.is_dir()):
        raise UserError(
            "C114",
            f"model.revision={revision} names a commit on the hub, and {name_or_path} is local",
            hint="model.revision=null",
        )
    if name_or_path.startswith(BUILTIN):
        folder = Path(__file__).parents[1] / "assets" / name_or_path.removeprefix(BUILTIN)
        if not folder.is_dir():
            raise UserError(
                "M101",
                f"there is no built-in model {name_or_path}",
                expected="builtin:arithmetic",
            )
        return ModelSource(str(folder), None, False)
    if given.is_dir():
        return ModelSource(str(given), None, trust_remote_code)
    if name_or_path.count("/") != 1 or name_or_path[0] in "./~" or given.parent.is_dir():
        raise UserError(
            "M101",
            f"there is no model folder {name_or_path}",
            hint="model.name_or_path takes a folder in Hugging Face form or a hub id such as "
            "Qwen/Qwen2.5-0.5B"
            + ("; `make smollm2` makes this one" if "SmolLM2" in name_or_path else ""),
        )
    return ModelSource(name_or_path, revision, trust_remote_code)


def weight_files(source: ModelSource) -> list[Path]:
    """Name the safetensors files of a local folder; none if it has no weights in that form."""
    folder = Path(source.location)
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return sorted(folder / name for name in names if (folder / name).is_file())


def require_weights(source: ModelSource) -> None:
    """Refuse a local folder without weights.

    Raises:
        UserError: there are none (66).
    """
    folder = Path(source.location)
    if not any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES):
        raise UserError(
            "M102", f"{folder} holds no weights",
            expected="model.safetensors (or shards of it)",
            hint=f"a checkpoint in parts: `cs336-sft export {folder.resolve()}` makes it whole"
            if (folder / "sharded").is_dir()
            else "to train from scratch on its config.json: model.random_init=true",
        )  # fmt: skip
