"""What goes to the hub: a real upload over HTTP, to a hub on this machine; and what stays here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from huggingface_hub import constants

from cs336_alignment import cli
from cs336_alignment.config import HubConfig
from cs336_alignment.errors import UserError
from cs336_alignment.model.loading import load_model, load_tokenizer
from cs336_alignment.model.source import resolve_model
from cs336_alignment.sharing import model_export
from cs336_alignment.sharing.hub import announce
from cs336_alignment.training.reload_check import ReloadResult
from tests.conftest import TINY, Sft
from tests.fake_hub import TOKEN, USER, FakeHub, fake_hub

PUSH = "hub.push_to_hub=true"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that this process takes for the one."""
    with fake_hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.fixture
def command(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_export, "check_export", lambda *_, **__: ReloadResult("passed"))
    return ["train", *TINY, f"data.train_path={rows}", "run_name=r", "trainer.max_steps=2"]


def test_a_run_is_pushed_at_its_end_once(
    command: list[str], hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.broken = "/commit/"
    assert cli.run([*command, PUSH]) == 0
    printed = capsys.readouterr()
    assert "not pushed" in printed.err and "error[R371]" in printed.err
    assert "to try again: " in printed.err and PUSH in printed.err
    run = tmp_path / "outputs/r"
    assert json.loads((run / "status.json").read_text())["state"] == "completed"
    hub.broken = None
    (run / "run.lock").unlink()  # this process holds it until its end
    assert cli.run([*command, PUSH]) == 0  # what is told to type
    printed = capsys.readouterr()
    assert "nothing to do" in printed.out and f"{hub.url}/{USER}/r" in printed.out
    files = hub.files[f"{USER}/r"]
    assert files.keys() == {path.name for path in (run / "model").iterdir()}
    for name, content in files.items():
        assert content == (run / "model" / name).read_bytes(), name
    assert f'name = "{USER}/r"  # this folder' in files["README.md"].decode()
    assert hub.private[f"{USER}/r"] and hub.messages == ["r, step 2"]
    (run / "run.lock").unlink()
    assert cli.run([*command, PUSH]) == 0
    assert "pushed by an earlier command" in capsys.readouterr().out
    assert len(hub.messages) == 1
    everything = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in everything)


@pytest.mark.slow
def test_an_export_is_pushed_under_the_name_that_was_asked_for(
    command: list[str], hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(command) == 0
    hub.files["team/model"] = {"model.safetensors": b"old", "notes.txt": b"kept"}
    words = ["export", "r", "export.max_shard_size=300KB", PUSH, "hub.hub_model_id=team/model"]
    hub.broken = "lfs"
    assert cli.run(words) == 74
    error = capsys.readouterr().err
    assert "error[R371]" in error and "cs336-sft export r export.max_shard_size=300KB" in error
    hub.broken = None
    assert cli.run(words) == 0
    assert f"{hub.url}/team/model" in capsys.readouterr().out
    files = hub.files["team/model"]
    assert "model.safetensors" not in files and "export.json" not in files  # loaders would take it
    assert files["notes.txt"] == b"kept" and "model.safetensors.index.json" in files


def test_an_adapter_is_pushed_where_nothing_else_is_exported(
    rows: Path, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base"
    source = resolve_model("builtin:arithmetic", None, False)
    load_model(source, random_init=True, seed=0).save_pretrained(base)
    load_tokenizer(source).save_pretrained(base)
    words = ["train", *TINY, f"model.name_or_path={base}", "model.random_init=false", "lora.r=2",
             "lora.export=adapter", f"data.train_path={rows}", "run_name=r", "trainer.max_steps=1",
             PUSH]  # fmt: skip
    assert cli.run(words) == 0
    assert f"hub      {hub.url}/{USER}/r" in capsys.readouterr().out
    run, files = tmp_path / "outputs/r", hub.files[f"{USER}/r"]
    assert files.keys() == {path.name for path in (run / "adapter").iterdir()}
    assert files["adapter_model.safetensors"] and b"library_name: peft" in files["README.md"]
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["pushed"]["adapter"] == manifest["adapter"]
    (run / "run.lock").unlink()
    assert cli.run(words) == 0
    assert "pushed by an earlier command" in capsys.readouterr().out and len(hub.messages) == 1
    # Without a card nothing is pushed, and no repository made.
    (run / "run.lock").unlink()
    (run / "adapter/README.md").unlink()
    assert cli.run([*words, "hub.hub_model_id=ann/other"]) == 0
    assert "error[R371]" in capsys.readouterr().err and f"{USER}/other" not in hub.files


def test_the_token_is_the_main_processes_alone(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("cs336_alignment.sharing.hub.get_token", lambda: None)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(UserError, match="C170") if rank == "0" else nullcontext():
            announce(HubConfig(push_to_hub=True), pytest.fail)


def test_nothing_is_sent_offline_or_without_a_token(
    command: list[str], hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("cs336_alignment.sharing.hub.get_token", lambda: None)
    assert cli.run([*command, PUSH]) == 78
    assert "error[C170]" in capsys.readouterr().err and not (tmp_path / "outputs").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli.run([*command, PUSH]) == 0
    printed = capsys.readouterr()
    assert "HF_HUB_OFFLINE=1: nothing will be pushed" in printed.err
    assert "hub      not pushed: HF_HUB_OFFLINE=1" in printed.out
    assert cli.run(["export", "r", PUSH]) == 0
    assert "hub      not pushed: HF_HUB_OFFLINE=1" in capsys.readouterr().out
    assert hub.files == {}
    for words, code in (
        (["sweep", *command[1:], PUSH, "sweep.space.seed=[1,2]"], "C171"),
        (["train", "-m", *command[1:], PUSH, "hub.hub_model_id=a/b", "seed=1,2"], "C172"),
        ([*command, "hub.hub_model_id=a/b"], "C104"), ([*command, PUSH, "hub.hub_model_id=a/b/c"], "C103"),
    ):  # fmt: skip
        assert cli.run(words) == 78, words
        assert f"error[{code}]" in capsys.readouterr().err


@pytest.mark.slow
def test_the_environment_alone_says_where_and_as_whom(command: list[str], sft: Sft) -> None:
    with fake_hub() as hub:
        done = sft(
            *command, PUSH, "hub.hub_private_repo=false",
            env={"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN,
                 "HF_HUB_DISABLE_XET": "1"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.files[f"{USER}/r"] and not hub.private[f"{USER}/r"]
    assert TOKEN not in done.stdout + done.stderr
