"""Each optimizer takes the parameters that are its own, at the rate and decay it is told."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor, nn

from cs336_alignment.config import OptimizerConfig
from cs336_alignment.errors import UserError
from cs336_alignment.training.optimizer import (
    build_optimizer,
    clip_gradients,
    set_learning_rate,
)
from tests.conftest import build_model


class Tied(nn.Module):
    """An embedding that is also the output matrix, a norm, a bias and a frozen matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.norm = nn.LayerNorm(5)
        self.middle = nn.Linear(5, 5)
        self.frozen = nn.Linear(5, 5, bias=False).requires_grad_(False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.middle(self.norm(self.embedding(ids)))
        return self.head(hidden + self.frozen(hidden))  # type: ignore[no-any-return]


def build(dtype: torch.dtype) -> Tied:
    torch.manual_seed(0)
    return Tied().to(dtype)


def config(weight_decay: float = 0.1) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=1e-2, betas=[0.8, 0.95], eps=1e-6, weight_decay=weight_decay
    )


def test_decay_falls_on_matrices_and_a_tied_weight_is_one() -> None:
    module = build(torch.float32)
    optimizer = build_optimizer(module, config())
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = [
        (group["weight_decay"], {names[p] for p in group["params"]})
        for group in optimizer.param_groups
    ]
    assert groups == [
        (0.1, {"embedding.weight", "middle.weight"}),
        (0.0, {"norm.weight", "norm.bias", "middle.bias"}),
    ]
    assert all(group["fused"] for group in optimizer.param_groups)


def test_a_module_without_biases_has_one_group() -> None:
    optimizer = build_optimizer(nn.Linear(3, 3, bias=False), config())
    assert len(optimizer.param_groups) == 1


def reference_adamw(
    start: dict[str, Tensor], gradients: list[dict[str, Tensor]], rates: list[float]
) -> dict[str, Tensor]:
    """Algorithm 2 of arXiv 1711.05101, with decay times rate as in torch, in plain float64."""
    chosen = config()
    (beta1, beta2), eps = chosen.betas, chosen.eps
    result = {}
    for name, value in start.items():
        w = value.double().clone()
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        decay = chosen.weight_decay if w.ndim >= 2 else 0.0
        for t, (step, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
            g = step[name].double()
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            root = v.sqrt() / math.sqrt(1 - beta2**t)
            w = w - rate * decay * w - rate * m / (1 - beta1**t) / (root + eps)
        result[name] = w
    return result


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_fused_steps_equal_the_formula(dtype: torch.dtype, tolerance: float) -> None:
    module = build(dtype)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    frozen = module.frozen.weight.clone()
    start = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = build_optimizer(module, config())
    rates, gradients = [1e-2, 3e-3, 7e-3, 1e-4, 5e-3], []
    for rate in rates:
        ids = torch.arange(7)
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(module(ids), ids.flip(0)).backward()
        gradients.append({n: p.grad.clone() for n, p in trained.items() if p.grad is not None})
        set_learning_rate(optimizer, rate)
        optimizer.step()
    expected = reference_adamw(start, gradients, rates)
    for name, parameter in trained.items():
        torch.testing.assert_close(
            parameter.detach().double(), expected[name], rtol=tolerance, atol=tolerance
        )
        assert not torch.equal(parameter, start[name])
    assert torch.equal(module.frozen.weight, frozen)


def kinds(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, tuple[float, float]]:
    """Parameter → weight decay and factor of the rate."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        names[p]: (group["weight_decay"], group["lr"])
        for group in optimizer.param_groups for p in group["params"]
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_muon_takes_the_hidden_matrices_alone(name: str) -> None:
    model = build_model(name, torch.float32)
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", weight_decay=0.1))
    muons = {id(p) for g in optimizer.param_groups if "ns_steps" in g for p in g["params"]}
    all_of = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert all_of == {id(p) for p in model.parameters()}
    hidden = {n for n, p in model.named_parameters() if id(p) in muons}
    assert hidden == {
        n for n, p in model.named_parameters()
        if p.ndim == 2 and not any(word in n for word in ("embed", "lm_head", "wte", "wpe"))
    }  # fmt: skip
    assert len(hidden) == (2 * 7 if name != "gpt2" else 2 * 4)
    assert {decay for decay, _ in kinds(optimizer, model).values()} == {0.1, 0.0}


def test_one_rate_moves_muons_matrices_as_far_as_adamw_would() -> None:
    moved = []
    for kind in ("adamw", "muon"):
        model = build_model("llama", torch.float32)
        optimizer = build_optimizer(model, OptimizerConfig(name=kind))
        set_learning_rate(optimizer, 1e-3)
        weight = model.model.layers[0].mlp.up_proj.weight
        before = weight.detach().clone()
        torch.manual_seed(0)
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        optimizer.step()
        moved.append(float((weight - before).square().mean().sqrt()))
    assert 0.1 < moved[1] / moved[0] < 0.4  # the paper's 0.2, of a first step of AdamW's


def test_muon_without_hidden_matrices_is_an_error() -> None:
    model = build_model("llama").requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(UserError, match=r"C160.*none is trained"):
        build_optimizer(model, OptimizerConfig(name="muon"))
    model.model.layers.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(False)
    build_optimizer(model, OptimizerConfig(name="muon"))


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon", "schedule_free"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_each_layer_learns_slower_than_the_one_above(name: str, kind: str) -> None:
    model = build_model(name, torch.float32)
    optimizer = build_optimizer(model, OptimizerConfig(name=kind, layer_lr_decay=0.5))
    set_learning_rate(optimizer, 8.0)
    for parameter, (_, rate) in kinds(optimizer, model).items():
        if any(word in parameter for word in ("embed", "wte", "wpe")):
            assert rate == 2.0, parameter
        else:
            assert rate == (4.0 if ".0." in parameter else 8.0), parameter


def test_a_module_that_names_no_layers_has_no_layer_wise_rates() -> None:
    with pytest.raises(UserError, match=r"optimizer\.layer_lr_decay=1"):
        build_optimizer(nn.Linear(3, 3), OptimizerConfig(layer_lr_decay=0.5))


def test_without_schedulefree_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cs336_alignment.training.schedule_free", raising=False)
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(UserError, match=r"C161[\s\S]*schedulefree"):
        build_optimizer(nn.Linear(3, 3), OptimizerConfig(name="schedule_free"))


def test_the_norm_of_a_large_gradient_is_exact_and_scales_it() -> None:
    torch.manual_seed(0)
    module = nn.ModuleDict({"embedding": nn.Embedding(49152, 256), "norm": nn.RMSNorm(256)})
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    want = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert float(clip_gradients(module, 3.0)) == pytest.approx(want, rel=1e-6)
    clipped = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert clipped == pytest.approx(3.0, rel=1e-6)
