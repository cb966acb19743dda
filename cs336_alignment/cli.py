"""The command line: `cs336-sft VERB [overrides]`. Verbs are thin; heavy imports wait until a verb
runs.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cs336_alignment.cluster_job import as_cluster_job
from cs336_alignment.config import Config
from cs336_alignment.config_names import FLAGS, VALUE_FLAGS, as_preset, what_was_meant
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.multirun import Outcome
from cs336_alignment.quiet import silence
from cs336_alignment.training.stop import StopNow, StopRequest, end_with_launcher

HTML, MEMORY = "--html", "--memory"
FILE_FLAGS = {"--config", "--config_file", "--config-file", "--yaml", "--config-name", "-cn"}


@dataclass(frozen=True)
class Verb:
    """One command.

    Attributes:
        name: as typed.
        help: a line.
        run: what runs, with the arguments after it.
        flag: its own, besides Hydra's.
    """

    name: str
    help: str
    run: Callable[[Sequence[str]], ExitStatus]
    flag: str = ""


def _call(where: str, *values: Any) -> Any:
    """Call `module:function` of this package, which is imported only now."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(f"cs336_alignment.{module}"), name)(*values)


def _with_config(
    verb: str, arguments: Sequence[str], where: str, *more: Any, **how: Any
) -> ExitStatus:
    """Call `module:function` with the config that arguments describe, and with what follows it.
    Keywords go to `run_with_config`.
    """
    from cs336_alignment.compose import run_with_config

    def job(config: Config) -> ExitStatus:
        return ExitStatus(_call(where, config, *more))

    return run_with_config(verb, arguments, job, **how)


def _train(arguments: Sequence[str]) -> ExitStatus:
    def after_all(outcomes: Sequence[Outcome]) -> None:
        _call("experiments.run_table:show_multirun", outcomes)

    return _with_config(
        "train", arguments, "training.run:train", arguments,
        after_all=after_all, as_cluster_job=as_cluster_job,
    )  # fmt: skip


def _evaluate(arguments: Sequence[str]) -> ExitStatus:
    return _with_config("evaluate", arguments, "evaluation.run:evaluate")


def _prepare(arguments: Sequence[str]) -> ExitStatus:
    return _with_config("prepare", arguments, "data_commands:prepare")


def _inspect(arguments: Sequence[str]) -> ExitStatus:
    words, html = take_html(arguments)
    return _with_config("inspect", words, "data_commands:inspect", html)


def _doctor(arguments: Sequence[str]) -> ExitStatus:
    words = [word for word in arguments if word != MEMORY]
    asked = (
        "memory_command:report_memory" if len(words) < len(arguments) else "training.doctor:doctor"
    )
    return _with_config("doctor", words, asked)


def _expert_iteration(arguments: Sequence[str]) -> ExitStatus:
    where = "experiments.expert_iteration:expert_iteration"
    return _with_config("expert-iteration", arguments, where, arguments)


def _sweep(arguments: Sequence[str]) -> ExitStatus:
    if {"-m", "--multirun"} & set(arguments):
        raise UserError(
            "C144",
            "a sweep tries several values by itself",
            hint="leave -m away and give sweep.space=…; for every combination: cs336-sft train -m",
        )
    words = [*arguments, "hydra.mode=RUN"]  # whatever a preset says for `train`
    return _with_config("sweep", words, "experiments.sweep:sweep", arguments)


def _chat(arguments: Sequence[str]) -> ExitStatus:
    model, words = take_model(arguments, "chat", "the folder of a run or model, or a hub id")
    return _with_config("chat", words, "chat_command:chat", model, _keys(words))


def _export(arguments: Sequence[str]) -> ExitStatus:
    run, words = take_model(arguments, "export", "a run, by its folder or name")
    return _with_config("export", words, "export_command:export", run, _keys(words))


def _env(arguments: Sequence[str]) -> ExitStatus:
    return ExitStatus(_call("env_command:env", arguments))


def _report(arguments: Sequence[str]) -> ExitStatus:
    return ExitStatus(_call("report_command:report", *take_html(arguments)))


def _keys(words: Sequence[str]) -> list[str]:
    return [word.split("=", 1)[0].lstrip("+~") for word in words if "=" in word]


def take_model(arguments: Sequence[str], verb: str, what: str) -> tuple[str, list[str]]:
    """Take the model or run out of a command line: its first word.

    Args:
        arguments: that follow the verb.
        verb: the command.
        what: it needs.

    Raises:
        UserError: there is none (2).
    """
    first = arguments[0] if arguments else ""
    if first.startswith("-"):  # --help
        return "", list(arguments)
    if not first or ("=" in first and not Path(first).expanduser().exists()):
        raise UserError(
            "C152",
            f"{verb} needs {what}",
            expected="it comes before any override",
            hint=f"cs336-sft {verb} outputs/quickstart",
        )
    return first, list(arguments[1:])


def take_html(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Take `--html FILE` out of a command line.

    Raises:
        UserError: the file's name is missing (2).
    """
    rest: list[str] = []
    html: Path | None = None
    words = iter(arguments)
    for word in words:
        if word == HTML or word.startswith(f"{HTML}="):
            name = word.partition("=")[2] or next(words, "")
            if not name:
                raise UserError("C003", "--html needs a file", hint="--html data.html")
            html = Path(name).expanduser()
        else:
            rest.append(word)
    return rest, html


VERBS = (
    Verb("train", "fine-tune a model; the same command again continues", _train),
    Verb(
        "prepare", "tokenize the data into the cache, and count what becomes of the rows", _prepare
    ),
    Verb("inspect", "see what is trained, token by token (--html FILE: a page)", _inspect, HTML),
    Verb(
        "doctor", "prove the invariances on this model and data (--memory: what it takes)",
        _doctor, MEMORY,
    ),
    Verb("evaluate", "loss, generations and rewards of a model, checkpoint or export", _evaluate),
    Verb("report", "a page and plots of a run, or of several side by side", _report, HTML),
    Verb("expert-iteration", "sample, keep what is correct, train on it, again", _expert_iteration),
    Verb("sweep", "search over keys with Optuna; each trial is a run", _sweep),
    Verb("chat", "talk to a run's model, a model folder or a hub id", _chat),
    Verb("export", "a run's model or rows for others: another dtype, GGUF, the hub", _export),
    Verb("env", "what this machine and environment are, for a bug report", _env),
)  # fmt: skip


def usage() -> str:
    """List the verbs."""
    lines = ["usage: cs336-sft VERB [section.key=value ...]", ""]
    lines += [f"  {verb.name:<17}{verb.help}" for verb in VERBS]
    lines += [
        "",
        "cs336-sft train --help           every key and preset",
        "cs336-sft train experiment=quickstart",
        "cs336-sft train model.name_or_path=MODEL data.train_path=rows.jsonl",
    ]
    return "\n".join(lines)


def refuse_foreign_flags(arguments: Sequence[str], verb: Verb) -> None:
    """Refuse flags of another tool's style, or of another verb, with what to type instead.

    Raises:
        UserError: a flag that is not Hydra's (2).
    """

    skip = False
    for index, argument in enumerate(arguments):
        if skip or not argument.startswith("-"):
            skip = False
            continue
        flag, equals, value = argument.partition("=")
        if flag in VALUE_FLAGS:
            skip = not equals
            continue
        if flag in FLAGS or flag == verb.flag:
            skip = flag == HTML and not equals
            continue
        if owners := [other.name for other in VERBS if flag == other.flag]:
            raise UserError(
                "C001",
                f"{flag} is not a flag of {verb.name}",
                hint=f"it belongs to {' and '.join(owners)}",
            )
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        if not equals:
            is_value = not re.match(r"-|[+~]*(hydra/)?\w+(\.\w+)*=|$", following)
            value = following if is_value else "true"
        raise _foreign_flag(flag, value)


def _foreign_flag(flag: str, value: str) -> UserError:
    name = flag.lstrip("-").replace("-", "_")
    if flag in FILE_FLAGS:
        hint = as_preset(Path(value))
    else:
        hint = what_was_meant(name, value) or (
            "overrides are section.key=value; `cs336-sft train --help` shows every key"
        )
    return UserError("C001", f"{flag} is not a flag of this command", hint=hint)


def _verb_hint(arguments: Sequence[str]) -> str:
    if "=" in arguments[0]:
        return "overrides follow the verb: cs336-sft train " + " ".join(arguments)
    near = difflib.get_close_matches(arguments[0], [verb.name for verb in VERBS], n=1)
    return f"did you mean {near[0]}?" if near else "`cs336-sft` alone lists the verbs"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit status."""
    end_with_launcher()
    try:
        with StopRequest():  # of a training run's own in its time; importing torch takes time, too
            status = run(list(sys.argv[1:] if argv is None else argv))
    except StopNow as request:
        status = request.status
    sys.exit(int(status))


def run(arguments: list[str]) -> ExitStatus:
    """Run one command.

    Args:
        arguments: verb and what follows it.

    Returns:
        The exit status; errors have been printed.
    """
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # one process of each machine
    silence()
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(usage())
        return ExitStatus.DONE
    verb = next((verb for verb in VERBS if verb.name == arguments[0]), None)
    try:
        if verb is None:
            raise UserError(
                "C002",
                f"there is no verb {arguments[0]}",
                expected="one of " + ", ".join(verb.name for verb in VERBS),
                hint=_verb_hint(arguments),
            )
        refuse_foreign_flags(arguments[1:], verb)
        return verb.run(arguments[1:])
    except UserError as error:
        if speaks:
            print(error, file=sys.stderr, flush=True)
        if debug:
            traceback.print_exc()
        return error.status
    except BrokenPipeError:  # `… | head`: nobody reads on, and nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return ExitStatus.DONE
    except Exception as failure:
        traceback.print_exc()
        print(f"error[X001]: internal error: {failure}", file=sys.stderr, flush=True)
        return ExitStatus.INTERNAL


if __name__ == "__main__":
    main()
