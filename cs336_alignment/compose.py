"""Hydra, and only here: from the command line and YAML groups to one typed `Config`.

Hydra composes and prints; it writes nothing and runs nothing of its own. Past `to_config` no
OmegaConf object exists.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cs336_alignment.compose_errors import (
    config_folder,
    no_name_of_preset,
    no_such_key,
    presets,
    refuse_deletions,
    translate,
    unreadable_preset,
    with_other_keys,
)
from cs336_alignment.compose_groups import refuse_hidden_groups
from cs336_alignment.config import ALL_KEYS, Config, OptimizerConfig
from cs336_alignment.config_check import check, refuse_secrets
from cs336_alignment.config_clashes import clash, warmup_clash
from cs336_alignment.config_names import VALUE_FLAGS
from cs336_alignment.errors import ExitStatus, UserError, UserErrors
from cs336_alignment.multirun import (
    Outcome,
    SweptRun,
    outcome_of,
    refuse_equal_names,
    run_all,
    status_of,
    time_of_status,
)

MIXTURE = "mixture"  # stands for the path where data.sources names several
OPTIONAL_KEYS = {
    "evaluate": ("data.train_path",),
    "chat": ("data.train_path", "model.name_or_path"),
    "export": ("data.train_path", "model.name_or_path"),
}
CFG_FLAGS = ("--cfg", "-c", "--package", "-p", "--resolve")
TRAINING = ("train", "expert-iteration", "sweep")  # verbs that keep a preset's run_name
Job = Callable[[Config], ExitStatus]


def run_with_config(
    verb: str,
    arguments: Sequence[str],
    job: Job,
    after_all: Callable[[Sequence[Outcome]], None] = lambda _: None,
    as_cluster_job: Callable[[Job, str], Job] | None = None,
) -> ExitStatus:
    """Compose the config that the arguments describe and run the job on it.

    `--cfg job`, `--help`, `--info`, `--config-dir` and `--multirun` are Hydra's and work as
    documented there; what is printed is checked, too, but for what is not given. A multirun, asked
    for by a flag or by a preset's `hydra.mode`, checks the configs of all combinations and then
    calls the job for each, in this process; each gets a `run_name` with its own overrides appended.
    With `hydra/launcher=…` each becomes a job that this launcher starts, and this process waits for
    them.

    Args:
        verb: the command, for help texts and for the keys it needs.
        arguments: all that follows the verb.
        job: what to run.
        after_all: called at the end of a multirun.
        as_cluster_job: makes of the job what a launcher (its name follows) can start elsewhere;
            None: nothing can.

    Raises:
        UserError: the config is wrong (78), of several runs of all of them.
    """
    # Words that no key of the config holds, `hydra.launcher.setup=…`, are in what resumes a run.
    refuse_secrets((word.partition("=")[0], word) for word in arguments)
    ConfigStore.instance().store(name="schema", node=Config, provider="cs336_alignment")
    refuse_deletions(arguments)
    prints, words = _without_cfg(arguments)
    if prints:  # Hydra does it without a look at the values
        _compose(verb, arguments, lambda _: None)
    launcher = _typed_launcher(words)
    single, runs = _read_configs(verb, words, launcher, complete=not prints)
    if prints:
        refuse_equal_names(runs)
        return ExitStatus.DONE
    if single is not None:
        if launcher:
            raise UserError(
                "C127",
                f"hydra/launcher={launcher} starts the runs of a multirun, and this is one run",
                hint="add -m and the values to try; for one run: scripts/slurm/train.sbatch",
            )
        return job(single)
    if runs and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "C113",
            "a multirun works in one process, and the launcher started several",
            hint="launch the runs one after another, each with its own run_name=…",
        )
    refuse_equal_names(runs)
    if launcher and runs:
        if as_cluster_job is None:
            raise UserError(
                "C127",
                f"hydra/launcher={launcher} does not start `{verb}`",
                hint="leave it away: the runs follow one another here",
            )
        outcomes = _hand_over(verb, arguments, as_cluster_job(job, launcher), runs)
    else:
        outcomes = run_all(runs, job)
    if outcomes:
        after_all(outcomes)
    return status_of(outcomes)


def _without_cfg(arguments: Sequence[str]) -> tuple[bool, list[str]]:
    """Tell whether a command line prints the config, and give it without what makes it do so."""
    rest: list[str] = []
    prints, words = False, iter(arguments)
    for word in words:
        flag, _, value = word.partition("=")
        if flag not in CFG_FLAGS:
            rest.append(word)
            continue
        prints = prints or flag in ("--cfg", "-c")
        if flag in VALUE_FLAGS and not value:
            next(words, "")
    return prints, rest if prints else list(arguments)


def _read_configs(
    verb: str, arguments: Sequence[str], launcher: str | None, complete: bool
) -> tuple[Config | None, list[SweptRun]]:
    """Read and check all configs that the arguments describe: one, or those of a multirun."""
    single: list[Config] = []
    runs: list[SweptRun] = []
    failed: list[Exception] = []

    def task(composed: DictConfig) -> None:
        if (chosen := HydraConfig.get().runtime.choices["hydra/launcher"]) != "basic":
            raise UserError(
                "C127",
                f"a preset chooses hydra/launcher: {chosen}, and it has to be typed",
                hint=f"add hydra/launcher={chosen} to the command",
            )
        try:
            refuse_hidden_groups(composed)
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                typed = HydraConfig.get().overrides.task
                single.append(to_config(composed, verb, typed, complete))
            else:
                runs.append(_swept_run(composed, verb, arguments, complete))
        except Exception as failure:  # raised again below: Hydra would print a line of its own
            failed.append(failure)

    words = list(arguments)
    if launcher:  # all configs are checked here before the first job is handed over
        words = [word for word in words if not word.lstrip("+").startswith("hydra.launcher.")]
        words.append("hydra/launcher=basic")
    _compose(verb, words, task)
    if failed:
        raise _joined(failed)
    return (single[0] if single else None), runs


def _compose(verb: str, arguments: Sequence[str], task: Callable[[DictConfig], Any]) -> None:
    """Let Hydra compose what the arguments describe and call the task with each config."""
    with _hydra_process(verb, arguments):
        entry = hydra.main(
            version_base="1.3", config_path=str(config_folder()), config_name="train"
        )
        try:
            entry(task)()
        except (HydraException, OmegaConfBaseException) as failure:
            unnamed = no_name_of_preset(arguments) if isinstance(failure, HydraException) else None
            raise unnamed or with_other_keys(translate(failure), arguments) from failure
        except (YAMLError, UnicodeDecodeError) as failure:
            raise unreadable_preset(failure) from failure
        except (ValueError, TypeError) as failure:  # plain errors in Hydra, or a job's own
            if error := no_name_of_preset(arguments):
                raise error from failure
            if isinstance(failure, TypeError):
                raise
            # Flags that do not combine.
            raise UserError(
                "C115",
                str(failure),
                hint="give one of these flags: `cs336-sft train --hydra-help` explains them",
            ) from failure
        except AssertionError as failure:  # names that Hydra's own code takes for impossible
            raise UserError(
                "C107",
                "cannot use these overrides",
                expected="section.key=value",
                got=" ".join(arguments),
                hint="every word after the verb is one key, `=` and a value, or a flag",
            ) from failure


def _swept_run(
    composed: DictConfig, verb: str, arguments: Sequence[str], complete: bool = True
) -> SweptRun:
    """Make one run of a multirun, checked, with a name that says what differs."""
    run = HydraConfig.get()
    config = to_config(composed, verb, run.overrides.task, complete)
    swept = _swept(run.sweeper.params or {}, arguments, run.overrides.task)
    base, config.run_name = config.run_name or "", f"{config.run_name}{_suffix(swept)}"
    check(config)
    return SweptRun(config, base, swept)


def _typed_launcher(arguments: Sequence[str]) -> str | None:
    """Give the launcher that the command line chooses; None: this process, or nothing is run."""
    if {"--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help"} & set(arguments):
        return None
    typed = [word.split("=", 1)[1] for word in arguments if word.startswith("hydra/launcher=")]
    return typed[-1] if typed and typed[-1] != "basic" else None


def _hand_over(
    verb: str, arguments: Sequence[str], job: Job, runs: Sequence[SweptRun]
) -> list[Outcome]:
    """Give every run to the launcher, wait, and read from the runs' folders what became of them."""

    def task(composed: DictConfig) -> int:  # called elsewhere
        return int(status_of(run_all([_swept_run(composed, verb, arguments)], job)))

    print(f"{len(runs)} runs are handed to {_typed_launcher(arguments)}", flush=True)
    earlier = [time_of_status(run) for run in runs]
    try:
        _compose(verb, arguments, task)
    except UserError:
        raise
    except Exception as failure:  # of a job that the cluster ended: the others' results count
        print(f"warning: a job failed: {failure}", file=sys.stderr, flush=True)
    return [outcome_of(run, time) for run, time in zip(runs, earlier, strict=True)]


def _joined(failures: Sequence[Exception]) -> Exception:
    """Make one error of those of several runs, each told once."""
    errors: dict[str, UserError] = {}
    for failure in failures:
        if isinstance(failure, OmegaConfBaseException):  # an interpolation, say
            failure = translate(failure)
        if not isinstance(failure, UserError):
            return failure
        for error in failure.errors if isinstance(failure, UserErrors) else [failure]:
            errors.setdefault(str(error), error)
    found = list(errors.values())
    return found[0] if len(found) == 1 else UserErrors(found)


@contextmanager
def _hydra_process(verb: str, arguments: Sequence[str]) -> Any:
    """Give Hydra the command line it expects, and make it raise instead of printing and leaving."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    # Hydra's parser refuses a flag between two overrides; people type it there.
    flags, overrides = _split_flags(arguments)
    # Keys are added to a dictionary by `++` alone; people type them as any other.
    overrides = [f"++{w}" if w.startswith("sweep.space") else w for w in overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        # A multirun writes a multirun.yaml that nobody asked for.
        with TemporaryDirectory() as sweep:
            sys.argv = [f"cs336-sft {verb}", *flags, f"hydra.sweep.dir={sweep}", *overrides]
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


def to_config(
    composed: DictConfig, verb: str, overrides: Sequence[str], complete: bool = True
) -> Config:
    """Convert a composed config to the dataclass, once, and check its values.

    Args:
        composed: from Hydra, typed by the schema.
        verb: the command; some keys must be given for some verbs only.
        overrides: as typed, to see which keys were given on purpose.
        complete: whether a key that must be given and is missing is an error.

    Raises:
        UserError: a key that must be given is missing, or a value cannot be (78).
    """
    _refuse_added_keys(OmegaConf.to_container(composed))
    optional = OPTIONAL_KEYS.get(verb, ())
    given = {override.split("=", 1)[0].lstrip("+") for override in overrides}
    has_sources = bool(composed.data.sources)
    if "data.train_path" in given and has_sources:
        if "data.sources" in given:
            raise clash("data.train_path", "data.sources", "both name the training data; give one")
        composed.data.sources = []  # typed, it replaces a preset's data
    elif has_sources:
        composed.data.train_path = MIXTURE
    missing = sorted(OmegaConf.missing_keys(composed))
    if complete and (lacking := [key for key in missing if key not in optional]):
        raise UserError(
            "C102",
            f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not given",
            hint=f"add {' '.join(f'{key}=…' for key in lacking)}, or choose a preset: "
            f"experiment={presets()}",
        )
    for key in missing:
        OmegaConf.update(composed, key, "none")
    try:
        # Merged into the bare schema: an interpolation may have put a number where a list belongs.
        resolved = OmegaConf.to_container(composed, resolve=True)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), resolved))
    except OmegaConfBaseException as failure:
        raise translate(failure) from failure
    assert isinstance(config, Config)
    if {
        "optimizer.warmup_ratio",
        "optimizer.warmup_steps",
    } <= given and config.optimizer.warmup_steps is not None:
        raise warmup_clash()
    if "optimizer.warmup_steps" in given and config.optimizer.warmup_steps is not None:
        # Typed, it replaces a preset's ratio.
        config.optimizer.warmup_ratio = OptimizerConfig.warmup_ratio
    if config.hub.push_to_hub and verb in TRAINING[1:]:
        raise UserError(
            "C171",
            f"hub.push_to_hub pushes one run's model, and {verb} makes several",
            hint="push the chosen one afterwards: cs336-sft export RUN hub.push_to_hub=true",
        )
    if "model.name_or_path" in given and "model.random_init" not in given:
        config.model.random_init = False  # typed, it replaces a preset's model, weights and all
    if config.run_name is None or (verb not in TRAINING and "run_name" not in given):
        config.run_name = _default_run_name(config, verb)
    check(config)
    return config


def config_of_run(path: Path) -> Config:
    """Read a run's `config.yaml` as the config that it was; what a later release added is at its
    default.

    Raises:
        UserError: it cannot be read (74).
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
        config = OmegaConf.to_object(merged)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as failure:
        raise UserError(
            "R204",
            f"cannot read {path}: {failure}",
            hint="restore it from a copy; a key that it has may be of another release",
        ) from failure
    assert isinstance(config, Config)
    return config


def _refuse_added_keys(composed: Any, prefix: str = "") -> None:
    """Refuse what `+key=value` added: Hydra lets it pass even where a schema knows every key."""
    for name, value in composed.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in ALL_KEYS:
            _refuse_added_keys(value, f"{key}.")
        elif key not in ALL_KEYS:
            raise with_other_keys(no_such_key(key), HydraConfig.get().overrides.task)


def _default_run_name(config: Config, verb: str) -> str:
    model, data = config.model.name_or_path, config.data
    if verb in TRAINING:
        parts = [_last(model), _last(data.train_path), *([] if verb == "train" else [verb])]
    else:
        # Every run's export is called `model`, so the folders above it belong to the name.
        folders = [part for part in model.split("/") if part.strip(".~") and part != "checkpoints"]
        parts = [verb, *folders[-3:], _last(data.eval_path or "")]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-._")[:150] or "run"


def _last(name: str) -> str:
    return re.split(r"[/:]", name.rstrip("/"))[-1].removesuffix(".jsonl")


def _swept(
    params: Mapping[str, str], arguments: Sequence[str], job_overrides: Sequence[str]
) -> dict[str, str]:
    """Find the overrides of a multirun's job that differ between its jobs: those swept by a
    preset's `hydra.sweeper.params` or on the command line, which replaces a preset's.
    """
    typed = [*(f"{k}={v}" for k, v in params.items()), *_split_flags(arguments)[1]]
    parsed = OverridesParser.create().parse_overrides(typed)
    swept = {o.get_key_element(): o.is_sweep_override() for o in parsed}
    chosen = [o.split("=", 1) for o in job_overrides if swept.get(o.split("=", 1)[0])]
    return {key.lstrip("+"): value for key, value in chosen}


def _suffix(swept: Mapping[str, str]) -> str:
    """Name a multirun's job by what differs."""
    text = "".join(f"-{key.rsplit('.', 1)[-1]}-{value}" for key, value in swept.items())
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)
