"""The command line: `cs336-sft VERB [overrides]`. Verbs are thin; heavy imports wait until a verb
runs.
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cs336_alignment.cluster_job import as_cluster_job
from cs336_alignment.config import Config
from cs336_alignment.config_names import FLAGS, VALUE_FLAGS, what_was_meant
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.multirun import Outcome
from cs336_alignment.quiet import silence
from cs336_alignment.training.stop import StopNow, StopRequest, end_with_launcher

MEMORY = "--memory"  # the doctor's
FILE_FLAGS = {"--config", "--config_file", "--config-file", "--yaml"}


@dataclass(frozen=True)
class Verb:
    """One command: its name, a line of help, and what runs with the arguments after it."""

    name: str
    help: str
    run: Callable[[Sequence[str]], ExitStatus]


def _train(arguments: Sequence[str]) -> ExitStatus:
    from cs336_alignment.compose import run_with_config

    def job(config: Config) -> ExitStatus:
        from cs336_alignment.training.run import train

        return train(config, arguments)

    def after_all(outcomes: Sequence[Outcome]) -> None:
        from cs336_alignment.experiments.run_table import show_multirun

        show_multirun(outcomes)

    return run_with_config("train", arguments, job, after_all, as_cluster_job)


def _evaluate(arguments: Sequence[str]) -> ExitStatus:
    from cs336_alignment.compose import run_with_config

    def job(config: Config) -> ExitStatus:
        from cs336_alignment.evaluation.run import evaluate

        return evaluate(config)

    return run_with_config("evaluate", arguments, job)


def _prepare(arguments: Sequence[str]) -> ExitStatus:
    from cs336_alignment.compose import run_with_config

    def job(config: Config) -> ExitStatus:
        from cs336_alignment.data_commands import prepare

        return prepare(config)

    return run_with_config("prepare", arguments, job)


def _inspect(arguments: Sequence[str]) -> ExitStatus:
    from cs336_alignment.compose import run_with_config

    arguments, html = take_html(arguments)

    def job(config: Config) -> ExitStatus:
        from cs336_alignment.data_commands import inspect

        return inspect(config, html)

    return run_with_config("inspect", arguments, job)


def _doctor(arguments: Sequence[str]) -> ExitStatus:
    from cs336_alignment.compose import run_with_config

    words = [word for word in arguments if word != MEMORY]

    def job(config: Config) -> ExitStatus:
        if len(words) < len(arguments):
            from cs336_alignment.memory_command import report_memory

            return report_memory(config)
        from cs336_alignment.training.doctor import doctor

        return doctor(config)

    return run_with_config("doctor", words, job)


def _expert_iteration(arguments: Sequence[str]) -> ExitStatus:
    from cs336_alignment.compose import run_with_config

    def job(config: Config) -> ExitStatus:
        from cs336_alignment.experiments.expert_iteration import expert_iteration

        return expert_iteration(config, arguments)

    return run_with_config("expert-iteration", arguments, job)


def _sweep(arguments: Sequence[str]) -> ExitStatus:
    from cs336_alignment.compose import run_with_config

    if {"-m", "--multirun"} & set(arguments):
        raise UserError(
            "C144",
            "a sweep tries several values by itself",
            ExitStatus.USAGE,
            hint="leave -m away and give sweep.space=…; for every combination: cs336-sft train -m",
        )
    words = [*arguments, "hydra.mode=RUN"]  # whatever a preset says for `train`

    def job(config: Config) -> ExitStatus:
        from cs336_alignment.experiments.sweep import sweep

        return sweep(config, arguments)

    return run_with_config("sweep", words, job)


def _chat(arguments: Sequence[str]) -> ExitStatus:
    from cs336_alignment.compose import run_with_config

    model, overrides = take_model(arguments, "chat", "the folder of a run or model, or a hub id")

    def job(config: Config) -> ExitStatus:
        from cs336_alignment.chat_command import chat

        given = [word.split("=", 1)[0].lstrip("+~") for word in overrides if "=" in word]
        return chat(config, model, given)

    return run_with_config("chat", overrides, job)


def _export(arguments: Sequence[str]) -> ExitStatus:
    from cs336_alignment.compose import run_with_config

    run, overrides = take_model(arguments, "export", "a run, by its folder or name")

    def job(config: Config) -> ExitStatus:
        from cs336_alignment.export_command import export

        given = [word.split("=", 1)[0].lstrip("+~") for word in overrides if "=" in word]
        return export(config, run, given)

    return run_with_config("export", overrides, job)


def _env(arguments: Sequence[str]) -> ExitStatus:
    from cs336_alignment.env_command import env

    return env(arguments)


def _report(arguments: Sequence[str]) -> ExitStatus:
    from cs336_alignment.report_command import report

    words, html = take_html(arguments)
    return report(words, html)


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
            ExitStatus.USAGE,
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
        if word == "--html" or word.startswith("--html="):
            name = word.partition("=")[2] or next(words, "")
            if not name:
                raise UserError(
                    "C003", "--html needs a file", ExitStatus.USAGE, hint="--html data.html"
                )
            html = Path(name).expanduser()
        else:
            rest.append(word)
    return rest, html


VERBS = (
    Verb("train", "fine-tune a model; the same command again continues", _train),
    Verb(
        "prepare", "tokenize the data into the cache, and count what becomes of the rows", _prepare
    ),
    Verb("inspect", "see what is trained, token by token (--html FILE: a page)", _inspect),
    Verb(
        "doctor", "prove the invariances on this model and data (--memory: what it takes)", _doctor
    ),
    Verb("evaluate", "loss, generations and rewards of a model, checkpoint or export", _evaluate),
    Verb("report", "a page and plots of a run, or of several side by side", _report),
    Verb("expert-iteration", "sample, keep what is correct, train on it, again", _expert_iteration),
    Verb("sweep", "search over keys with Optuna; each trial is a run", _sweep),
    Verb("chat", "talk to a run's model, a model folder or a hub id", _chat),
    Verb("export", "a run's model or rows for others: another dtype, GGUF, the hub", _export),
    Verb("env", "what this machine and environment are, for a bug report", _env),
)


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


def refuse_foreign_flags(arguments: Sequence[str]) -> None:
    """Refuse flags of another tool's style with the override to type instead.

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
        if flag in FLAGS:
            continue
        if flag == "--html":
            skip = not equals
            continue
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        if not equals:
            value = following if following and not following.startswith("-") else "true"
        raise _foreign_flag(flag, value)


def _foreign_flag(flag: str, value: str) -> UserError:
    name = flag.lstrip("-").replace("-", "_")
    if flag in FILE_FLAGS:
        stem = os.path.splitext(os.path.basename(value))[0]
        folder = os.path.dirname(value) or "."
        hint = (
            f"put the file at {folder}/experiment/{stem}.yaml and type: "
            f"--config-dir {folder} experiment={stem}"
        )
    else:
        hint = what_was_meant(name, value) or (
            "overrides are section.key=value; `cs336-sft train --help` shows every key"
        )
    return UserError("C001", f"{flag} is not a flag of this command", ExitStatus.USAGE, hint=hint)


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
                ExitStatus.USAGE,
                expected="one of " + ", ".join(verb.name for verb in VERBS),
                hint=_verb_hint(arguments),
            )
        own = {MEMORY} if verb.name == "doctor" else set()
        refuse_foreign_flags([word for word in arguments[1:] if word not in own])
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
