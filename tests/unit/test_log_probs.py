"""Log-probs and entropies, dense and chunked, against a float64 log-softmax."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from cs336_alignment.data.batching import collate
from cs336_alignment.microbatch import Batching
from cs336_alignment.model import lm_head
from cs336_alignment.model.attention import FLAT_ATTENTION
from cs336_alignment.model.lm_head import Head, head_values
from cs336_alignment.model.policy import Policy
from cs336_alignment.sft import compute_entropy, get_response_log_probs
from cs336_alignment.training.batching_choice import choose_batching
from tests.conftest import VOCABULARY, build_dataset, build_model
from tests.reference import dense_log_probs


class Fixed(nn.Module):
    """A model whose logits are given."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, *_: object, **__: object) -> Fixed:
        return self


def entropy64(logits: torch.Tensor) -> torch.Tensor:
    log_p = logits.double().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 7, 151_936).to(dtype)
    labels = torch.randint(151_936, (3, 7))
    result = get_response_log_probs(Fixed(logits), labels, labels, return_token_entropy=True)
    want = logits.double().log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    assert (result["log_probs"] - want).abs().max() <= 1e-5
    assert (result["token_entropy"] - entropy64(logits)).abs().max() <= 1e-5
    assert set(get_response_log_probs(Fixed(logits), labels, labels)) == {"log_probs"}


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
def test_large_logits_stay_finite(scale: float) -> None:
    torch.manual_seed(0)
    logits = scale * torch.randn(2, 3, 101).sign()
    logits[0, 0] = -scale
    logits[0, 0, 5] = scale
    labels = torch.randint(101, (2, 3))
    result = get_response_log_probs(Fixed(logits), labels, labels, return_token_entropy=True)
    assert result["log_probs"].isfinite().all() and (result["log_probs"] <= 0).all()
    entropy = result["token_entropy"]
    assert entropy.isfinite().all() and (entropy >= 0).all()
    torch.testing.assert_close(entropy.double(), entropy64(logits), rtol=1e-4, atol=1e-4)
    logits[..., 0] = -torch.inf  # a forbidden token
    assert compute_entropy(logits).isfinite().all()


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        get_response_log_probs(nn.Identity(), torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("slopes", [None, "right", "wrong"])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_chunked_head_against_float64(
    with_entropy: bool, slopes: str | None, rows: int, bias: bool, scale: float, softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    calls, original = [], lm_head._logits
    monkeypatch.setattr(lm_head, "_logits", lambda *a: calls.append(0) or original(*a))
    monkeypatch.setattr(lm_head, "_chunk_rows", lambda *_: rows)
    linear = nn.Linear(8, 31, bias=bias).double()
    hidden = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(31, (10,))
    upstream = torch.randn(10, dtype=torch.float64)

    def reference() -> torch.Tensor:
        logits = linear(hidden) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return logits

    want = reference().log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    want_grads = torch.autograd.grad((want * upstream).sum(), [hidden, *linear.parameters()])
    said = {"right": upstream, "wrong": upstream + 1}.get(slopes or "")
    head = Head(linear, scale, softcap)
    got, entropy, _ = head_values(head, hidden, labels, None, with_entropy, said)
    got_grads = torch.autograd.grad((got * upstream).sum(), [hidden, *linear.parameters()])
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    if with_entropy:
        assert entropy is not None and not entropy.requires_grad
        torch.testing.assert_close(entropy, entropy64(reference()), rtol=1e-12, atol=1e-12)
    else:
        assert entropy is None
    # Known beforehand, the gradient takes no second look at the logits.
    assert len(calls) == -(-10 // rows) * (1 if slopes == "right" else 2)


def test_chunked_head_is_stable_for_large_logits() -> None:
    linear = nn.Linear(4, 11, bias=False)
    nn.init.normal_(linear.weight, std=1e4)
    hidden = torch.randn(6, 4, requires_grad=True)
    log_probs, entropy, _ = head_values(Head(linear), hidden, torch.arange(6), with_entropy=True)
    log_probs.sum().backward()
    assert hidden.grad is not None and entropy is not None
    assert log_probs.isfinite().all() and hidden.grad.isfinite().all() and (entropy >= 0).all()


def test_head_without_labels_has_a_gradient_of_zero() -> None:
    linear, hidden = nn.Linear(4, 11), torch.randn(0, 4, requires_grad=True)
    log_probs, *_ = head_values(Head(linear), hidden, torch.arange(0), slopes=torch.ones(0))
    log_probs.sum().backward()
    assert linear.weight.grad is not None and not linear.weight.grad.any()


def test_bf16_autocast_accumulates_in_float32() -> None:
    torch.manual_seed(0)
    linear, hidden = nn.Linear(64, 301, bias=False), torch.randn(50, 64)
    labels = torch.randint(301, (50,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_probs, *_ = head_values(Head(linear), hidden, labels)
    log_probs.sum().backward()
    assert log_probs.dtype == torch.float32
    assert linear.weight.grad is not None and linear.weight.grad.dtype == torch.float32
    want = linear(hidden).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(log_probs, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("prefix", [0, 30])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_flat_equals_padded_equals_dense(name: str, prefix: int) -> None:
    dataset, model = build_dataset(prefix=prefix), build_model(name)
    policy = Policy(model)
    assert model.config._attn_implementation == FLAT_ATTENTION
    examples = [dataset[i] for i in range(len(dataset))]
    dense, mask = dense_log_probs(build_model(name), dataset, range(len(dataset)))
    for batching in get_args(Batching):
        log_probs, entropy = policy(collate(examples, batching=batching), with_entropy=True)
        torch.testing.assert_close(log_probs, dense[mask], rtol=1e-12, atol=1e-12)
        assert entropy is not None and (entropy >= 0).all()


def test_a_leak_between_sequences_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With borders ignored, `auto` must fall back to padded rows and `flat` must be refused."""
    from cs336_alignment.errors import UserError
    from cs336_alignment.model import attention

    policy = Policy(build_model("llama"))
    assert choose_batching(policy, "auto", 16).batching == "flat_shared_prefix"

    original = attention._grouped_attention

    def leaky(query, key, value, layout, dropout, scaling):  # type: ignore[no-untyped-def]
        total = query.shape[2]
        joined = attention.FlatLayout.of([total])
        return original(query, key, value, joined, dropout, scaling)

    monkeypatch.setattr(attention, "_grouped_attention", leaky)
    choice = choose_batching(policy, "auto", 16)
    assert choice.batching == "padded" and "differs" in choice.reason
    with pytest.raises(UserError, match="not exact"):
        choose_batching(policy, "flat", 16)


def test_a_prefix_that_is_not_seen_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` must fall back to flat rows, and `flat_shared_prefix` must be refused."""
    from cs336_alignment.errors import UserError
    from cs336_alignment.model import attention

    def deaf(x, prefix):  # type: ignore[no-untyped-def]
        shared = x.index_select(2, prefix.key_index)
        return shared * (torch.arange(shared.shape[2]) >= prefix.length)[:, None]

    policy = Policy(build_model("llama"))
    monkeypatch.setattr(attention, "_with_prefix", deaf)
    choice = choose_batching(policy, "auto", 16)
    assert choice.batching == "flat" and "differs" in choice.reason
    with pytest.raises(UserError, match="flat_shared_prefix is not exact"):
        choose_batching(policy, "flat_shared_prefix", 16)


def test_dropout_and_a_shared_prefix_do_not_combine() -> None:
    from cs336_alignment.errors import UserError

    model = build_model("gpt2")
    model.config.attn_pdrop = 0.1
    choice = choose_batching(Policy(model), "auto", 16)
    assert choice.batching == "flat" and "attn_pdrop=0.1" in choice.reason
    with pytest.raises(UserError, match=r"flat_shared_prefix .* \(attn_pdrop=0\.1\)"):
        choose_batching(Policy(model), "flat_shared_prefix", 16)


def test_sliding_windows_and_unknown_heads_fall_back() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    policy = Policy(MistralForCausalLM(config))
    choice = choose_batching(policy, "auto", longest=20)
    assert choice.batching == "padded" and "sliding window" in choice.reason
    scaled = Policy(build_model("llama"))
    assert scaled.head is not None
    scaled.head = Head(
        scaled.head.linear, scale=2.0
    )  # a scaling that this project knows nothing of
    choose_batching(scaled, "auto", 16)
    assert scaled.head is None
    dataset = build_dataset()
    dense, mask = dense_log_probs(build_model("llama"), dataset, [0, 1, 2])
    log_probs, _ = scaled(collate([dataset[i] for i in range(3)], batching="flat"))
    torch.testing.assert_close(log_probs, dense[mask], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batching", get_args(Batching))
def test_a_callers_autocast_is_left_on(batching: Batching) -> None:
    policy = Policy(build_model("llama", torch.float32))
    batch = collate([build_dataset()[i] for i in range(3)], batching=batching)
    with torch.no_grad():
        exact = policy(batch)[0]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = policy(batch)[0]
    assert 1e-4 < (rounded - exact).abs().max() < 1e-1
