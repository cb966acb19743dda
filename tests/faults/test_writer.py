"""T1, T6: a kill, a loss of power and a full disk at every operation of every writer."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from cs336_alignment.errors import ExitStatus
from cs336_alignment.files import write_json
from cs336_alignment.model.loading import load_tokenizer
from cs336_alignment.model.source import resolve_model
from cs336_alignment.training.checkpoint import restore, save_checkpoint
from cs336_alignment.training.checkpoint_folders import find_latest, remove_leftovers, verify
from cs336_alignment.training.checkpoint_writer import CheckpointWriter
from cs336_alignment.training.export import export_model
from cs336_alignment.training.snapshot import Snapshot, TrainState
from tests.checkpoints import build, fingerprint, save, sidecars, take_step
from tests.faults.injection import FAULTS, Outcome, folder_names, run, series
from tests.faults.tally import Tally

CPU = torch.device("cpu")
NAMES = {
    "kill": "T1 kill", "power": "T1 loss of power", "power and names": "T1 loss of power and renames",
    "full": "T6 disk full",
}  # fmt: skip


def fault_of(what: str) -> list[pytest.ParameterSet]:  # type: ignore[name-defined]
    """One parameter for each fault, with its line of the table."""
    marks = {
        fault: [pytest.mark.fault(f"{NAMES[fault]}, at each operation of {what}")]
        for fault in FAULTS
    }
    marks["power and names"].append(pytest.mark.slow)  # "power" has the same points, less is lost
    return [pytest.param(fault, marks=marks[fault]) for fault in FAULTS]


def trained(step: int) -> Snapshot:
    module, optimizer = build()
    for number in range(step):
        take_step(module, optimizer, number)
    return Snapshot.of(TrainState(step, 10 * step, 5 * step), module, optimizer)


def save_at_once(checkpoints: Path, keep: int) -> Callable[[], object]:
    snapshot = trained(2)
    return lambda: save_checkpoint(
        checkpoints, snapshot, extra={"note": "n"}, save_sidecars=sidecars, keep=keep
    )


def save_behind(checkpoints: Path, keep: int) -> Callable[[], object]:
    """The same through the writer's thread, while the module that it copied trains on."""
    module, optimizer = build()
    for number in range(2):
        take_step(module, optimizer, number)

    def work() -> None:
        writer = CheckpointWriter(
            checkpoints, extra={"note": "n"}, save_sidecars=sidecars, keep=keep, asynchronous=True
        )
        writer.begin(TrainState(2, 20, 10), module, optimizer)
        for number in range(2, 5):
            take_step(module, optimizer, number)
        writer.finish()

    return work


def check_error(outcome: Outcome, fault: str) -> None:
    if outcome.reached and fault == "full":
        assert outcome.error is not None, outcome.failure
        code, status, text = outcome.error
        assert (code, status) == ("R206", ExitStatus.IO)
        assert "No space left on device" in text and "MiB free" in text
    else:
        assert outcome.error is outcome.failure is None, outcome


@pytest.mark.parametrize("keep", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("work_of", "damaged"),
    [(save_at_once, False), (save_behind, True),
     pytest.param(save_at_once, True, marks=pytest.mark.slow),
     pytest.param(save_behind, False, marks=pytest.mark.slow)],
)  # fmt: skip
@pytest.mark.parametrize("fault", fault_of("a save"))
def test_a_save_leaves_the_old_checkpoint_or_the_new_one(
    fault: str, work_of: Callable[[Path, int], Callable[[], object]], keep: int, damaged: bool,
    tmp_path: Path, tally: Tally,
) -> None:  # fmt: skip
    first, second = save(tmp_path / "want", 1), save(tmp_path / "want", 2)
    wanted = {"step-000001": fingerprint(first), "step-000002": fingerprint(second)}
    checkpoints = tmp_path / "checkpoints"
    found = set()

    def put_right() -> None:
        shutil.rmtree(checkpoints, ignore_errors=True)
        shutil.copytree(first, checkpoints / first.name)
        if damaged:  # one of the same step stands in the way
            shutil.copytree(second, checkpoints / second.name)
            (checkpoints / second.name / "model.safetensors").write_bytes(b"")

    put_right()
    for k, outcome in series(work_of(checkpoints, keep), fault):
        with tally.point(f"operation {k}, keep {keep}"):
            check_error(outcome, fault)
            latest, _ = find_latest(checkpoints)
            assert latest is not None, "no checkpoint is left"
            assert fingerprint(latest) == wanted[latest.name], f"{latest.name} differs"
            assert restore(latest, *build(seed=5)).step == int(latest.name[-1])
            found.add(latest.name)
            if fault == "full":  # the process lives on and tidies up by itself
                assert not [name for name in folder_names(checkpoints) if name.startswith(".")]
                assert outcome.reached or latest.name == "step-000002"
            # The next start goes on.
            assert fingerprint(save(checkpoints, 2, keep=keep)) == wanted["step-000002"]
            remove_leftovers(checkpoints)
            kept = ["step-000002"] if keep == 1 else ["step-000001", "step-000002"]
            assert folder_names(checkpoints) == ["index.json", *kept]
            assert json.loads((checkpoints / "index.json").read_text())["latest"] == "step-000002"
        put_right()
    assert tally.tried > 15
    if fault != "full":
        assert found == wanted.keys()


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


@pytest.mark.parametrize("fault", fault_of("an export"))
def test_an_export_is_never_half_of_one(
    fault: str, tmp_path: Path, tally: Tally, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, want = build_llama(tokenizer), tmp_path / "want"
    for card in ("old", "new"):
        export_model(want / card, model, tokenizer, card)
    wanted = {fingerprint(want / "old"), fingerprint(want / "new")}
    folder = tmp_path / "run" / "model"
    shutil.copytree(want / "old", folder)
    for k, outcome in series(lambda: export_model(folder, model, tokenizer, "new"), fault):
        with tally.point(f"operation {k}"):
            if fault == "full" and outcome.reached:
                assert outcome.error is not None, outcome.failure
                assert outcome.error[:2] == ("R207", ExitStatus.IO)
            if folder.is_dir():  # between the two renames there is none, and the run is not done
                assert fingerprint(folder) in wanted
            export_model(folder, model, tokenizer, "new")
            assert fingerprint(folder) == fingerprint(want / "new")
            assert folder_names(folder.parent) == ["model"]
        shutil.rmtree(folder.parent)
        shutil.copytree(want / "old", folder)
    assert tally.tried > 15


@pytest.mark.parametrize("fault", fault_of("status.json"))
def test_a_status_file_is_whole_for_its_reader(fault: str, tmp_path: Path, tally: Tally) -> None:
    path, old, new = tmp_path / "status.json", {"step": 1}, {"step": 2, "error": "x" * 999}
    write_json(path, old)
    for k, _ in series(lambda: write_json(path, new), fault):
        with tally.point(f"operation {k}"):
            assert json.loads(path.read_text()) in (old, new)
        write_json(path, old)
    assert tally.tried > 3


# The system's own limit on a file's size: also for writers that are not Python's.


@pytest.mark.fault("T6 disk full, by the system's limit on a file")
def test_a_file_that_the_system_cuts_off_is_a_failure(tmp_path: Path, tally: Tally) -> None:
    old = save(tmp_path, 1)
    for limit in (1, 100, 600, 900):
        with tally.point(f"{limit} bytes"):
            outcome = run(
                lambda limit=limit: under_limit(limit, lambda: save(tmp_path, 2)), "full", 999
            )  # type: ignore[misc]
            assert outcome.error is not None and outcome.error[1] == ExitStatus.IO, outcome
            assert find_latest(tmp_path) == (old, {})
            assert folder_names(tmp_path) == ["index.json", "step-000001"]


@pytest.mark.fault("T6 disk full, by the system's limit on a file")
def test_an_export_that_the_system_cuts_off_leaves_the_old_one(
    tmp_path: Path, tally: Tally, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, folder = build_llama(tokenizer), tmp_path / "model"
    export_model(folder, model, tokenizer, "old")
    old = fingerprint(folder)
    for limit in (600, 5000):  # cuts the config off, or the weights
        with tally.point(f"{limit} bytes"):
            outcome = run(
                lambda limit=limit: under_limit(  # type: ignore[misc]
                    limit, lambda: export_model(folder, model, tokenizer, "new")
                ),
                "full", 999,
            )  # fmt: skip
            assert outcome.error is not None and outcome.error[1] == ExitStatus.IO, outcome
            assert fingerprint(folder) == old
            assert folder_names(tmp_path) == ["model"]


def under_limit(limit: int, work: Callable[[], object]) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    work()


# T7, T8: damage to what was written.


@pytest.mark.fault("T8 one byte flipped, in each file")
def test_no_flipped_byte_is_ever_used(tmp_path: Path, tally: Tally) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    manifest = json.loads((newest / "manifest.json").read_text())
    for path in sorted(p for p in newest.rglob("*") if p.is_file()):
        data = path.read_bytes()
        for place in range(len(data)):
            with tally.point(f"{path.name}, byte {place}"):
                flipped = bytes([data[place] ^ (1 << place % 8)])
                path.write_bytes(data[:place] + flipped + data[place + 1 :])
                if verify(newest) is None:  # white space or a name's case in the manifest itself
                    assert path.name == "manifest.json"
                    assert json.loads(path.read_text()) == manifest
                else:
                    assert find_latest(tmp_path)[0] == before
        path.write_bytes(data)
    assert verify(newest) is None


@pytest.mark.fault("T7 a file cut off, at each length")
def test_no_file_that_was_cut_off_is_ever_used(tmp_path: Path, tally: Tally) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    manifest = json.loads((newest / "manifest.json").read_text())
    for path in sorted(p for p in newest.rglob("*") if p.is_file()):
        data = path.read_bytes()
        for length in range(len(data)):
            with tally.point(f"{path.name}, {length} bytes"):
                path.write_bytes(data[:length])
                if verify(newest) is None:  # the manifest's last line feed
                    assert path.name == "manifest.json"
                    assert json.loads(path.read_text()) == manifest
                else:
                    assert find_latest(tmp_path)[0] == before
        path.write_bytes(data)
