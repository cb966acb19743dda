"""Every layout × head × precision × checkpointing gives the padded dense path's loss and gradient.

The reference is one padded batch through plain transformers in float64, its logits everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import (
    CTRLConfig,
    CTRLLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
)

from cs336_alignment.config import TrainerConfig
from cs336_alignment.data.batching import collate
from cs336_alignment.errors import UserError
from cs336_alignment.evaluation.loss import evaluate_loss
from cs336_alignment.microbatch import Batching
from cs336_alignment.model import lm_head
from cs336_alignment.model.lm_head import head_of
from cs336_alignment.model.log_probs import get_response_log_probs
from cs336_alignment.model.policy import Policy
from cs336_alignment.model.recompute import enable_checkpointing
from cs336_alignment.training import step as step_module
from cs336_alignment.training.batching_choice import choose_batching
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.step import Cut, accumulate_gradients
from tests.conftest import VOCABULARY, build_dataset, build_model
from tests.reference import (
    dense_log_probs,
    dense_loss,
    gradient,
    relative_error,
    stay_in_float64,
)

# tied and plain; untied; tied with LayerNorms; capped; divided and tied; with a bias
MODELS = ("llama", "qwen2", "gpt2", "nanochat", "granite", "phi")
IDS = list(range(8))
PREFIX = 19
BF16 = torch.bfloat16
# In bfloat16 two roundings of the same numbers differ as much as either is off: what training adds
# must be below what plain transformers' padded path is off under the same autocast.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}
NO_WORSE = 1.5


@pytest.fixture(autouse=True, scope="module")
def wide() -> Iterator[None]:
    patch = stay_in_float64()
    yield
    patch.undo()


@lru_cache
def reference(name: str, autocast: bool = False) -> tuple[float, Tensor]:
    """Loss and gradient of plain transformers: in float64, or in bfloat16 with float32 weights."""
    model = build_model(name, torch.float32 if autocast else torch.float64)
    with torch.autocast("cpu", BF16, enabled=autocast):
        loss = dense_loss(model, build_dataset(prefix=PREFIX), IDS, "token")
    loss.backward()
    return loss.item(), gradient(model).double()


def bound(name: str, precision: torch.dtype) -> float:
    if precision in BOUNDS:
        return BOUNDS[precision]
    return NO_WORSE * relative_error(reference(name, autocast=True)[1], reference(name)[1])


def build(name: str, precision: torch.dtype) -> Policy:
    narrow = precision == BF16
    return Policy(
        build_model(name, torch.float32 if narrow else precision), BF16 if narrow else None
    )


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.parametrize("precision", [torch.float64, torch.float32, BF16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_combination_gives_the_dense_loss_and_gradient(
    name: str, precision: torch.dtype, checkpointing: bool | str, processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    dataset, policy = build_dataset(prefix=PREFIX), build(name, precision)
    if checkpointing:
        enable_checkpointing(policy.model, selective=checkpointing == "selective")
    policy.train()
    monkeypatch.setattr(lm_head, "_chunk_rows", lambda *_: 17)  # several chunks, the last shorter
    loss, want = reference(name)
    limit = bound(name, precision)
    for products in (3, 4):
        if products == 4:  # the gradient is not known before the backward pass
            monkeypatch.setattr(step_module, "loss_slopes", lambda *_: None)
        for batching in get_args(Batching):
            policy.zero_grad(set_to_none=True)
            result = accumulate_gradients(
                policy, dataset, IDS, cut=Cut(None, 1, batching), trainer=TrainerConfig(),
                processes=processes, seed=0, step=0,
            )  # fmt: skip
            case = f"{batching}, {products} products"
            got = result.nll.item() / int(dataset.response_lengths[IDS].sum())
            assert abs(got / loss - 1) <= limit, case
            assert relative_error(gradient(policy.model).double(), want) <= limit, case


@pytest.mark.parametrize("precision", [torch.float64, torch.float32, BF16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_evaluation_and_the_public_log_probs_are_the_dense_ones(
    name: str, precision: torch.dtype, processes: Processes
) -> None:
    dataset, policy = build_dataset(prefix=PREFIX), build(name, precision)
    ids = range(len(dataset))
    with torch.no_grad():
        dense, mask = dense_log_probs(build_model(name), dataset, ids)
        wide = dense[mask]
        batch = collate([dataset[i] for i in ids], batching="padded")
        rows = batch.input_ids
        labels = torch.zeros_like(rows)
        labels[mask] = batch.labels
        with torch.autocast("cpu", BF16, enabled=precision == BF16):
            public = get_response_log_probs(policy.model, rows, labels)["log_probs"][mask]
    # Each log-prob within the bound of its size in words; in bfloat16 the logits carry 8 bits.
    limit = {torch.float64: 1e-12, torch.float32: 1e-4, BF16: 0.3}[precision]
    assert (public - wide).abs().max() <= limit
    want = -wide.mean().item()
    for batching in get_args(Batching):
        with torch.no_grad():
            chosen = policy(collate([dataset[i] for i in ids], batching=batching))[0]
        assert (chosen - wide).abs().max() <= limit, batching
        result = evaluate_loss(policy, dataset, processes, microbatch_tokens=90, batching=batching)
        assert result["eval/loss"] == pytest.approx(want, rel=limit), batching


def test_heads_are_read_from_the_models() -> None:
    heads = {name: head_of(build_model(name)) for name in MODELS}
    found = {
        name: (head.scale, head.softcap, head.linear.bias is not None)
        for name, head in heads.items() if head is not None
    }  # fmt: skip
    assert found == {
        "llama": (1.0, None, False), "qwen2": (1.0, None, False), "gpt2": (1.0, None, False),
        "nanochat": (1.0, 3.0, False), "granite": (0.25, None, False), "phi": (1.0, None, True),
    }  # fmt: skip


COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
NOT_FLAT: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "sliding windows": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}, "sliding window"),
    "capped scores": (
        Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 3.0}, "scores are soft-capped"
    ),
    "convolutions": (
        Lfm2Config, Lfm2ForCausalLM, {"layer_types": ["conv", "full_attention"]}, "of type conv"
    ),
    "alibi": (
        MptConfig, MptForCausalLM, {"d_model": 32, "n_heads": 4, "n_layers": 2},
        "attention interface",
    ),
    "recurrence": (
        RwkvConfig, RwkvForCausalLM, {"attention_hidden_size": 32}, "attention interface"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_FLAT)
def test_architectures_that_take_no_flat_rows_are_padded_and_say_why(
    kind: str, processes: Processes
) -> None:
    config, architecture, options, reason = NOT_FLAT[kind]

    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        model: PreTrainedModel = architecture(config(**COMMON, **options))
        return model

    dataset, policy = build_dataset(prefix=PREFIX), Policy(build())
    choice = choose_batching(policy, "auto", 40)
    assert choice.batching == "padded" and reason in choice.reason
    for wanted in ("flat", "flat_shared_prefix"):
        with pytest.raises(UserError, match=rf"trainer\.batching={wanted} .*{reason}"):
            choose_batching(policy, wanted, 40)
    plain = build()
    dense_loss(plain, dataset, IDS, "token").backward()
    accumulate_gradients(
        policy, dataset, IDS, cut=Cut(None, 2, "padded"), trainer=TrainerConfig(),
        processes=processes, seed=0, step=0,
    )  # fmt: skip
    assert relative_error(gradient(policy.model), gradient(plain)) <= 1e-5


def test_a_model_that_cannot_recompute_says_so() -> None:
    model = CTRLLMHeadModel(CTRLConfig(vocab_size=9, n_embd=8, dff=8, n_layer=1, n_head=2))
    with pytest.raises(UserError, match=r"trainer\.gradient_checkpointing and model\.name_or_path"):
        enable_checkpointing(model)
