"""Hydra, and only here: from the command line and YAML groups to one typed `Config`.

Hydra composes and prints; it writes nothing and runs nothing of its own. Past `to_config` no
OmegaConf object exists.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cs336_alignment.config import (
    ALL_KEYS,
    DEFAULT_WARMUP_RATIO,
    Config,
    check,
    nearest_key,
    warmup_clash,
)
from cs336_alignment.errors import ExitStatus, Place, UserError

PACKAGE = Path(__file__).resolve().parent
# Hydra's own flags: those alone, and those that take a value.
FLAGS = frozenset({
    "--help", "-h", "--hydra-help", "--version", "--resolve", "--multirun", "-m", "--run", "-r",
    "--shell-completion", "-sc",
})  # fmt: skip
VALUE_FLAGS = frozenset({
    "--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-name", "-cn",
    "--config-path", "-cp", "--info", "-i", "--experimental-rerun",
})  # fmt: skip
OPTIONAL_KEYS = {"evaluate": ("data.train_path",)}
Job = Callable[[Config], ExitStatus]


def config_folder() -> Path:
    """Find the shipped presets: inside the installed package, or beside it in a checkout."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def run_with_config(verb: str, arguments: Sequence[str], job: Job) -> ExitStatus:
    """Compose the config that the arguments describe and run the job on it.

    `--cfg job`, `--help`, `--info`, `--config-dir` and `--multirun` are Hydra's and work as
    documented there. A multirun calls the job once for each combination, in this process; each gets
    a `run_name` with its own overrides appended, and the first that fails ends it.

    Args:
        verb: the command, for help texts and for the keys it needs.
        arguments: all that follows the verb.
        job: what to run.

    Raises:
        UserError: the config is wrong (78).
    """
    ConfigStore.instance().store(name="schema", node=Config, provider="cs336_alignment")
    single: list[Config] = []
    refused: list[UserError] = []
    status = ExitStatus.DONE

    def task(composed: DictConfig) -> None:
        nonlocal status
        run = HydraConfig.get()
        try:
            config = to_config(composed, verb, run.overrides.task)
        except UserError as error:
            refused.append(error)
            return
        if run.mode != RunMode.MULTIRUN:
            single.append(config)
        elif status == ExitStatus.DONE:
            config.run_name = f"{config.run_name}{_swept_suffix(arguments, run.overrides.task)}"
            check(config)
            status = job(config)

    with _hydra_process(verb, arguments):
        entry = hydra.main(
            version_base="1.3", config_path=str(config_folder()), config_name="train"
        )
        try:
            entry(task)()
        except (HydraException, OmegaConfBaseException) as failure:
            raise translate(failure) from failure
    if refused:
        raise refused[0]
    return job(single[0]) if single else status


@contextmanager
def _hydra_process(verb: str, arguments: Sequence[str]) -> Any:
    """Give Hydra the command line it expects, and make it raise instead of printing and leaving."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    # Hydra's parser refuses a flag between two overrides; people type it there.
    flags, overrides = _split_flags(arguments)
    sys.argv = [f"cs336-sft {verb}", *flags, *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide a command line into Hydra's flags, with their values, and overrides."""
    flags: list[str] = []
    overrides: list[str] = []
    takes_value = False
    for argument in arguments:
        is_flag = argument.startswith("-") or takes_value
        (flags if is_flag else overrides).append(argument)
        takes_value = argument in VALUE_FLAGS
    return flags, overrides


def to_config(composed: DictConfig, verb: str, overrides: Sequence[str]) -> Config:
    """Convert a composed config to the dataclass, once, and check its values.

    Args:
        composed: from Hydra, typed by the schema.
        verb: the command; some keys must be given for some verbs only.
        overrides: as typed, to see which keys were given on purpose.

    Raises:
        UserError: a key that must be given is missing, or a value cannot be (78).
    """
    _refuse_added_keys(OmegaConf.to_container(composed))
    optional = OPTIONAL_KEYS.get(verb, ())
    missing = sorted(OmegaConf.missing_keys(composed))
    for key in missing:
        if key not in optional:
            raise UserError(
                "C102",
                f"{key} is not given",
                ExitStatus.BAD_CONFIG,
                hint=f"add {key}=…, or choose a preset: experiment={_presets()}",
            )
        OmegaConf.update(composed, key, "none")
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as failure:
        raise translate(failure) from failure
    assert isinstance(config, Config)
    given = {override.split("=", 1)[0].lstrip("+~") for override in overrides}
    if {
        "optimizer.warmup_ratio",
        "optimizer.warmup_steps",
    } <= given and config.optimizer.warmup_steps is not None:
        raise warmup_clash()
    if "optimizer.warmup_steps" in given and config.optimizer.warmup_steps is not None:
        config.optimizer.warmup_ratio = DEFAULT_WARMUP_RATIO  # typed steps replace a preset's ratio
    if config.run_name is None:
        config.run_name = _default_run_name(config, verb)
    check(config)
    return config


def _refuse_added_keys(composed: Any, prefix: str = "") -> None:
    """Refuse what `+key=value` added: Hydra lets it pass even where a schema knows every key."""
    for name, value in composed.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            _refuse_added_keys(value, f"{key}.")
        elif key not in ALL_KEYS:
            raise _no_such_key(key)


def _no_such_key(key: str, place: Place | None = None) -> UserError:
    near = nearest_key(key)
    return UserError(
        "C101",
        f"there is no key {key}",
        ExitStatus.BAD_CONFIG,
        place=place,
        hint=f"did you mean {near}?" if near else "`cs336-sft train --cfg job` prints every key",
    )


def _default_run_name(config: Config, verb: str) -> str:
    names = [config.model.name_or_path, "" if verb == "evaluate" else config.data.train_path]
    parts = [
        re.split(r"[/:]", name.rstrip("/"))[-1].removesuffix(".jsonl") for name in names if name
    ]
    prefix = [] if verb == "train" else [verb]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join([*prefix, *parts])).strip("-._") or "run"


def _swept_suffix(arguments: Sequence[str], job_overrides: Sequence[str]) -> str:
    """Name a multirun's job by the overrides that differ between its jobs."""
    parsed = OverridesParser.create().parse_overrides(_split_flags(arguments)[1])
    swept = {o.get_key_element() for o in parsed if o.is_sweep_override()}
    chosen = [o.split("=", 1) for o in job_overrides if o.split("=", 1)[0] in swept]
    text = "".join(f"-{key.rsplit('.', 1)[-1]}-{value}" for key, value in chosen)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def _presets() -> str:
    return ", ".join(sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml")))


def translate(failure: Exception) -> UserError:
    """Turn what Hydra or OmegaConf raised into one readable error, with the nearest key or
    preset.
    """
    text = _whole_text(failure)
    if isinstance(failure, MissingConfigException):
        return _unknown_preset(text)
    if isinstance(failure, OverrideParseException):
        return UserError(
            "C107",
            f"cannot read the override `{failure.override}`",
            ExitStatus.BAD_CONFIG,
            expected="section.key=value",
            got=text.splitlines()[0],
            hint="put quotes around values with '=', ',' or spaces: 'key=\"a,b\"'",
        )
    place = None
    if match := re.search(r"In '([^']+)'", text):
        place = Place(f"preset {match[1]}")
    if key := _unknown_key(text):
        return _no_such_key(key, place)
    if match := re.search(r"full_key: (\S+)", text):
        key = match[1]
        reason = next(
            (
                line
                for line in text.splitlines()
                if line.startswith(
                    (
                        "Value",
                        "Cannot",
                        "Unsupported",
                        "Non optional",
                        "field",
                        "Incompatible",
                        "Invalid",
                    )
                )
            ),
            text.splitlines()[0],
        )
        return UserError(
            "C108",
            f"{key} has a value of the wrong type",
            ExitStatus.BAD_CONFIG,
            place=place,
            got=reason.strip(),
            hint=f"{key}=…",
        )
    if "Ambiguous value" in text:
        return UserError(
            "C109",
            text.splitlines()[0],
            ExitStatus.BAD_CONFIG,
            hint="several values want --multirun (-m); a comma in a text, quotes: 'key=\"a,b\"'",
        )
    return UserError("C100", " ".join(text.split()), ExitStatus.BAD_CONFIG, place=place)


def _whole_text(failure: BaseException) -> str:
    """Join the texts of an exception and its causes: the outer one often says nothing."""
    texts = [str(failure)]
    while (cause := failure.__cause__ or failure.__context__) is not None:
        failure = cause
        texts.append(str(failure))
    return "\n".join(texts)


def _unknown_preset(text: str) -> UserError:
    match = re.search(r"Could not find '([^']+)'", text)
    name = match[1] if match else text.splitlines()[0]
    group, _, choice = name.rpartition("/")
    folder = config_folder() / group
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if not known:
        groups = sorted(path.name for path in config_folder().iterdir() if path.is_dir())
        near = nearest_key(group or choice) or next(
            iter(difflib.get_close_matches(group, groups, n=1)), None
        )
        return UserError(
            "C101",
            f"there is no key {group or choice}",
            ExitStatus.BAD_CONFIG,
            hint=f"did you mean {near}?" if near else f"groups: {', '.join(groups)}",
        )
    near = next(iter(difflib.get_close_matches(choice, known, n=1)), None)
    return UserError(
        "C110",
        f"there is no preset {group}={choice}",
        ExitStatus.BAD_CONFIG,
        expected="one of " + ", ".join(known),
        hint=(f"did you mean {group}={near}? " if near else "")
        + "your own presets: --config-dir DIR, with "
        f"DIR/{group}/{choice}.yaml",
    )


def _unknown_key(text: str) -> str | None:
    """Find the key that does not exist, in full, from the several texts in which it is reported."""
    if match := re.search(
        r"Could not (?:override|append to config|delete from config).*?'([^']+)'", text
    ):
        return match[1].split("=", 1)[0].lstrip("+~")
    if match := re.search(r"Key '([^']+)' (?:not in|is not in struct|is not)", text):
        full = re.search(r"full_key: (\S+)", text)
        key = full[1] if full else match[1]
        return None if key in ALL_KEYS else key
    return None
