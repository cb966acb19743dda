"""A fresh process reads an export: it passes as written, and no change to it goes unseen."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.data.tokenize import TokenRow
from cs336_alignment.model.loading import load_tokenizer
from cs336_alignment.model.policy import Policy
from cs336_alignment.model.source import resolve_model
from cs336_alignment.training import reload_check, reload_child
from cs336_alignment.training.export import export_model
from cs336_alignment.training.reload_check import ReloadResult, bit_sums, check_export

TEXT = "Answer in one word: {question}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(resolve_model("builtin:arithmetic", None, False))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return tokenizer


@pytest.fixture(scope="module")
def dataset(tokenizer: PreTrainedTokenizerBase) -> TokenizedDataset:
    rows = []
    for a in range(5):
        prompt = tokenizer(f"User: {a} + 3 = ?")["input_ids"]
        response = [*tokenizer(f" {a + 3}")["input_ids"], tokenizer.eos_token_id]
        rows.append(TokenRow.of_response([*prompt, *response], len(prompt)))
    return TokenizedDataset.of(rows)


@pytest.fixture(scope="module")
def trained(
    tokenizer: PreTrainedTokenizerBase, dataset: TokenizedDataset,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Policy, dict[str, int], Path]:  # fmt: skip
    """A model that has learned where to stop, its weights before, and its export."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    policy, base = Policy(model), bit_sums(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        for i in range(len(dataset)):
            ids = dataset[i].input_ids[None]
            labels = torch.where(dataset[i].response_mask[None], ids, -100)
            model(ids, labels=labels).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("run") / "model"
    export_model(folder, model, tokenizer, "")
    return policy, base, folder


Check = Callable[..., ReloadResult]


@pytest.fixture
def check(
    trained: tuple[Policy, dict[str, int], Path], tokenizer: PreTrainedTokenizerBase,
    dataset: TokenizedDataset, tmp_path: Path,
) -> Check:  # fmt: skip
    """Check a copy of the export after something was done to it."""
    policy, base, folder = trained

    def run(damage: Callable[[Path], object] = lambda _: None, **options: Any) -> ReloadResult:
        copy = tmp_path / "model"
        shutil.copytree(folder, copy)
        damage(copy)
        return check_export(
            copy, policy.model, tokenizer, dataset, **({"base": base, "texts": [TEXT]} | options)
        )

    return run


def test_an_export_as_written_passes(check: Check) -> None:
    assert check() == ReloadResult("passed")  # and the model stops, or there were a warning


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def change_json(name: str, **values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "reasons"),
    [
        (change_weights(lambda t: t[NORM].zero_()), ("other weights", NORM, "log-probs differ")),
        pytest.param(
            change_weights(lambda t: t[NORM].view(-1)[3].fill_(torch.nan)),
            ("not all numbers are finite in " + NORM,),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            change_weights(lambda t: t.update({NORM: t[NORM].bfloat16()})),
            ("other weights", NORM),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            change_json("config.json", rms_norm_eps=0.3),
            ("log-probs differ: token",),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            change_json("generation_config.json", eos_token_id=7),
            ("goes on after token", "where the trained model stops"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"),
            ("(chat template)",),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda f: (f / "config.json").unlink(),
            ("plain transformers cannot use it",),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda f: (f / "model.safetensors").write_bytes(b"x" * 99),
            ("plain transformers cannot use it",),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["zeroed", "not a number", "rounded", "config", "stop", "template", "no config", "rubbish"],
)
@pytest.mark.fault("T7 an export that is not what was trained")
def test_no_change_goes_unseen(
    damage: Callable[[Path], object], reasons: tuple[str, ...], check: Check
) -> None:
    result = check(damage)
    assert result.outcome == "failed" and all(reason in str(result) for reason in reasons), result


def test_a_tokenizer_that_reads_otherwise_is_seen(check: Check) -> None:
    def damage(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        content["normalizer"] = {"type": "Lowercase"}
        path.write_text(json.dumps(content))

    assert "its tokenizer gives another result (prompt ids)" in str(check(damage))


def test_a_tensor_that_training_left_alone_is_seen(
    check: Check, trained: tuple[Policy, dict[str, int], Path]
) -> None:
    base = trained[1] | {NORM: bit_sums(trained[0].model)[NORM]}
    result = check(base=base)
    assert result.outcome == "failed" and f"training left {NORM} as in the base" in str(result)


def test_a_model_that_never_stops_is_told_and_passes(
    check: Check, trained: tuple[Policy, dict[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        reload_child, "continuations", lambda model, prompts, lengths: [[5, 6]] * len(prompts)
    )
    result = check()
    assert result.outcome == "passed"
    (warning,) = result.warnings
    assert warning == "the trained model does not stop: none of 6 responses came to an end"


def child_of(process_id: int) -> int:
    for path in Path(f"/proc/{process_id}/task").glob("*/children"):
        for child in path.read_text().split():
            words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            if reload_child.__file__ in words:
                return int(child)
    return 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.fault("T2 SIGKILL of the process that loads the export")
def test_a_killed_process_says_nothing_about_the_export(check: Check) -> None:
    def kill() -> None:
        while not (child := child_of(os.getpid())):
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    result = check()
    killer.join()
    assert str(result) == "skipped: its process was killed (SIGKILL): is memory short?"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_it_ends_with_its_time_on_request_and_for_want_of_memory(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(check(limit_seconds=0.0)) == "skipped: it took longer than 0 s"
    assert not child_of(os.getpid())
    shutil.rmtree(tmp_path / "model")
    assert check(asked=lambda: True) == ReloadResult("stopped")
    assert not child_of(os.getpid())
    shutil.rmtree(tmp_path / "model")
    monkeypatch.setattr(reload_check, "PYTHON_MIB", 1e12)
    assert check().reasons[0].startswith("it takes 1,000,000,000,0")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.fault("T2 SIGKILL while the export is loaded")
def test_the_other_process_ends_with_the_run(check: Check) -> None:
    reader, writer = os.pipe()
    if (run := os.fork()) == 0:
        request = reload_check._request

        def work_for_minutes(*args: Any) -> dict[str, Any]:
            asked = request(*args)
            return asked | {"sequences": asked["sequences"] * 20_000}

        def tell(*_: Any) -> None:  # the other process has its request
            os.write(writer, b"x")
            time.sleep(99)

        reload_check._request, reload_check._trained = work_for_minutes, tell  # type: ignore[assignment]
        check()
        os._exit(0)
    assert os.read(reader, 1) == b"x"
    child = child_of(run)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    until = time.monotonic() + 30
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_the_other_process_imports_nothing_of_this_package() -> None:
    tree = ast.parse(Path(reload_child.__file__).read_text())
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert modules - set(sys.stdlib_module_names) == {"torch", "transformers", "peft"}
