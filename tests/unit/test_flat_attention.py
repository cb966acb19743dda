"""What the CUDA kernel for flat rows is given, and that the start tries what training will run.

The kernel itself runs on a GPU alone (`tests/gpu`); here a stand-in with its signature computes what
its documentation says, so that its arguments are checked everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from cs336_alignment.microbatch import FlatLayout
from cs336_alignment.model import attention
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.batching_choice import choose_batching
from cs336_alignment.training.preflight import choose_precision, doubt_about
from tests.conftest import VOCABULARY, build_model

LENGTHS, PREFIX = [5, 3, 3, 1], 4


def kernel(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, key_borders: Tensor, *longest: int,
    scale: float | None, window_size: tuple[int, int], grouped: bool,
) -> Tensor:  # fmt: skip
    """Attention sequence by sequence, the last query aligned with the last key."""
    assert window_size == (-1, 0)  # causal
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "the kernel wants the last dimension dense"
    assert borders.dtype == key_borders.dtype == torch.int32
    assert grouped or q.shape[1] == k.shape[1]
    sizes = [ends.diff().max() for ends in (borders, key_borders)]
    assert all(type(n) is int and n >= size for n, size in zip(longest, sizes, strict=True))
    assert borders[-1] == len(q) and key_borders[-1] == len(k) == len(v)
    groups = q.shape[1] // k.shape[1]
    outputs = []
    for index in range(len(borders) - 1):
        own = slice(borders[index], borders[index + 1])
        seen = slice(key_borders[index], key_borders[index + 1])
        keys, values = (x[seen].repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[own], keys)
        scores = scores * (q.shape[2] ** -0.5 if scale is None else scale)
        late = torch.ones(scores.shape[1:]).triu(scores.shape[2] - scores.shape[1] + 1).bool()
        weights = scores.masked_fill(late, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)


def of_torch_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int,
    max_k: int, *, return_aux: Any = None, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale,
                  window_size=window_size, grouped=False)  # fmt: skip


def of_torch_2_12(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None,
    max_q: int, max_k: int, *, return_aux: Any = None, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    assert cu_seq_k is not None
    return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale,
                  window_size=window_size, grouped=enable_gqa)  # fmt: skip


@pytest.mark.parametrize("signature", [of_torch_2_11, of_torch_2_12])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("prefix", [0, PREFIX])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_the_kernel_is_told_what_sdpa_computes(
    scaling: float | None, prefix: int, heads: int, signature: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(varlen, "varlen_attn", signature)
    torch.manual_seed(0)
    layout, total = FlatLayout.of(LENGTHS, prefix), prefix + sum(LENGTHS)
    # as a layer gives them: (1, T, heads, D), transposed
    query, key, value = (
        torch.randn(1, total, n, 8, dtype=torch.float64).transpose(1, 2) for n in (4, heads, heads)
    )
    if layout.prefix is not None:
        key, value = (attention._with_prefix(x, layout.prefix) for x in (key, value))
    want = attention._grouped_attention(query, key, value, layout, 0.0, scaling)
    got = attention._varlen_attention(query, key, value, layout, scaling)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_stand_in_has_the_signature_of_this_torch() -> None:
    """If a parameter that is used here goes, so must the code."""
    real = inspect.signature(varlen.varlen_attn).parameters
    stand_in = inspect.signature(of_torch_2_11).parameters
    assert list(real)[:7] == list(stand_in)[:7]
    assert {name: real[name].kind for name in ("scale", "window_size")} == {
        name: stand_in[name].kind for name in ("scale", "window_size")
    }


@pytest.mark.parametrize(
    ("dtype", "size", "of_values", "dropout", "taken"),
    [
        (torch.bfloat16, 64, 64, 0.0, True), (torch.float16, 256, 256, 0.0, True),
        (torch.float32, 64, 64, 0.0, False), (torch.float64, 64, 64, 0.0, False),
        (torch.bfloat16, 64, 64, 0.1, False), (torch.bfloat16, 20, 20, 0.0, False),
        (torch.bfloat16, 512, 512, 0.0, False), (torch.bfloat16, 192, 128, 0.0, False),
    ],
)  # fmt: skip
def test_what_the_kernel_does_not_take_goes_to_sdpa(
    dtype: torch.dtype, size: int, of_values: int, dropout: float, taken: bool
) -> None:
    query, value = (torch.empty(1, 2, 3, n, dtype=dtype) for n in (size, of_values))
    assert attention.takes_varlen(query, value, dropout) == taken


def test_the_start_tries_the_compute_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the kernel for bfloat16 alone is found before training, and so is its refusal."""
    policy = Policy(build_model("llama", torch.float32), torch.bfloat16)
    assert choose_batching(policy, "auto", 16).batching == "flat_shared_prefix"
    assert policy.autocast_dtype == torch.bfloat16
    original = attention._grouped_attention

    def without_borders(query, key, value, layout, dropout, scaling):  # type: ignore[no-untyped-def]
        if query.dtype == torch.bfloat16:
            layout = FlatLayout.of([query.shape[2]])
        return original(query, key, value, layout, dropout, scaling)

    def refuse(query, *rest):  # type: ignore[no-untyped-def]
        if query.dtype == torch.bfloat16:
            raise RuntimeError("no kernel")
        return original(query, *rest)

    for broken, reason in ((without_borders, "in bfloat16 a flat row"), (refuse, "no kernel")):
        monkeypatch.setattr(attention, "_grouped_attention", broken)
        choice = choose_batching(policy, "auto", 16)
        assert choice.batching == "padded" and reason in choice.reason
        assert policy.autocast_dtype == torch.bfloat16


def test_a_cap_that_nobody_knows_is_found_where_logits_are_small() -> None:
    """RecurrentGemma caps its logits under a name of its own; drawn weights give small ones."""
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, block_types=["recurrent", "attention"], logits_soft_cap=30.0,
    )  # fmt: skip
    policy = Policy(RecurrentGemmaForCausalLM(config))
    with torch.no_grad():
        assert policy.model(torch.arange(9)[None]).logits.abs().max() < 5
    assert policy.head is not None
    choose_batching(policy, "auto", 16)
    assert policy.head is None


def test_bfloat16_that_a_device_emulates_is_not_chosen_and_told() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) is None and doubt_about(None, cpu) == ""
    assert choose_precision("bf16", cpu) == torch.bfloat16
    assert "emulate" in doubt_about(torch.bfloat16, cpu)
