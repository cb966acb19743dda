"""The Hugging Face hub: a model's folder goes there with its card, in one upload.

The token comes from the environment (`HF_TOKEN`, or what `hf auth login` left), as huggingface_hub
finds it; no config, no file and no message of this program ever holds it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token

from cs336_alignment.config import HubConfig
from cs336_alignment.errors import UserError
from cs336_alignment.files import write_json, write_text
from cs336_alignment.tracking.run_record import MANIFEST
from cs336_alignment.training.parallel import is_main_process_before_start

OFFLINE = "HF_HUB_OFFLINE=1"
# Weights of an earlier upload in other files, which loaders might take for those of now.
STALE = ["*.safetensors", "*.safetensors.index.json", "*.gguf"]
NAME_LINE = re.compile(r"^name = .*  # this folder", re.MULTILINE)  # of the card


def announce(config: HubConfig, warn: Callable[[str], None]) -> None:
    """Say or refuse, before anything is made, what would keep it from being pushed: by the main
    process, where the token must be.

    Args:
        config: the hub section.
        warn: prints a warning.

    Raises:
        UserError: nobody is logged in (78).
    """
    if not config.push_to_hub or not is_main_process_before_start():
        return
    if constants.is_offline_mode():
        warn(f"hub.push_to_hub=true and {OFFLINE}: nothing will be pushed")
    elif get_token() is None:
        raise UserError(
            "C170",
            "hub.push_to_hub=true, and there is no token for the hub",
            hint="set HF_TOKEN, or type `hf auth login`",
        )


def push(
    folder: Path, config: HubConfig, name: str, *, message: str, again: str, leave: list[str]
) -> str | None:
    """Upload a folder, and make its repository if there is none.

    What a repository already holds is not sent again, so another try after a failure is cheap.

    Args:
        folder: of the model; its card gets the repository's name.
        config: the hub section.
        name: of the repository, where the config names none.
        message: of the commit.
        again: the command that tries once more.
        leave: files that stay here.

    Returns:
        The address of the model on the hub; None: the hub is switched off, and nothing was sent.

    Raises:
        UserError: it cannot be pushed (74); the folder is as it was, but for that name.
    """
    if constants.is_offline_mode():
        return None
    wanted = config.hub_model_id or name
    try:
        hub, card = HfApi(), folder / "README.md"
        text = card.read_text(encoding="utf-8")  # first: no repository for what is not there
        made = hub.create_repo(wanted, private=config.hub_private_repo, exist_ok=True)
        line = f"name = {json.dumps(made.repo_id)}  # this folder"
        write_text(card, NAME_LINE.sub(lambda _: line, text))
        hub.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message=message,
            delete_patterns=list(STALE), ignore_patterns=leave,
        )  # fmt: skip
    except Exception as failure:  # of the network, the hub, or the disk
        reason = (str(failure) or type(failure).__name__).strip().splitlines()[0]
        raise UserError(
            "R371",
            f"{folder} could not be pushed to {wanted}: {reason}",
            hint=f"nothing here is lost; to try again: {again}",
        ) from failure
    return str(made)


def push_run(
    exports: Mapping[str, Path], config: HubConfig, *, again: str, note: Callable[[str], None],
    warn: Callable[[str], None],
) -> None:  # fmt: skip
    """Push the model of a run that is complete, or its adapter where it exports that alone, if its
    manifest does not say that it is there. A failure is told, and is none of the run's.

    Args:
        exports: of the run, whose folder this process holds, by the manifest's name for their
            hashes.
        config: the hub section.
        again: the command that tries once more.
        note: prints a line.
        warn: prints a warning.
    """
    if not config.push_to_hub:
        return
    key = "export" if "export" in exports else "adapter"
    run = exports[key].parent
    path, name = run / MANIFEST, run.resolve().name
    manifest = json.loads(path.read_text(encoding="utf-8"))
    wanted = {"to": config.hub_model_id or name, key: manifest.get(key)}
    pushed = manifest.get("pushed") or {}
    if {key: pushed.get(key) for key in wanted} == wanted:
        note(f"hub      {pushed['url']}  (pushed by an earlier command)")
        return
    message = f"{name}, step {manifest.get('export_step')}"
    try:
        url = push(exports[key], config, name, message=message, again=again, leave=[])
    except UserError as error:
        warn(f"the run is complete, and its model was not pushed\n{error}")
        return
    if url is None:
        note(f"hub      not pushed: {OFFLINE}; without it: {again}")
        return
    write_json(path, {**manifest, "pushed": {**wanted, "url": url}})
    note(f"hub      {url}")
