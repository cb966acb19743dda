"""A checkpoint is whole or it is not used, restores bit for bit, and survives kill and full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from cs336_alignment.config import OptimizerConfig
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.model.loading import load_tokenizer
from cs336_alignment.model.source import resolve_model
from cs336_alignment.training import checkpoint_folders
from cs336_alignment.training.checkpoint import restore, save_checkpoint
from cs336_alignment.training.checkpoint_folders import (
    find_latest,
    list_checkpoints,
    remove_leftovers,
    verify,
)
from cs336_alignment.training.export import export_model, save_sidecars
from cs336_alignment.training.optimizer import build_optimizer
from cs336_alignment.training.safetensors_file import DTYPE_NAMES, write_safetensors
from cs336_alignment.training.snapshot import (
    Snapshot,
    TrainState,
    module_tensors,
    optimizer_tensors,
)
from tests.checkpoints import FILES, Tiny, build, save, sidecars, take_step

CPU = torch.device("cpu")
# The format.


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_tensors_read_back_with_the_library(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    whole = (torch.randn(6, 5) * 50).to(dtype)
    tensors = {
        "odd": torch.ones(3, dtype=torch.uint8),  # what follows begins at an odd byte
        "whole": whole,
        "transposed": whole.T,
        "every second row": whole[::2],
        "scalar": whole[0, 0],
        "empty": whole[:0],
        "ü": nn.Parameter(whole) if dtype.is_floating_point else whole,
    }
    entry = write_safetensors(tmp_path / "x.safetensors", tensors)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert int.from_bytes(data[:8], "little") % 8 == 0  # the data begin aligned


def test_values_that_are_no_numbers_keep_their_bits(tmp_path: Path) -> None:
    values = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    write_safetensors(tmp_path / "x.safetensors", {"v": values})
    read = load_file(tmp_path / "x.safetensors")["v"]
    assert torch.equal(read.view(torch.int32), values.view(torch.int32))


# Saving and restoring.


def test_the_step_after_a_restore_is_bit_identical(tmp_path: Path) -> None:
    tiny, optimizer = build()
    for step in range(3):
        take_step(tiny, optimizer, step)
    folder = save_checkpoint(
        tmp_path, Snapshot.of(TrainState(3, 30, 15), tiny, optimizer),
        extra={}, save_sidecars=sidecars, keep=1,
    )  # fmt: skip
    other, other_optimizer = build(seed=1)
    state = restore(folder, other, other_optimizer)
    assert state == TrainState(3, 30, 15)
    assert other.head.weight is other.embedding.weight
    assert other.scratch[0] == 1  # not saved, so not restored
    for step in (3, 4):
        take_step(tiny, optimizer, step)
        take_step(other, other_optimizer, step)
        tensors, others = module_tensors(tiny), module_tensors(other)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)
        moments = optimizer_tensors(tiny, optimizer)
        other_moments = optimizer_tensors(other, other_optimizer)
        assert moments.keys() == other_moments.keys()
        assert all(torch.equal(moments[name], other_moments[name]) for name in moments)
    assert any(key.startswith("exp_avg_sq:") for key in moments)


def test_a_tied_weight_is_saved_once_and_buffers_if_persistent(tmp_path: Path) -> None:
    names = load_file(save(tmp_path, 1) / "model.safetensors").keys()
    assert {"embedding.weight", "norm.running_mean", "norm.num_batches_tracked"} <= names
    assert not {"head.weight", "scratch"} & names


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    for other in (nn.Linear(2, 2), Tiny(0).double()):
        if isinstance(other, Tiny):
            other.middle = nn.Linear(6, 5)
        with pytest.raises(UserError, match="another model") as caught:
            restore(folder, other, torch.optim.AdamW(other.parameters()))
        assert caught.value.status == ExitStatus.IO


def test_a_checkpoint_lists_all_its_files_and_is_the_latest(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert manifest.keys() == files - {"manifest.json"} == set(FILES) - {"manifest.json"}
    assert verify(folder) is None
    assert json.loads((tmp_path / "index.json").read_text())["latest"] == "step-000007"
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["progress"] == {
        "step": 7, "tokens_seen": 70, "response_tokens_seen": 35, "skipped_steps": 0,
        "recent_losses": [],
    }  # fmt: skip
    assert state["note"] == "n"
    assert {path.name for path in tmp_path.iterdir()} == {"step-000007", "index.json"}


# Damage.

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "a byte less": lambda data: data[:-1],
    "a byte more": lambda data: data + b"\n",
    "first bit flipped": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "last bit flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.fault("T7 a file missing, emptied or of another length")
def test_damage_is_noticed_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: str
) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    path = newest / name
    data = DAMAGES[damage](path.read_bytes())
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    reason = verify(newest)
    if name == "manifest.json" and damage in ("a byte more", "a byte less"):
        assert reason is None  # white space of the only file that has no hash
        return
    assert reason is not None
    assert name in reason
    latest, skipped = find_latest(tmp_path)
    assert latest == before
    assert skipped == {newest: f"{newest}: {reason}"}
    if name != "manifest.json":
        path.parent.joinpath(path.name).unlink(missing_ok=True)
        path.mkdir()  # something else in its place
        assert verify(newest) is not None


@pytest.mark.parametrize(
    "entry",
    [
        {"../outside": "right"},
        {"templates/../../outside": "right"},
        {"/etc/hostname": "right"},
        {"extra.bin": {"bytes": 1, "sha256": ""}},
        {"config.json": None},
        {"config.json": {}},
        {"config.json": {"bytes": "18"}},
    ],
)
@pytest.mark.fault("T9 a manifest that is wrong or leads outside")
def test_a_manifest_with_a_wrong_entry_is_refused(
    tmp_path: Path, entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = tmp_path / "checkpoints"
    folder = save(checkpoints, 1)
    (checkpoints / "outside").write_bytes(b"secret")
    right = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {key: right if value == "right" else value for key, value in entry.items()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    opened: list[Path] = []
    read = checkpoint_folders.sha256_of
    monkeypatch.setattr(
        checkpoint_folders, "sha256_of", lambda path: (opened.append(path), read(path))[1]
    )
    assert verify(folder) is not None
    assert all(path.resolve().is_relative_to(folder.resolve()) for path in opened)


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"model.safetensors": {}}', "\udcff"])
@pytest.mark.fault("T9 a manifest that is wrong or leads outside")
def test_a_manifest_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    folder = save(tmp_path, 1)
    (folder / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    assert "manifest.json" in (verify(folder) or "")


@pytest.mark.fault("T7 a file that cannot be read")
def test_a_file_that_the_system_cannot_read_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    read = checkpoint_folders.sha256_of

    def fail(path: Path) -> str:
        if path.is_relative_to(newest):
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(checkpoint_folders, "sha256_of", fail)
    latest, skipped = find_latest(tmp_path)
    assert latest == before
    assert "Input/output error" in skipped[newest]


@pytest.mark.fault("T29 shuffled times of checkpoints")
def test_the_newest_is_chosen_by_its_step_not_by_its_time(tmp_path: Path) -> None:
    for step, time in ((2, 3e9), (9, 2e9), (10, 1e9)):
        os.utime(save(tmp_path, step), (time, time))
    assert find_latest(tmp_path) == (tmp_path / "step-000010", {})


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    whole = save(tmp_path, 1)
    for name in (".tmp-step-000009-1", "step-000009.bak", "step-9", "step-xxxxxx"):
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / "step-000008").write_text("a file")
    assert list_checkpoints(tmp_path) == [whole]
    assert find_latest(tmp_path / "nowhere") == (None, {})


class Trap:
    """What a pickle can do: leave a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("through", ["pickle", "torch"])
@pytest.mark.fault("T10 a malicious pickle in place of a tensor file")
def test_no_pickle_is_ever_loaded(tmp_path: Path, name: str, through: str) -> None:
    folder, canary = save(tmp_path / "checkpoints", 1), tmp_path / "canary"
    if through == "torch":
        torch.save({"x": Trap(canary)}, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(Trap(canary)))
    assert verify(folder) is not None
    data = (folder / name).read_bytes()  # whoever plants a pickle can mend the manifest too
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert verify(folder) is None
    with pytest.raises(Exception, match="header"):
        restore(folder, *build())
    assert not canary.exists()


# Rotation.


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert {folder.name for folder in list_checkpoints(tmp_path)} == {"step-000003", "step-000010"}


@pytest.mark.fault("T7 a damaged later checkpoint in rotation")
def test_a_later_damaged_one_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    damaged = save(tmp_path, 3)
    (damaged / "model.safetensors").write_bytes(b"")
    saved = save(tmp_path, 2, keep=1)  # the run went on from step 1
    assert find_latest(tmp_path)[0] == saved
    again = save(tmp_path, 3, keep=1)
    assert (again, verify(again)) == (damaged, None)
    assert list_checkpoints(tmp_path) == [again]


def test_one_of_this_step_that_could_not_be_read_at_the_start_is_replaced(tmp_path: Path) -> None:
    """Memory and disk must be the same, even if the old one verifies again by now."""
    tiny, optimizer = build()
    folder = save(tmp_path, 1)
    with torch.no_grad():
        tiny.middle.weight.fill_(9)
    again = save_checkpoint(
        tmp_path, Snapshot.of(TrainState(1), tiny, optimizer), extra={}, save_sidecars=sidecars,
        keep=1,
    )  # fmt: skip
    other, its = build(seed=1)
    restore(again, other, its)
    assert again == folder and (other.middle.weight == 9).all()
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", "index.json"}


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_one_does_not_count_among_those_that_stay(tmp_path: Path, keep: int) -> None:
    whole, damaged = save(tmp_path, 5), save(tmp_path, 10)
    (damaged / "model.safetensors").unlink()
    latest, skipped = find_latest(tmp_path)
    assert latest == whole
    newest = save(tmp_path, 12, keep=keep, damaged=tuple(skipped))
    stay = {newest, whole} if keep == 2 else {newest}
    assert {path for path in tmp_path.iterdir() if path.is_dir()} == stay


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".tmp-step-000002-77").mkdir()
    (tmp_path / ".tmp-step-000002-77" / "model.safetensors").write_text("half")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", "index.json"}
    remove_leftovers(tmp_path / "nowhere")


# A disk that refuses.


def test_the_error_of_a_full_disk_tells_the_path_the_need_and_the_room(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:  # as tokenizers' writer does, which is Rust's
        raise Exception("No space left on device (os error 28)")

    with pytest.raises(UserError) as caught:
        save(tmp_path, 1, save_sidecars=fail)
    text = str(caught.value)
    assert caught.value.status == ExitStatus.IO
    assert f"{tmp_path}/step-000001: No space left on device" in text
    assert "MiB free" in text
    assert list(tmp_path.iterdir()) == []


def test_a_failure_that_is_not_the_disks_is_raised_as_it_is(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="ours"):
        save(tmp_path, 1, save_sidecars=fail)
    assert list(tmp_path.iterdir()) == []


def test_everything_is_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    sync, rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        happened.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        happened.append(f"rename to {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    save(tmp_path, 1)
    here = happened.index("rename to step-000001")
    before = [name.removeprefix(".") for name in happened[:here]]
    assert {Path(name).name for name in FILES} <= set(before)
    assert before[-2] == "manifest.json"
    assert before[-1].startswith("tmp-step-000001")  # the folder's own entries
    assert happened[here + 1] == tmp_path.name


@pytest.mark.fault("T32 files left open over many saves")
def test_many_saves_leave_no_files_open(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = len(os.listdir("/proc/self/fd"))
    for step in range(2, 12):
        save(tmp_path, step, keep=2)
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(list(tmp_path.iterdir())) == 3


# As Hugging Face folders.


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve_model("builtin:arithmetic", None, False))


def build_llama(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        )
    )  # fmt: skip


def assert_loads(folder: Path, model: LlamaForCausalLM) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tensors, others = module_tensors(model), module_tensors(loaded)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size


def test_a_checkpoint_and_an_export_load_with_transformers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build_llama(tokenizer)
    # Llama 2's, which transformers reads but does not write.
    model.generation_config = GenerationConfig(temperature=0.9, do_sample=False)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    try:
        folder = save_checkpoint(
            tmp_path / "checkpoints",
            Snapshot.of(TrainState(1), model, build_optimizer(model, OptimizerConfig())),
            extra={}, save_sidecars=lambda path: save_sidecars(path, model, tokenizer), keep=1,
        )  # fmt: skip
        old = tmp_path / "model"
        old.mkdir()
        (old / "stale.txt").write_text("of an export before")
        (tmp_path / ".model.new").mkdir()  # of one that was killed
        export_model(old, model, tokenizer, "# card\n")
    finally:
        tokenizer.chat_template = None
    assert verify(folder) is None
    for path in (folder, old):
        assert_loads(path, model)
        assert (path / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "model"}
    assert not (old / "stale.txt").exists()
    assert (old / "README.md").read_text() == "# card\n"
    umask = os.umask(0)
    os.umask(umask)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in old.rglob("*") if p.is_file()}
    assert modes == {0o666 & ~umask}
    # By its mode: root may enter any folder.
    assert (old / "additional_chat_templates").stat().st_mode & stat.S_IXUSR
