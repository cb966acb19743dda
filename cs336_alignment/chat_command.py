"""`cs336-sft chat`: which model is talked to, and with the settings of which run."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from cs336_alignment.config import Config, EvaluationConfig
from cs336_alignment.cores import keep_freed_memory
from cs336_alignment.data.templates import CHAT, load_template
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.evaluation.chat import Conversation, Reply, context_of, stream_reply
from cs336_alignment.evaluation.chat_session import ChatSession, Show, tell
from cs336_alignment.evaluation.sampling import request_seed, sampling_of
from cs336_alignment.model.loading import load_model, load_tokenizer
from cs336_alignment.model.source import resolve_model
from cs336_alignment.training.checkpoint_folders import INDEX, find_latest, verify
from cs336_alignment.training.parallel import launched_processes, set_threads
from cs336_alignment.training.preflight import choose_precision
from cs336_alignment.training.run_folder import ADAPTER, CONFIG, EXPORT, LEDGER

VERBATIM = "question_only"
SETTABLE = (
    "evaluation.max_new_tokens", "evaluation.min_new_tokens", "evaluation.temperature",
    "evaluation.top_p", "evaluation.stop", "data.prompt_template", "data.add_special_tokens",
    "model.revision", "model.trust_remote_code", "model.random_init", "trainer.precision", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What is known of a model's training.

    Attributes:
        config: of the run, as its `config.yaml` has it.
        kind: format of its training rows, "" if unknown.
    """

    config: Mapping[str, Any]
    kind: str


def chat(config: Config, model: str, given: Collection[str]) -> ExitStatus:
    """Chat with a model.

    Args:
        config: of the command; what is not `given` comes from the run, if there is one.
        model: folder of a run, a checkpoint or a model, or a hub id.
        given: keys that were typed.

    Raises:
        UserError: a key that has no effect here, several processes, or a run without a model (78,
            66); and as everywhere.
    """
    if useless := sorted(key for key in given if key not in SETTABLE):
        raise UserError(
            "C150",
            f"{', '.join(useless)} has no effect on a chat",
            expected="one of " + ", ".join(SETTABLE),
        )
    if launched_processes() > 1:
        raise UserError(
            "C151",
            "a chat works in one process, and the launcher started several",
            hint=f"cs336-sft chat {model}",
        )
    location, run = find_model(model)
    options = config.model
    source = resolve_model(location, options.revision, options.trust_remote_code)
    tokenizer = load_tokenizer(source)
    trained = None if run is None else read_run(run)
    if trained is not None:
        take_settings(config, trained, given)
    elif "data.prompt_template" not in given:
        config.data.prompt_template = CHAT if tokenizer.chat_template else VERBATIM
    if trained is None and "evaluation.stop" not in given:
        tagged = load_template(config.data.prompt_template)
        if tagged is None or not tagged.tagged:
            config.evaluation.stop = []
    template = load_template(config.data.prompt_template)
    conversation = Conversation(
        tokenizer, template, add_special_tokens=config.data.add_special_tokens
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_precision(config.trainer.precision, device)
    if device.type == "cpu":
        keep_freed_memory()
    tell(f"loading {location}")
    net = load_model(source, random_init=options.random_init, seed=config.seed)
    set_threads(1, net.num_parameters())
    net.to(device).eval()  # type: ignore[arg-type]  # its decorator hides its type
    sampling = sampling_of(config.evaluation)

    def answer(prompt_ids: list[int], turn: int, show: Show, interrupted: Any) -> Reply:
        seed = request_seed(config.seed, turn, 0)
        return stream_reply(
            net, tokenizer, prompt_ids, sampling,
            seed=seed, show=show, interrupted=interrupted, autocast_dtype=dtype,
        )  # fmt: skip

    tell(_introduction(config, run))
    context = context_of(net)
    return ChatSession(
        conversation, answer, context=context, max_new_tokens=sampling.max_new_tokens
    ).run()


def find_model(name: str) -> tuple[str, Path | None]:
    """Find the weights that a name means, and the run they come from.

    Args:
        name: folder of a run: its export, else its best or latest whole checkpoint; any other
            folder or hub id: itself.

    Returns:
        A folder or hub id, and the run's folder; None: it comes from no run that is here.

    Raises:
        UserError: the run has no model yet (66).
    """
    path = Path(name).expanduser()
    for run in (path.parent, path.parent.parent):
        exported = path.name in (EXPORT, ADAPTER)
        is_part = exported if run == path.parent else path.parent.name == "checkpoints"
        if path.is_dir() and is_part and (run / CONFIG).is_file():
            return name, run
    if not (path / CONFIG).is_file():
        return name, None
    if (path / EXPORT).is_dir():
        return str(path / EXPORT), path
    checkpoints = path / "checkpoints"
    best = _best(checkpoints)
    found = best if best is not None else find_latest(checkpoints)[0]
    if found is None:
        raise UserError(
            "R331",
            f"the run {name} has no model yet, and no whole checkpoint",
            hint="wait for its first checkpoint, or name a model folder",
        )
    return str(found), path


def _best(checkpoints: Path) -> Path | None:
    try:
        name = json.loads((checkpoints / INDEX).read_text(encoding="utf-8")).get("best")
    except (OSError, ValueError, AttributeError):
        return None
    folder = checkpoints / str(name)
    return folder if name and folder.is_dir() and verify(folder) is None else None


def read_run(run: Path) -> Trained:
    """Read how a run was trained.

    Raises:
        UserError: its config cannot be read (74).
    """
    try:
        config = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no config")
    except (OSError, yaml.YAMLError, ValueError) as failure:
        raise UserError(
            "R204",
            f"cannot read {run / CONFIG}: {failure}",
            hint="name the model's own folder instead; data.prompt_template=… says how to ask",
        ) from failure
    try:
        ledger = json.loads((run / LEDGER).read_text(encoding="utf-8"))
        kind = str(ledger["train"]["format"]).partition(" ")[0]
    except (OSError, ValueError, LookupError, TypeError):
        kind = ""
    return Trained(config, kind)


def take_settings(config: Config, trained: Trained, given: Collection[str]) -> None:
    """Take from a run what was not typed: sampling, stop strings, seed, and how to ask."""
    evaluation = trained.config.get("evaluation") or {}
    for name in (field.name for field in fields(EvaluationConfig)):
        if f"evaluation.{name}" not in given and name in evaluation:
            setattr(config.evaluation, name, evaluation[name])
    data = trained.config.get("data") or {}
    if "seed" not in given:
        config.seed = int(trained.config.get("seed", config.seed))
    if "data.add_special_tokens" not in given:
        config.data.add_special_tokens = bool(data.get("add_special_tokens", True))
    if "data.prompt_template" in given:
        return
    if trained.kind in ("messages", "sharegpt"):
        config.data.prompt_template = CHAT
    elif trained.kind in ("prompt_response", "text", "tokens"):
        config.data.prompt_template = VERBATIM  # their prompts stood in the rows
    else:
        config.data.prompt_template = str(data.get("prompt_template", config.data.prompt_template))


def _introduction(config: Config, run: Path | None) -> str:
    e, name = config.evaluation, config.data.prompt_template
    how = "greedy" if e.temperature == 0 else f"temperature {e.temperature}, top_p {e.top_p}"
    asked = {
        CHAT: "one conversation, by the tokenizer's chat template",
        VERBATIM: "each line is a prompt of its own, taken as it stands",
    }.get(name, f"each line is a prompt of its own, in the template {name}: nothing is remembered")
    stops = f", or at {' '.join(map(repr, e.stop))}" if e.stop else ""
    lines = [
        *([f"settings of the run {run}"] if run is not None else []),
        asked,
        f"{how}; a reply ends at EOS{stops}, or after {e.max_new_tokens:,} tokens. /help",
    ]
    return "\n".join(lines)
