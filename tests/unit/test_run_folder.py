"""One process holds a run's folder, and a command there starts, continues, ends or is refused."""

from __future__ import annotations

import copy
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cs336_alignment.compose import TRAINING, _default_run_name
from cs336_alignment.config import ALL_KEYS, Config, DataConfig, ModelConfig, flatten
from cs336_alignment.errors import ExitStatus, Place, UserError
from cs336_alignment.experiments import study
from cs336_alignment.experiments.expert_iteration import folder_of
from cs336_alignment.training import run_folder as module
from cs336_alignment.training.checkpoint import save_checkpoint
from cs336_alignment.training.earlier_config import compare, read_config
from cs336_alignment.training.run_folder import KINDS, RunFolder
from cs336_alignment.training.snapshot import Snapshot, TrainState
from tests.conftest import ROOT


def make_config(root: Path, **changes: Any) -> Config:
    """A config with some keys (`trainer__max_steps=3`) changed."""
    config = Config(
        model=ModelConfig("org/model"), data=DataConfig("train.jsonl"),
        run_name="run", output_root=str(root),
    )  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        owner = getattr(config, section) if section else config
        assert hasattr(owner, name)
        setattr(owner, name, value)
    return config


def save(checkpoints: Path, step: int) -> Path:
    layer = nn.Linear(2, 2)
    return save_checkpoint(
        checkpoints, Snapshot.of(TrainState(step), layer, torch.optim.AdamW(layer.parameters())),
        extra={}, save_sidecars=lambda folder: None, keep=9,
    )  # fmt: skip


def start_run(root: Path, *steps: int) -> RunFolder:
    config = make_config(root)
    folder = RunFolder(config)
    folder.path.mkdir(parents=True)
    folder.write_config(config)
    for step in steps:
        save(folder.checkpoints, step)
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# What a command finds.


def test_a_new_folder_starts_from_the_beginning(tmp_path: Path) -> None:
    config = make_config(tmp_path / "new")
    for resume in ("auto", "never"):
        config.trainer.resume = resume
        decision = RunFolder(config).decide(config, completed=False)
        assert (decision.complete, decision.checkpoint, decision.notices) == (False, None, ())


def test_the_same_command_continues_at_the_newest_checkpoint(tmp_path: Path) -> None:
    folder = start_run(tmp_path, 2, 10)
    decision = folder.decide(make_config(tmp_path), completed=False)
    assert not decision.complete
    assert decision.checkpoint == folder.checkpoints / "step-000010"
    assert decision.notices == ()


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    folder = start_run(tmp_path)
    for config in (make_config(tmp_path), make_config(tmp_path, optimizer__learning_rate=1e-3)):
        decision = folder.decide(config, completed=False)
        assert not decision.complete
        assert decision.checkpoint is None


def test_a_complete_run_has_nothing_to_do_unless_it_is_made_longer(tmp_path: Path) -> None:
    folder = start_run(tmp_path, 3)
    # Without its model a run is not complete: it is exported again.
    assert not folder.decide(make_config(tmp_path), completed=True).complete
    (folder.path / "model").mkdir()
    assert folder.decide(make_config(tmp_path), completed=True).complete
    longer = folder.decide(make_config(tmp_path, trainer__num_train_epochs=5.0), completed=True)
    assert not longer.complete
    assert longer.checkpoint == folder.checkpoints / "step-000003"
    assert any("3.0 to 5.0" in notice for notice in longer.notices)


def test_a_damaged_checkpoint_is_passed_over_with_its_reason(tmp_path: Path) -> None:
    folder = start_run(tmp_path, 1, 2)
    flip(folder.checkpoints / "step-000002" / "model.safetensors")
    decision = folder.decide(make_config(tmp_path), completed=False)
    assert decision.checkpoint == folder.checkpoints / "step-000001"
    (notice,) = decision.notices
    assert "step-000002" in notice and "sha256" in notice


def test_a_run_never_silently_starts_from_zero(tmp_path: Path) -> None:
    folder = start_run(tmp_path, 1, 2)
    for step in (1, 2):
        flip(folder.checkpoints / f"step-00000{step}" / "optimizer.safetensors")
    with pytest.raises(UserError) as caught:
        folder.decide(make_config(tmp_path), completed=False)
    assert caught.value.status == ExitStatus.IO
    assert "step-000001" in str(caught.value) and "step-000002" in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "- a\n", "a: [\n", b"\xff\xfe\x00"])
def test_checkpoints_without_a_readable_config_are_refused(
    tmp_path: Path, content: str | bytes | None
) -> None:
    folder = start_run(tmp_path, 1)
    config_path = folder.path / "config.yaml"
    if content is None:
        config_path.unlink()
    else:
        config_path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"config\.yaml") as caught:
        folder.decide(make_config(tmp_path), completed=False)
    assert caught.value.status == ExitStatus.IO


def test_resume_never_keeps_what_is_there(tmp_path: Path) -> None:
    folder = start_run(tmp_path, 1)
    before = sorted(folder.path.rglob("*"))
    with pytest.raises(UserError, match="resume=never") as caught:
        folder.decide(make_config(tmp_path, trainer__resume="never"), completed=False)
    assert caught.value.status == ExitStatus.CANNOT_CREATE
    assert sorted(folder.path.rglob("*")) == before


def test_an_explicit_checkpoint_is_used_whole_or_refused(tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "elsewhere", 4)

    def decide(path: Path) -> module.Decision:
        config = make_config(tmp_path / "new", trainer__resume=str(path))
        return RunFolder(config).decide(config, completed=False)

    decision = decide(checkpoint)
    assert decision.checkpoint == checkpoint
    assert str(checkpoint) in decision.notices[0]
    with pytest.raises(UserError, match="no checkpoint") as missing:
        decide(tmp_path / "nowhere")
    assert missing.value.status == ExitStatus.NOT_FOUND
    flip(checkpoint / "trainer_state.json")
    with pytest.raises(UserError, match="damaged") as damaged:
        decide(checkpoint)
    assert damaged.value.status == ExitStatus.IO


def test_the_same_command_with_an_explicit_checkpoint_continues_its_own_run(
    tmp_path: Path,
) -> None:
    elsewhere = save(tmp_path / "elsewhere", 4)
    folder = start_run(tmp_path, 5, 6)
    config = make_config(tmp_path, trainer__resume=str(elsewhere))
    latest = folder.decide(config, completed=False).checkpoint
    assert latest is not None and latest == folder.checkpoints / "step-000006"
    earlier = folder.checkpoints / "step-000005"
    config = make_config(tmp_path, trainer__resume=str(earlier))
    with pytest.raises(UserError, match="not the latest") as caught:
        folder.decide(config, completed=False)
    assert caught.value.status == ExitStatus.BAD_CONFIG and "run_name=run-2" in str(caught.value)
    config = make_config(tmp_path, trainer__resume=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no checkpoint"):
        folder.decide(config, completed=False)


def test_an_explicit_checkpoint_starts_again_a_run_that_has_none(tmp_path: Path) -> None:
    elsewhere = save(tmp_path / "elsewhere", 4)
    folder = start_run(tmp_path)
    config = make_config(tmp_path, trainer__resume=str(elsewhere))
    assert folder.decide(config, completed=False).checkpoint == elsewhere


# What may change between a stop and a restart.


def keys_of_page(heading: str) -> set[str]:
    """The keys in a row of the table in the documents: the page is what is tested."""
    lines = (ROOT / "docs" / "reliability.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("|") and f"| {heading}" in line]
    return set(re.findall(r"`([a-z_]+\.[a-z_.*]+|run_name|output_root)`", row.split("|")[1]))


FREE, NOTICED = keys_of_page("free"), keys_of_page("allowed, with a notice")
CUT = {"trainer.microbatch_tokens", "trainer.gradient_accumulation_steps", "trainer.batching"}


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return [*value, *(value[:1] or [5])]
    return f"{value}-other" if value else 7


def compare_one(key: str, normalization: str = "token") -> tuple[Any, Any, list[str], bool]:
    """Compare two configs that differ in one key."""
    config = make_config(Path("root"), trainer__loss_normalization=normalization)
    old = dict(flatten(copy.deepcopy(config)))
    *sections, name = key.split(".")
    owner: Any = config
    for section in sections:
        owner = getattr(owner, section)
    before, after = getattr(owner, name), changed(getattr(owner, name))
    setattr(owner, name, after)
    return before, after, *compare(old, config, Place("config.yaml"))


@pytest.mark.parametrize("key", ALL_KEYS)
@pytest.mark.fault("T21 each option changed between stop and restart")
def test_each_key_is_free_or_noticed_or_refused(key: str) -> None:
    if any(fnmatch(key, free) for free in FREE):
        assert compare_one(key)[2:] == ([], False)
    elif key in NOTICED:
        before, after, notices, lengthened = compare_one(key)
        assert notices[0] == f"{key} changed from {before} to {after}"
        assert lengthened == (key in ("trainer.max_steps", "trainer.num_train_epochs"))
    else:
        with pytest.raises(UserError) as caught:
            compare_one(key)
        assert caught.value.status == ExitStatus.BAD_CONFIG


def test_a_refusal_shows_every_key_with_old_and_new_value_and_what_to_type(tmp_path: Path) -> None:
    folder = start_run(tmp_path, 1)
    config = make_config(tmp_path, seed=43, optimizer__learning_rate=1e-3, trainer__max_steps=9)
    with pytest.raises(UserError) as caught:
        folder.decide(config, completed=False)
    text = str(caught.value)
    assert caught.value.status == ExitStatus.BAD_CONFIG
    assert "seed: 42 → 43" in text
    assert "optimizer.learning_rate: 2e-05 → 0.001" in text
    assert "max_steps" not in text
    assert "run_name=run-2" in text
    assert str(folder.path / "config.yaml") in text


@pytest.mark.parametrize("key", sorted(CUT))
def test_the_cut_may_not_change_where_it_is_part_of_the_loss(key: str) -> None:
    with pytest.raises(UserError, match="changes training"):
        compare_one(key, normalization="microbatch")


def test_a_written_config_reads_back_without_a_difference(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, optimizer__eps=1e-30, data__train_path="a: b # ü\n", data__prompt_template="1e5",
        model__revision="0123", evaluation__stop=["</answer>", "no"],
    )  # fmt: skip
    folder = RunFolder(config)
    folder.path.mkdir(parents=True)
    folder.write_config(config)
    old = read_config(folder.path / "config.yaml")
    assert old == dict(flatten(config))
    assert compare(old, config, Place("config.yaml")) == ([], False)


# Who holds the folder.


@pytest.mark.fault("T20 two runs in one folder")
def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    config = make_config(tmp_path / "with spaces and ü")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            folder = RunFolder(config)  # whose lock lasts as long as it
            folder.claim()
            os.write(write, b"!")
            signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(read, 1) == b"!"
        with pytest.raises(UserError, match="another process") as caught:
            RunFolder(config).claim()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
    assert caught.value.status == ExitStatus.CANNOT_CREATE
    assert caught.value.got == f"process {child} on {socket.gethostname()}"
    RunFolder(config).claim()  # a lock dies with its holder


@pytest.mark.fault("T20 two runs in one folder")
def test_the_lock_names_its_new_holder_only(tmp_path: Path) -> None:
    folder = RunFolder(make_config(tmp_path))
    folder.path.mkdir(parents=True)
    (folder.path / "run.lock").write_text("process 123456789 on a machine with a long name\n")
    folder.claim()
    text = (folder.path / "run.lock").read_text()
    assert text == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_file_system_without_locks_is_not_taken_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", fail)
    with pytest.raises(UserError, match="No locks available") as caught:
        RunFolder(make_config(tmp_path)).claim()
    assert caught.value.status == ExitStatus.CANNOT_CREATE


@pytest.mark.parametrize("obstacle", ["root below a file", "folder is a file", "folder is a link"])
@pytest.mark.fault("T19 an output folder that cannot be used")
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, obstacle: str) -> None:
    config = make_config(tmp_path)
    if obstacle == "root below a file":
        (tmp_path / "file").write_text("")
        config.output_root = str(tmp_path / "file" / "below")
    elif obstacle == "folder is a file":
        (tmp_path / "run").write_text("")
    else:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot write") as caught:
        RunFolder(config).claim()
    assert caught.value.status == ExitStatus.CANNOT_CREATE
    assert caught.value.hint is not None and "output_root=" in caught.value.hint


# What is gone or damaged beside the checkpoints.


@pytest.mark.fault("T7 a file of the run missing or damaged")
def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(tmp_path: Path) -> None:
    folder = start_run(tmp_path)
    with pytest.raises(UserError, match="R201") as caught:
        folder.decide(make_config(tmp_path), completed=False, saved_step=20)
    assert caught.value.status == ExitStatus.IO and "step 20 was reached" in str(caught.value)
    (folder.path / "model").mkdir()
    assert folder.decide(make_config(tmp_path), completed=True, saved_step=20).complete
    other = make_config(tmp_path, optimizer__learning_rate=1e-3)
    for saved_step in (20, 0):  # 0: status.json is gone, too
        with pytest.raises(UserError, match="C301"):
            folder.decide(other, completed=saved_step > 0, saved_step=saved_step)


@pytest.mark.parametrize("damage", ["missing", "changed"])
@pytest.mark.fault("T7 a file of the run missing or damaged")
def test_a_damaged_export_is_written_once_more(tmp_path: Path, damage: str) -> None:
    folder, config = start_run(tmp_path, 4), make_config(tmp_path)
    weights = folder.path / "model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    folder.write_json("manifest.json", {"export": {"model.safetensors": digest}})
    (weights.parent / "README.md").write_text("a card that a person may edit")
    assert folder.decide(config, completed=True, saved_step=4).complete
    weights.unlink() if damage == "missing" else weights.write_bytes(b"weightz")
    decision = folder.decide(config, completed=True, saved_step=4)
    assert not decision.complete and decision.checkpoint is not None
    assert "model.safetensors" in decision.notices[0]


def test_what_the_earlier_part_noted(tmp_path: Path) -> None:
    folder = start_run(tmp_path)
    note = {"data_sha256": "a", "wandb_run_id": "w"}
    folder.write_json("manifest.json", note)
    assert folder.earlier_part(None) == {"wandb_run_id": "w"}  # nothing was trained on that data
    layer = nn.Linear(2, 2)
    saved = save_checkpoint(
        folder.checkpoints, Snapshot.of(TrainState(3), layer, torch.optim.AdamW(layer.parameters())),
        extra={"manifest": note}, save_sidecars=lambda folder: None, keep=9,
    )  # fmt: skip
    assert folder.earlier_part(saved) == note
    (folder.path / "manifest.json").unlink()
    assert folder.earlier_part(saved) == note  # as the verified checkpoint has it
    assert folder.earlier_part(save(tmp_path / "elsewhere", 3)) == {}


def test_a_lock_that_was_taken_away_is_noticed(tmp_path: Path) -> None:
    folder = RunFolder(make_config(tmp_path))
    folder.claim()
    folder.check_lock()
    (folder.path / "run.lock").unlink()
    with pytest.raises(UserError, match="R102"):
        folder.check_lock()
    (folder.path / "run.lock").touch()  # another process's
    with pytest.raises(UserError, match="R102"):
        folder.check_lock()


@pytest.mark.slow
@pytest.mark.fault("T5 a child that outlives its parent")
def test_a_child_that_outlives_its_parent_holds_no_lock(tmp_path: Path) -> None:
    code = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.unit.test_run_folder import RunFolder, make_config
RunFolder(make_config(Path({str(tmp_path)!r}))).claim()
if (child := os.fork()) == 0:
    time.sleep(30)
    os._exit(0)
print(child, flush=True)
os._exit(1)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60,
        start_new_session=True,
    )  # fmt: skip
    try:
        RunFolder(make_config(tmp_path)).claim()
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


@pytest.mark.parametrize("holds", KINDS)
def test_a_folder_is_not_given_to_another_kind_of_command(tmp_path: Path, holds: str) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / KINDS[holds]).touch()
    for kind in KINDS:
        if kind != holds:
            with pytest.raises(UserError, match=f"holds {holds}") as caught:
                RunFolder(make_config(tmp_path)).claim(kind)
            assert caught.value.status == ExitStatus.CANNOT_CREATE
    assert [child.name for child in path.iterdir()] == [KINDS[holds]]
    RunFolder(make_config(tmp_path)).claim(holds)


def test_the_kinds_are_told_apart_by_what_their_commands_leave() -> None:
    assert KINDS["a sweep"] == study.FILE
    assert KINDS["an expert iteration"] == folder_of(Path(), 1).name


def test_commands_on_the_same_model_and_data_have_folders_of_their_own() -> None:
    config = Config(model=ModelConfig("org/m"), data=DataConfig("rows.jsonl"))
    names = {verb: _default_run_name(config, verb) for verb in TRAINING}
    assert names["train"] == "m-rows" and len(set(names.values())) == len(TRAINING)
