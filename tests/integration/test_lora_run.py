"""Runs that train adapters, frozen models and new tokens, as users make them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.conftest import ROOT, Sft, without_times
from tests.zygote import Zygote, metrics_hold, when


def overrides(base: Path, rows: Path, *more: str) -> list[str]:
    return [
        f"model.name_or_path={base}", f"data.train_path={rows}", "logger=none",
        "trainer.global_batch_size=4", "trainer.save_steps=0", "trainer.reload_check=false",
        "optimizer.learning_rate=1e-2", *more,
    ]  # fmt: skip


def log_probs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(12)[None]).logits.log_softmax(-1)
    return found


@pytest.mark.parametrize(
    "averaging", [(), pytest.param(("trainer.ema_decay=0.9",), marks=pytest.mark.slow)]
)
def test_a_run_stopped_and_continued_is_the_whole_run(
    averaging: tuple[str, ...], sft: Sft, zygote: Zygote, base: Path, rows: Path, tmp_path: Path
) -> None:
    command = overrides(
        base, rows, "lora.r=4", "lora.dropout=0.1", "trainer.max_steps=20", *averaging,
        "trainer.save_steps=4", f"data.eval_path={rows}", "evaluation.generation_steps=10",
        "evaluation.max_new_tokens=5", "evaluation.num_prompts=4",
    )  # fmt: skip
    whole = sft("train", *command, "run_name=whole")
    assert whole.returncode == 0, whole.stderr
    assert "lora.dropout=0.1" in whole.stdout  # a result depends on the cut
    run, other = tmp_path / "outputs/cut", tmp_path / "outputs/whole"
    process_id = zygote.start(["train", *command, "run_name=cut"], tmp_path, tmp_path)
    assert when(metrics_hold(run, 9), process_id)
    os.kill(process_id, signal.SIGTERM)
    assert zygote.wait(process_id) == 75
    again = sft("train", *command, "run_name=cut")
    assert again.returncode == 0 and "of 20 is done" in again.stdout, again.stderr
    assert without_times(run / "metrics.jsonl") == without_times(other / "metrics.jsonl")
    for name in (
        "model/model.safetensors", "adapter/adapter_model.safetensors",
        "checkpoints/step-000020/optimizer.safetensors",
    ):  # fmt: skip
        assert (run / name).read_bytes() == (other / name).read_bytes()
    assert "nothing to do" in sft("train", *command, "run_name=cut").stdout
    assert sft("train", *command, "run_name=cut", "lora.alpha=4").returncode == 78


def test_what_adapters_leave_and_how_they_go_on(
    sft: Sft, base: Path, rows: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "tiny-base"
    shutil.copytree(base, mine)
    command = overrides(mine, rows, "lora.r=4", "trainer.max_steps=3", "run_name=r")
    done = sft("train", *command, "trainer.reload_check=true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("reload check passed") == 2
    assert "17,408 of them trained (4.49%)" in done.stdout
    run = tmp_path / "outputs/r"
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["parameters"], manifest["trainable_parameters"]) == (387456, 17408)
    checkpoint = run / "checkpoints/step-000003"
    held = sum(t.numel() for t in load_file(checkpoint / "adapter_model.safetensors").values())
    assert held == 17408 and not (checkpoint / "model.safetensors").exists()
    merged = log_probs(AutoModelForCausalLM.from_pretrained(run / "model"))
    for folder in (run / "adapter", checkpoint):
        plain = AutoModelForCausalLM.from_pretrained(mine)
        by_peft = log_probs(PeftModel.from_pretrained(plain, folder))
        torch.testing.assert_close(by_peft, merged, rtol=1e-5, atol=1e-5)
        evaluated = sft(
            "evaluate", f"model.name_or_path={folder}", f"data.eval_path={rows}",
            f"run_name=of-{folder.name}", "evaluation.num_prompts=2", "evaluation.max_new_tokens=3",
        )  # fmt: skip
        assert evaluated.returncode == 0, evaluated.stderr
    found = [json.loads((tmp_path / f"outputs/{n}/evaluation.json").read_text())["eval/loss"]
             for n in ("of-adapter", "of-step-000003")]  # fmt: skip
    assert found[0] == found[1]
    # Another export of a run that is complete; a longer run; the adapter in another run.
    only = sft("train", *command, "lora.export=adapter")
    assert only.returncode == 0 and "nothing to do" in only.stdout
    (run / "adapter/adapter_model.safetensors").unlink()
    mended = sft("train", *command, "lora.export=adapter")
    assert mended.returncode == 0 and "written once more" in mended.stderr, mended.stderr
    assert sft("train", *command, "trainer.max_steps=4").returncode == 0
    more = overrides(mine, rows, f"lora.adapter_path={checkpoint}", "trainer.max_steps=1")
    first = sft("train", *more, "run_name=more", "optimizer.learning_rate=0")
    assert first.returncode == 0, first.stderr
    name = "adapter/adapter_model.safetensors"
    before = load_file(checkpoint / "adapter_model.safetensors")
    after = load_file(tmp_path / "outputs/more" / name)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert "M131" in sft("train", *overrides(checkpoint, rows, "lora.r=4", "run_name=x")).stderr
    # The base model changes under a run.
    weights = load_file(mine / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, mine / "model.safetensors", {"format": "pt"})
    longer = sft("train", *command, "trainer.max_steps=5")
    assert longer.returncode == 78 and "error[M121]" in longer.stderr, longer.stderr
    other = sft("train", *more, "run_name=other")
    assert other.returncode == 78 and "error[M121]" in other.stderr
    chat = sft(
        "evaluate", f"model.name_or_path={checkpoint}", f"data.eval_path={rows}", "run_name=y"
    )
    assert chat.returncode == 78 and "error[M121]" in chat.stderr


def test_dora_is_loaded_again_as_its_card_says(
    sft: Sft, base: Path, rows: Path, tmp_path: Path
) -> None:
    command = overrides(
        base, rows, "lora.r=4", "lora.dora=true", "lora.export=adapter", "trainer.max_steps=2",
        "run_name=d", "trainer.reload_check=true",
    )  # fmt: skip
    done = sft("train", *command)
    assert done.returncode == 0 and "reload check passed" in done.stdout, done.stderr
    run = tmp_path / "outputs/d"
    assert (
        "= AutoPeftModelForCausalLM.from_pretrained(name)"
        in (run / "adapter/README.md").read_text()
    )
    for given, hint in (
        (run, f"is in {run}/adapter"), (run / "checkpoints", f"is in {run}/adapter"),
        (tmp_path / "no", "hf download"),
    ):  # fmt: skip
        more = overrides(base, rows, f"lora.adapter_path={given}", "run_name=more")
        refused = sft("train", *more)
        assert refused.returncode == 66 and "error[M122]" in refused.stderr
        assert hint in refused.stderr.replace("\n", ""), refused.stderr
    assert "there is no folder" in refused.stderr
    merged = sft("train", *overrides(run / "adapter", rows, "trainer.max_steps=1", "run_name=m"))
    assert merged.returncode == 0 and "merged into its base" in merged.stdout, merged.stderr
    elsewhere = sft("export", str(run), "output_root=other")
    assert elsewhere.returncode == 78 and "export.output_dir" in elsewhere.stderr


@pytest.mark.parametrize(
    "lora", [pytest.param((), marks=pytest.mark.slow), ("lora.r=2", "lora.export=merged")],
    ids=["all", "lora"],
)  # fmt: skip
def test_new_tokens_are_trained_and_saved(
    lora: tuple[str, ...], sft: Sft, base: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "<tool> 1 + 1 =", "response": " <tool>2"}\n' * 8)
    command = overrides(
        base, rows, "model.new_tokens=['<tool>','</tool>']", "trainer.max_steps=2", "run_name=r",
        "trainer.reload_check=true", "data.lint.duplicate_rows=off", *lora,
    )  # fmt: skip
    done = sft("train", *command)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs/r/model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids(["<tool>", "</tool>"])
    assert tokenizer("<tool>2", add_special_tokens=False)["input_ids"][0] == ids[0]
    rows_now = model.get_input_embeddings().weight
    assert len(rows_now) == max(ids) + 1
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    mean = before.mean(0)
    assert not torch.equal(rows_now[ids[0]], mean)
    assert (rows_now[ids[0]] - mean).abs().max() < 0.03 < (before[3] - mean).abs().max()
    shown = sft("inspect", *command[:2], command[7])
    assert shown.returncode == 0 and "<tool>" in shown.stdout
    if lora:
        grown = sft("export", "r", "export.format=adapter")
        assert grown.returncode == 78 and "error[M128]" in grown.stderr
    evaluated = sft(
        "evaluate", f"model.name_or_path={tmp_path}/outputs/r/checkpoints/step-000002",
        f"data.eval_path={rows}", "run_name=e", "evaluation.num_prompts=1",
    )  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    if lora:
        refused = sft("train", *command, "lora.export=both", "run_name=s")
        assert refused.returncode == 78 and "error[M128]" in refused.stderr


@pytest.fixture(scope="module")
def mixture(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts that reads as the base does."""
    folder = tmp_path_factory.mktemp("models") / "mixture"
    shutil.copytree(base, folder)
    plain = json.loads((base / "config.json").read_text())
    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, moe_intermediate_size=16,
        num_experts_per_tok=2, vocab_size=plain["vocab_size"], eos_token_id=plain["eos_token_id"],
        pad_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("more", "texts"),
    [
        (
            ("lora.r=4", "lora.dropout=0.1", "trainer.reload_check=true"),
            ("fused experts stay as they are", "reload check passed"),
        ),
        (("trainer.precision=bf16",), ("experts    compute in fp32",)),
    ],
)
def test_a_mixture_of_experts_is_trained(
    more: tuple[str, ...], texts: tuple[str, ...], sft: Sft, mixture: Path, rows: Path
) -> None:
    done = sft("train", *overrides(mixture, rows, "trainer.max_steps=2", "run_name=r", *more))
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in texts), done.stdout


def test_a_mixture_of_experts_is_checked_and_foretold(sft: Sft, mixture: Path, rows: Path) -> None:
    checked = sft("doctor", *overrides(mixture, rows, "run_name=d"))
    assert checked.returncode == 0 and "padded, fp64: pass" in checked.stdout, checked.stdout
    foretold = sft("doctor", "--memory", *overrides(mixture, rows, "run_name=m"))
    assert foretold.returncode == 0 and "estimate for the cpu" in foretold.stdout, foretold.stderr


BAD: list[tuple[list[str], str, str]] = [
    (["lora.r=0"], "C103", "lora.r"),
    (["lora.r=4", "lora.target_modules=[]"], "C103", "lora.target_modules"),
    (["lora.r=4", "lora.export=all"], "C103", "lora.export"),
    (["lora.quantize=nf4"], "C104", "lora.r=null"),
    (["lora.alpha=8"], "C104", "lora.r=null"),
    (["lora.r=4", "lora.quantize=nf4"], "C162", "CUDA"),
    (["lora.r=4", "model.random_init=true"], "C104", "model.random_init"),
    (["lora.r=4", "model.freeze=[norm]"], "C104", "model.freeze"),
    (["lora.r=4", "lora.target_modules=[nothing]"], "M124", "q_proj"),
    (["lora.adapter_path=nowhere"], "M122", "nowhere"),
    (["model.freeze=['(']"], "C103", "model.freeze"),
    (["model.freeze=[nothing]"], "M120", "nothing"),
    (["model.freeze=['.']"], "M120", "nothing to train"),
    (["model.new_tokens=['+']"], "M130", "+"),
    (["model.new_tokens=['<a>']", "model.freeze=[embed]"], "M129", "model.freeze"),
    (["lora_r=4"], "C101", "lora.r"),
    (["--use_dora", "true"], "C001", "lora.dora=true"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "code", "text"), BAD, ids=lambda v: str(v)[:40])
def test_every_mistake_is_one_error(
    more: list[str], code: str, text: str, sft: Sft, base: Path, rows: Path
) -> None:
    done = sft("train", *overrides(base, rows, "trainer.max_steps=1", "run_name=r", *more))
    assert done.returncode in (2, 78, 66), done.stderr
    assert done.stderr.count("error[") == 1 and f"error[{code}]" in done.stderr
    assert text in done.stderr


def test_a_frozen_model_trains_the_rest_alone(
    sft: Sft, base: Path, rows: Path, tmp_path: Path
) -> None:
    command = overrides(
        base, rows, "trainer.max_steps=2", "run_name=r", "trainer.reload_check=true",
        r"model.freeze=['layers\.0\.',embed]", "trainer.gradient_checkpointing=true",
    )  # fmt: skip
    done = sft("train", *command)
    assert done.returncode == 0 and "of them trained" in done.stdout, done.stderr
    before, after = (load_file(folder / "model.safetensors")
                     for folder in (base, tmp_path / "outputs/r/model"))  # fmt: skip
    for name, tensor in before.items():
        frozen = "layers.0." in name or "embed" in name
        assert torch.equal(tensor, after[name]) == frozen, name


def table_rows() -> Iterator[Any]:
    """What docs/lora.md says works with what; a compiler or seconds more make a row slow."""
    text = (ROOT / "docs/lora.md").read_text().partition("## What works with what")[2]
    for given, verdict in re.findall(r"^\| `(.+?)` \| (\w+) ", text, re.MULTILINE):
        quick = verdict != "yes" or "shared_prefix" in given or "bf16 lora.dora" in given
        yield pytest.param(given, verdict, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("given", "verdict"), table_rows())
def test_the_support_matrix_is_true(
    given: str, verdict: str, sft: Sft, base: Path, rows: Path
) -> None:
    if given.startswith("two processes"):
        return  # test_two_processes_train_the_same_adapter
    verb, _, rest = given.partition(" ")
    if "=" in verb:
        verb, rest = "train", given
    lora = () if "lora.r=" in rest or "model.freeze" in rest else ("lora.r=4",)
    command = overrides(
        base, rows, "trainer.max_steps=2", "run_name=r", f"data.eval_path={rows}",
        "evaluation.max_new_tokens=4", "evaluation.num_prompts=2", *lora, *rest.split(),
    )  # fmt: skip
    done = sft(verb, *command)
    if verdict == "yes":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 78 and f"error[{verdict}]" in done.stderr, done.stderr


@pytest.mark.distributed
def test_two_processes_train_the_same_adapter(
    sft: Sft, base: Path, rows: Path, tmp_path: Path
) -> None:
    command = overrides(base, rows, "lora.r=4", "trainer.max_steps=3")
    one = sft("train", *command, "run_name=one")
    two = sft("train", *command, "run_name=two", "parallel.num_processes=2", processes=2)
    assert one.returncode == two.returncode == 0, two.stderr[-2000:]
    losses = [[row["train/loss"] for row in without_times(tmp_path / f"outputs/{n}/metrics.jsonl")]
              for n in ("one", "two")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_adapters_are_exported_as_they_are_and_merged(
    sft: Sft, base: Path, rows: Path, tmp_path: Path
) -> None:
    command = overrides(base, rows, "lora.r=4", "trainer.max_steps=6", "trainer.save_steps=3")
    assert sft("train", *command, "run_name=r").returncode == 0
    for form in ("adapter", "hf"):
        done = sft("export", "r", f"export.format={form}", "export.checkpoint=3")
        assert done.returncode == 0 and "reload check passed" in done.stdout, done.stderr
    run = tmp_path / "outputs/r"
    exports = run / "exports"
    plain = AutoModelForCausalLM.from_pretrained(base)
    found = []
    for whole, adapter in (
        (exports / "step-000003-fp32", exports / "step-000003-adapter"),
        (run / "model", run / "adapter"),
    ):
        merged = AutoModelForCausalLM.from_pretrained(whole)
        fresh = AutoModelForCausalLM.from_pretrained(base)
        unmerged = PeftModel.from_pretrained(fresh, str(adapter))
        torch.testing.assert_close(log_probs(merged), log_probs(unmerged), rtol=0, atol=1e-5)
        found.append(log_probs(merged))
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    assert not torch.allclose(found[0], log_probs(plain), atol=1e-3)
    card = (exports / "step-000003-adapter/README.md").read_text()
    assert "library_name: peft" in card
    own = (run / "checkpoints/step-000003/adapter_model.safetensors").read_bytes()
    assert (exports / "step-000003-adapter/adapter_model.safetensors").read_bytes() == own
    assert sft("train", *overrides(base, rows, "trainer.max_steps=1"), "run_name=w").returncode == 0
    refused = sft("export", "w", "export.format=adapter")
    assert refused.returncode == 78 and "error[C175]" in refused.stderr
