"""A checkpoint is whole or it is not used, restores bit for bit, and survives kill and full disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
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
from cs336_alignment.model.loading import load_tokenizer, resolve_model
from cs336_alignment.training import checkpoint as module
from cs336_alignment.training.checkpoint import (
    TrainState,
    find_latest,
    list_checkpoints,
    module_tensors,
    remove_leftovers,
    restore,
    save_checkpoint,
    verify,
)
from cs336_alignment.training.export import export_model, save_sidecars
from cs336_alignment.training.optimizer import build_optimizer
from cs336_alignment.training.safetensors_file import DTYPE_NAMES, write_safetensors

CPU = torch.device("cpu")
FILES = (
    "model.safetensors",
    "optimizer.safetensors",
    "trainer_state.json",
    "manifest.json",
    "config.json",
    "templates/tool.jinja",
)


class Tiny(nn.Module):
    """An embedding tied to the output, biases, a saved buffer and one that is not saved."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scratch", torch.full((3,), float(seed)), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.middle(self.norm(self.embedding(ids))))  # type: ignore[no-any-return]


def build(seed: int = 0) -> tuple[Tiny, torch.optim.AdamW]:
    tiny = Tiny(seed)
    return tiny, build_optimizer(tiny, OptimizerConfig(learning_rate=0.01, weight_decay=0.1))


def take_step(tiny: Tiny, optimizer: torch.optim.Optimizer, step: int) -> None:
    ids = (torch.arange(11) * (step + 2)) % 11
    optimizer.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(tiny(ids), ids.roll(1)).backward()
    optimizer.step()


def sidecars(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 6}\n')
    (folder / "templates").mkdir()
    (folder / "templates" / "tool.jinja").write_text("{{ tools }}")


def save(checkpoints: Path, step: int, keep: int = 9, **options: Any) -> Path:
    """Save a module that has really taken so many steps."""
    tiny, optimizer = build()
    for number in range(step):
        take_step(tiny, optimizer, number)
    return save_checkpoint(
        checkpoints, TrainState(step, 10 * step, 5 * step), tiny, optimizer,
        **({"extra": {"note": "n"}, "save_sidecars": sidecars, "keep": keep} | options),
    )  # fmt: skip


def fingerprint(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


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
        tmp_path, TrainState(3, 30, 15), tiny, optimizer,
        extra={}, save_sidecars=sidecars, keep=1,
    )  # fmt: skip
    other, other_optimizer = build(seed=1)
    state = restore(folder, other, other_optimizer, CPU)
    assert state == TrainState(3, 30, 15)
    assert other.head.weight is other.embedding.weight
    assert other.scratch[0] == 1  # not saved, so not restored
    for step in (3, 4):
        take_step(tiny, optimizer, step)
        take_step(other, other_optimizer, step)
        tensors, others = module_tensors(tiny), module_tensors(other)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)
        moments = module.optimizer_tensors(tiny, optimizer)
        other_moments = module.optimizer_tensors(other, other_optimizer)
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
            restore(folder, other, torch.optim.AdamW(other.parameters()), CPU)
        assert caught.value.status == ExitStatus.IO


def test_a_checkpoint_lists_all_its_files_and_is_the_latest(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert manifest.keys() == files - {"manifest.json"} == set(FILES) - {"manifest.json"}
    assert verify(folder) is None
    assert json.loads((tmp_path / "index.json").read_text())["latest"] == "step-000007"
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["progress"] == {"step": 7, "tokens_seen": 70, "response_tokens_seen": 35}
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
    assert skipped == [f"{newest}: {reason}"]
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
    read = module.sha256_of
    monkeypatch.setattr(module, "sha256_of", lambda path: (opened.append(path), read(path))[1])
    assert verify(folder) is not None
    assert all(path.resolve().is_relative_to(folder.resolve()) for path in opened)


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"model.safetensors": {}}', "\udcff"])
def test_a_manifest_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    folder = save(tmp_path, 1)
    (folder / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    assert "manifest.json" in (verify(folder) or "")


def test_a_file_that_the_system_cannot_read_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    read = module.sha256_of

    def fail(path: Path) -> str:
        if path.is_relative_to(newest):
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(module, "sha256_of", fail)
    latest, (skipped,) = find_latest(tmp_path)
    assert latest == before
    assert "Input/output error" in skipped


def test_the_newest_is_chosen_by_its_step_not_by_its_time(tmp_path: Path) -> None:
    for step, time in ((2, 3e9), (9, 2e9), (10, 1e9)):
        os.utime(save(tmp_path, step), (time, time))
    assert find_latest(tmp_path) == (tmp_path / "step-000010", [])


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    whole = save(tmp_path, 1)
    for name in (".tmp-step-000009-1", "step-000009.bak", "step-9", "step-xxxxxx"):
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / "step-000008").write_text("a file")
    assert list_checkpoints(tmp_path) == [whole]
    assert find_latest(tmp_path / "nowhere") == (None, [])


class Trap:
    """What a pickle can do: leave a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("through", ["pickle", "torch"])
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
        restore(folder, *build(), CPU)
    assert not canary.exists()


# Rotation.


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert {folder.name for folder in list_checkpoints(tmp_path)} == {"step-000003", "step-000010"}


def test_a_later_damaged_one_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    damaged = save(tmp_path, 3)
    (damaged / "model.safetensors").write_bytes(b"")
    saved = save(tmp_path, 2, keep=1)  # the run went on from step 1
    assert find_latest(tmp_path)[0] == saved
    again = save(tmp_path, 3, keep=1)
    assert (again, verify(again)) == (damaged, None)
    assert list_checkpoints(tmp_path) == [again]


def test_a_whole_one_of_this_step_is_left_alone(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    inode = (folder / "model.safetensors").stat().st_ino
    assert save(tmp_path, 1) == folder
    assert (folder / "model.safetensors").stat().st_ino == inode


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".tmp-step-000002-77").mkdir()
    (tmp_path / ".tmp-step-000002-77" / "model.safetensors").write_text("half")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", "index.json"}
    remove_leftovers(tmp_path / "nowhere")


# Faults at every operation of a save: SQLite's method.


class Faults:
    """Counts the operations of a child process on a folder, and does something at the k-th.

    Args:
        folder: whose operations count.
        at: which of them, counted from 1.
        fault: what happens there.
        lasting: happens at all later ones too.
        writes_only: deleting goes on, as on a full disk.
    """

    def __init__(
        self, folder: Path, at: int, fault: Callable[[Path], None], *,
        lasting: bool = False, writes_only: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.at, self.fault = str(folder), at, fault
        self.lasting, self.writes_only = lasting, writes_only
        self.count = 0
        self._sync = os.fsync

    def install(self) -> None:
        """From here on; an audit hook stays for the life of its process."""
        sys.addaudithook(self._hook)
        os.fsync = self._fsync

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        deletes = event in ("os.remove", "os.rmdir")
        reads = event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (self.writes_only and (deletes or reads)):
            self._operation(args[0])

    def _fsync(self, descriptor: int) -> None:
        self._operation(os.readlink(f"/proc/self/fd/{descriptor}"))
        self._sync(descriptor)

    def _operation(self, path: Any) -> None:
        if isinstance(path, str | Path) and str(path).startswith(self.folder):
            self.count += 1
            if self.count == self.at or (self.lasting and self.count > self.at):
                self.fault(Path(path))


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked child; its exit status: 0 or that of its UserError, 1 for another error."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except UserError as error:
            status = int(error.status)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


KILLED, NO_FAULT = 137, 100


def kill(path: Path) -> None:
    os._exit(KILLED)


def kill_and_lose_what_was_not_synced(path: Path) -> None:
    if path.is_file():
        os.truncate(path, path.stat().st_size // 2)
    os._exit(KILLED)


def save_under_faults(checkpoints: Path, keep: int, faults: Faults) -> int:
    """Save step 2 in a child; NO_FAULT if it had fewer operations than the fault's number."""

    def work() -> None:
        tiny, optimizer = build()
        for number in range(2):
            take_step(tiny, optimizer, number)
        faults.install()
        save_checkpoint(
            checkpoints, TrainState(2, 20, 10), tiny, optimizer,
            extra={"note": "n"}, save_sidecars=sidecars, keep=keep,
        )  # fmt: skip
        if faults.count < faults.at:
            os._exit(NO_FAULT)

    return in_child(work)


@pytest.mark.parametrize(
    ("fault", "keep", "damaged"),
    [
        (kill, 1, False),
        (kill_and_lose_what_was_not_synced, 2, False),
        (kill_and_lose_what_was_not_synced, 1, True),
    ],
)
def test_a_kill_at_any_operation_leaves_the_old_or_the_new_one(
    tmp_path: Path, fault: Callable[[Path], None], keep: int, damaged: bool
) -> None:
    first, second = save(tmp_path / "want", 1), save(tmp_path / "want", 2)
    wanted = {"step-000001": fingerprint(first), "step-000002": fingerprint(second)}
    found = set()
    for at in range(1, 200):
        checkpoints = tmp_path / f"kill-{at}"
        shutil.copytree(first, checkpoints / first.name)
        if damaged:  # one of the same step stands in the way
            shutil.copytree(second, checkpoints / second.name)
            (checkpoints / second.name / "model.safetensors").write_bytes(b"")
        status = save_under_faults(checkpoints, keep, Faults(checkpoints, at, fault))
        latest, _ = find_latest(checkpoints)
        assert latest is not None, f"nothing is left after a kill at operation {at}"
        assert fingerprint(latest) == wanted[latest.name]
        state = restore(latest, *build(seed=5), CPU)
        assert state.step == int(latest.name[-1])
        found.add(latest.name)
        assert save(checkpoints, 2, keep=keep).name == "step-000002"  # the next start goes on
        remove_leftovers(checkpoints)
        kept = {"step-000002"} if keep == 1 else wanted.keys()
        assert {path.name for path in checkpoints.iterdir()} == {*kept, "index.json"}
        assert json.loads((checkpoints / "index.json").read_text())["latest"] == "step-000002"
        shutil.rmtree(checkpoints)
        if status == NO_FAULT:
            break
        assert status == KILLED
    else:
        pytest.fail("no save completed")
    assert at > 20
    assert found == wanted.keys()


@pytest.mark.parametrize("lasting", [False, True])
def test_a_full_disk_at_any_operation_costs_the_new_one_only(tmp_path: Path, lasting: bool) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    first = save(tmp_path / "want", 1)
    old = fingerprint(first)
    for at in range(1, 200):
        checkpoints = tmp_path / f"full-{at}"
        shutil.copytree(first, checkpoints / first.name)
        faults = Faults(checkpoints, at, fail, lasting=lasting, writes_only=True)
        status = save_under_faults(checkpoints, 2, faults)
        assert fingerprint(checkpoints / "step-000001") == old
        latest, skipped = find_latest(checkpoints)
        assert latest is not None
        assert skipped == []
        assert not [p for p in checkpoints.iterdir() if p.name.startswith(".")]
        if status == NO_FAULT:
            break
        assert status == ExitStatus.IO
        assert save(checkpoints, 2).name == "step-000002"
        assert verify(checkpoints / "step-000002") is None
        shutil.rmtree(checkpoints)
    else:
        pytest.fail("no save completed")
    assert at > 15


def test_a_file_that_the_system_cuts_off_is_a_failure(tmp_path: Path) -> None:
    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        save(tmp_path, 2)

    old = save(tmp_path, 1)
    assert in_child(work) == ExitStatus.IO
    assert find_latest(tmp_path) == (old, [])
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", "index.json"}


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
            tmp_path / "checkpoints", TrainState(1), model, build_optimizer(model, OptimizerConfig()),
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


@pytest.mark.parametrize("limit", [600, 5000])  # cuts the config off, or the weights
def test_an_export_to_a_full_disk_leaves_the_old_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, limit: int
) -> None:
    model, folder = build_llama(tokenizer), tmp_path / "model"
    export_model(folder, model, tokenizer, "old")
    old = fingerprint(folder)

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        export_model(folder, model, tokenizer, "new")

    assert in_child(work) == ExitStatus.IO
    assert fingerprint(folder) == old
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
