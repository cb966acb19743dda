"""AdamW is the paper's, decays matrices only, and takes the rate it is told."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cs336_alignment.config import OptimizerConfig
from cs336_alignment.training.optimizer import build_optimizer, set_learning_rate


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
