"""What Hydra and OmegaConf raise, said in one readable error with the nearest key or preset."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import InterpolationResolutionError

from cs336_alignment.config import ALL_KEYS, ColumnsConfig, Config, SourceConfig, flatten
from cs336_alignment.config_check import values_of
from cs336_alignment.config_clashes import SOURCES
from cs336_alignment.config_names import as_preset, what_was_meant, with_default
from cs336_alignment.errors import Place, UserError, UserErrors

PACKAGE = Path(__file__).resolve().parent
USUAL_KEYS = (  # what a number for a group was probably meant for
    "lora.r", "parallel.num_processes", "optimizer.learning_rate", "trainer.global_batch_size",
    "evaluation.num_prompts", "expert_iteration.iterations", "sweep.num_trials",
)  # fmt: skip
PATHS = {"data": "data.train_path", "model": "model.name_or_path"}  # what was meant by a path


def config_folder() -> Path:
    """Find the shipped presets: inside the installed package, or beside it in a checkout."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def presets() -> str:
    """List the experiments that ship."""
    return ", ".join(sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml")))


def no_such_key(key: str, place: Place | None = None) -> UserError:
    """Build the error for a key that does not exist, with the nearest one that does."""
    return UserError(
        "C101",
        f"there is no key {key}",
        place=place,
        hint=what_was_meant(key) or "`cs336-sft train --cfg job` prints every key",
    )


def refuse_deletions(arguments: Sequence[str]) -> None:
    """Refuse Hydra's `~key` and `~group`: all keys are read, and a default would come back unseen.

    Raises:
        UserError: there is one (78).
    """
    for word in arguments:
        if word.startswith("~"):
            raise UserError(
                "C107",
                "a key or group cannot be taken out of the config",
                got=word,
                hint="type another value for it, or null where it takes none: section.key=null",
            )


def with_other_keys(error: UserError, arguments: Sequence[str]) -> UserError:
    """Name beside a key that does not exist the others of the command line: Hydra stops at the
    first.
    """
    if error.code != "C101":
        return error
    typed = (re.match(r"\+*((?!hydra\.|sweep\.space\.)\w+(?:\.\w+)*)=", w) for w in arguments)
    # Without a dot `+name=` may be a group of the user's own.
    keys = dict.fromkeys(m[1] for m in typed if m and ("." in m[1] or m[0][0] != "+"))
    known = {*ALL_KEYS, *(path.name for path in config_folder().iterdir())}  # keys and groups
    wrong = [key for key in keys if not any(f"{k}.".startswith(f"{key}.") for k in known)]
    others = [other for other in map(no_such_key, wrong) if other.message != error.message]
    return UserErrors([error, *others]) if others else error


def _no_such_key_of_source(key: str, place: Place | None) -> UserError:
    keys = [field.name for field in fields(SourceConfig) if field.name != "columns"]
    keys += [f"columns.{field.name}" for field in fields(ColumnsConfig)]
    near = difflib.get_close_matches(key, keys, n=1)
    return UserError(
        "C101",
        f"an entry of data.sources has no key {key}",
        place=place,
        expected=", ".join(keys),
        hint=f"did you mean {near[0]}?" if near else None,
    )


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
            expected="section.key=value",
            got=text.splitlines()[0],
            hint=_of_file(str(failure.override))
            or "put quotes around values with '=', ',', '<' or spaces, and others around the whole "
            "for the shell: 'key=\"a,b\"', 'key=[\"<a>\"]'",
        )
    place = None
    if match := re.search(r"In '([^']+)'", text):
        place = Place(f"preset {match[1]}")
    if key := _unknown_key(text):
        if place is not None and key in ("experiment", "preset"):
            return UserError(
                "C101",
                f"the preset has the key {key}, as if it were a group of its own",
                place=place,
                hint="begin the file with the line `# @package _global_`",
            )
        if re.search(r"object_type=(Source|Columns)Config", text) and not key.startswith("data."):
            return _no_such_key_of_source(key, place)
        return no_such_key(key, place)
    if isinstance(failure, InterpolationResolutionError):
        return UserError(
            "C117",
            f"{failure.full_key or 'a key'} refers to something that is not there",
            place=place,
            got=text.splitlines()[0],
            hint="${section.key} is the value of a key, ${oc.env:NAME} that of a variable",
        )
    if match := re.search(r"full_key: *(\S+)|object_type=SourceConfig", text):
        return _wrong_type(match[1] or "data.sources", text, place)
    if match := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
        return _several_values(*match.groups())
    return UserError("C100", " ".join(text.split()), place=place)


def _wrong_type(key: str, text: str, place: Place | None) -> UserError:
    value = re.search(
        r"Value '(.*)' (?:of type|is not a valid)|to string: '(.*)'|assigned: .* value: (.*)", text
    )
    got = next(filter(None, value.groups()), "''") if value else None
    key = re.sub(r"\[\d+\]$", "", key)  # a list's rule is that of its entries
    expected, hint = values_of(key), with_default(key)
    of_source = re.search(r"object_type=(Source|Columns)Config", text)
    if key == "data.sources" or (of_source and not key.startswith("data.columns")):
        key, hint = f"{key.removeprefix('data.sources') or 'an entry'} of data.sources", SOURCES
    elif within := [full for full in ALL_KEYS if full.startswith(f"{key}.")]:
        hint = f"its keys are typed one by one: {within[0]}=…"
    elif "is not a ListConfig" in text:
        hint = f"brackets make a list: '{key}=[…]'"
    elif "is not Optional" in text:
        got = "null"
    elif str(got).lower() == "none" and expected and "null" in expected:
        hint = f"{key}=null"
    return UserError(
        "C108",
        f"{key} has a value of the wrong type",
        place=place,
        expected=expected,
        got=got,
        hint=hint,
    )


def _of_file(word: str) -> str | None:
    """Say how a config or data in a file are given; None: the word names no such file."""
    if "=" not in word and Path(word).expanduser().is_dir():
        return f"type model.name_or_path={word}, if it is a model"
    kind = "" if "=" in word else Path(word).suffix
    if kind in (".yaml", ".yml"):
        return as_preset(Path(word))
    return (
        f"type data.train_path={word}" if kind in (".jsonl", ".json", ".csv", ".parquet") else None
    )


def _several_values(key: str, value: str) -> UserError:
    default = dict(flatten(Config())).get(key)
    either = key == "lora.target_modules"
    ways = ["several runs want --multirun (-m)"]
    if isinstance(default, list) or either:
        ways.append(f"a list brackets: '{key}=[{value}]'")
    if (key in ALL_KEYS and (default is None or isinstance(default, str))) or either:
        ways.append(f"a text quotes: '{key}=\"{value}\"'")
    if key in ("data.train_path", "data.eval_path"):
        ways.append("several files a pattern, 'rows-*.jsonl', or data.sources")
    return UserError("C109", f"{key}={value} gives several values", hint="; ".join(ways))


def unreadable_preset(failure: Exception) -> UserError:
    """Build the error for a file that is no YAML, or no text."""
    mark = getattr(failure, "problem_mark", None)
    return UserError(
        "C126",
        "a preset cannot be read",
        place=None if mark is None else Place(mark.name, mark.line + 1),
        got=str(getattr(failure, "problem", None) or failure),
        hint="YAML in UTF-8: indent with spaces, one `key: value` a line, each key once",
    )


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
    section, _, value = name.partition("/")
    if section in PATHS and ("." in value or "/" in value):
        return UserError(
            "C110",
            f"there is no preset {section}={value}",
            hint=f"type {PATHS[section]}={value}",
        )
    group, _, choice = name.rpartition("/")
    folder = config_folder() / group
    # Hydra lists those of --config-dir, too.
    known = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
    known = known or sorted(path.stem for path in folder.glob("*.yaml"))
    if not known:
        groups = sorted(path.name for path in config_folder().iterdir() if path.is_dir())
        near = next(iter(difflib.get_close_matches(group, groups, n=1)), None)
        return UserError(
            "C101",
            f"there is no key {group or choice}",
            hint=what_was_meant(group or choice)
            or (f"did you mean {near}?" if near else f"groups: {', '.join(groups)}"),
        )
    near = next(iter(difflib.get_close_matches(choice, known, n=1)), None)
    return UserError(
        "C110",
        f"there is no preset {group}={choice}",
        expected="one of " + ", ".join(known),
        hint=(f"did you mean {group}={near}? " if near else "")
        + "your own presets: --config-dir DIR, with "
        f"DIR/{group}/{choice}.yaml",
    )


def no_name_of_preset(arguments: Sequence[str]) -> UserError | None:
    """Build the error for a group that was given a number, a truth value, null or a list; None:
    there is none.
    """
    groups = "|".join(path.name for path in config_folder().iterdir() if path.is_dir())
    number = r"[-+]?(\d[\d_]*\.?\d*|\.\d+)(e[-+]?\d+)?"
    value = rf"(.*,)?({number}|true|false|null|nan|[-+]?inf|\[.*\])(,.*)?"
    given = [w for w in arguments if re.fullmatch(rf"\+*({groups})(@[^=]*)?={value}", w, re.I)]
    if not given:
        return None
    group = re.split("[@=]", given[0].lstrip("+"))[0]
    names = sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))
    keys = [key for key in ALL_KEYS if key.startswith(f"{group}.")]
    usual = next((key for key in keys if key in USUAL_KEYS), keys[0] if keys else None)
    return UserError(
        "C110",
        f"a group takes the name of a preset, and got {', '.join(given)}",
        expected=f"one of {', '.join(names)}",
        hint=f"its keys are typed one by one: {usual}=…" if usual else None,
    )


def _unknown_key(text: str) -> str | None:
    """Find the key that does not exist, in full, from the several texts in which it is reported."""
    if match := re.search(r"Could not (?:override|append to config).*?'([^']+)'", text):
        key = match[1].split("=", 1)[0].lstrip("+")
        if key not in ALL_KEYS:
            return key
    if match := re.search(r"Key '([^']+)' (?:not in|is not in struct|is not)", text):
        full = re.search(r"full_key: (\S+)", text)
        key = full[1] if full else match[1]
        return None if key in ALL_KEYS else key
    return None
