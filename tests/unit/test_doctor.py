"""The doctor passes what is right and fails what is broken, check by check."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from cs336_alignment.config import Config, DataConfig, LoggerConfig, ModelConfig
from cs336_alignment.data import batching
from cs336_alignment.data.tokenize import TokenRow
from cs336_alignment.errors import ExitStatus
from cs336_alignment.model import attention
from cs336_alignment.model.loading import load_tokenizer, resolve_model
from cs336_alignment.training import checkpoint, doctor, loss, step
from cs336_alignment.training.doctor import Finding
from cs336_alignment.training.invariances import cut_short, without_dropout
from tests.conftest import build_dataset, build_model

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 512,
}  # fmt: skip
CONFIGS: dict[str, Callable[[int], PreTrainedConfig]] = {
    "llama": lambda size: LlamaConfig(vocab_size=size, attention_dropout=0.1, **SMALL),
    "qwen2": lambda size: Qwen2Config(vocab_size=size, **SMALL),
    "gemma2": lambda size: Gemma2Config(vocab_size=size, head_dim=8, **SMALL),
    "gpt2": lambda size: GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=512),
}  # fmt: skip


@pytest.fixture
def diagnose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], dict[str, Finding]]:
    """Run the doctor on a new small model, and give its findings by name."""

    def run(name: str) -> dict[str, Finding]:
        tokenizer = load_tokenizer(resolve_model("builtin:arithmetic", None, False))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name](len(tokenizer)))
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        config = Config(
            ModelConfig(str(tmp_path / "model")),
            DataConfig(
                "builtin:arithmetic", max_train_examples=6, cache_dir=str(tmp_path / "cache")
            ),
            logger=LoggerConfig("none"),
        )
        seen: list[Finding] = []
        monkeypatch.setattr(doctor, "_show", lambda findings, console: seen.extend(findings))
        status = doctor.doctor(config)
        failed = any(finding.passed is False for finding in seen)
        assert status == (ExitStatus.INTERNAL if failed else ExitStatus.DONE)
        return {finding.name: finding for finding in seen}

    return run


Diagnose = Callable[[str], dict[str, Finding]]


def failed(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if finding.passed is False}


@pytest.mark.parametrize("name", CONFIGS)
def test_healthy_architectures_pass(name: str, diagnose: Diagnose) -> None:
    findings = diagnose(name)
    assert failed(findings) == set()
    flat = findings["flat against padded, fp32"]
    if name == "gemma2":
        assert flat.passed is None and "soft-capped" in flat.text
    else:
        assert flat.passed and flat.difference is not None and flat.difference > 0
    assert len(findings) == 14


def test_flat_attention_that_ignores_borders_fails(
    diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = attention._grouped_attention

    def leaky(q: Any, k: Any, v: Any, layout: Any, *rest: Any) -> Any:
        return original(q, k, v, attention.FlatLayout.of([q.shape[2]]), *rest)

    monkeypatch.setattr(attention, "_grouped_attention", leaky)
    findings = failed(diagnose("llama"))
    assert "flat against padded, fp32" in findings
    assert "padded against plain transformers, fp32" not in findings


def test_a_shifted_mask_fails(diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch) -> None:
    original = batching.collate

    def shifted(examples: Any, *, flat: bool) -> Any:
        batch = original(examples, flat=flat)
        index = (batch.response_index - 1).clamp(min=0)
        return batching.Microbatch(**{**vars(batch), "response_index": index})

    monkeypatch.setattr(step, "collate", shifted)
    assert "padded against plain transformers, fp32" in failed(diagnose("qwen2"))


def test_a_loss_that_drops_a_token_fails(
    diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loss.masked_normalize

    def careless(tensor: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        return original(tensor[:-1], mask[:-1], *rest, **options)

    monkeypatch.setattr(loss, "masked_normalize", careless)
    assert "padded against plain transformers, fp32" in failed(diagnose("llama"))


def test_a_checkpoint_that_loses_a_tensor_fails(
    diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoint.module_tensors

    def forgetful(module: Any) -> Any:
        return dict(list(original(module).items())[1:])

    monkeypatch.setattr(checkpoint, "module_tensors", forgetful)
    assert failed(diagnose("llama")) == {"checkpoint written and read"}


def test_a_frozen_parameter_is_named(diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch) -> None:
    original = doctor.load_model

    def frozen(*arguments: Any, **options: Any) -> Any:
        model = original(*arguments, **options)
        model.model.layers[0].mlp.up_proj.weight.requires_grad = False
        return model

    monkeypatch.setattr(doctor, "load_model", frozen)
    findings = diagnose("llama")
    assert failed(findings) == {"every parameter has a gradient"}
    assert "layers.0.mlp.up_proj" in findings["every parameter has a gradient"].text


def test_examples_are_cut_where_something_is_trained() -> None:
    long = TokenRow.of_response(list(range(90)), 60)
    data = build_dataset().of([long, TokenRow.of_response([1, 2, 3], 1)])
    cut = cut_short(data, 4, 20)
    assert len(cut) == 2 and cut.lengths.tolist() == [20, 3]
    assert cut[0].input_ids.tolist() == list(range(50, 70))
    assert cut[0].response_mask.tolist() == [False] * 10 + [True] * 10


def test_dropout_is_off_and_on_again() -> None:
    model = build_model("gpt2").eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    ids = torch.arange(9)[None]
    with without_dropout(model), torch.no_grad():
        assert model.training
        assert torch.equal(model(ids).logits, model(ids).logits)
    assert not model.training
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
