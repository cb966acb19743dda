"""Label smoothing, z-loss and DFT against torch's formulas on whole logits, in float64."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from cs336_alignment.config import TrainerConfig
from cs336_alignment.microbatch import Batching
from cs336_alignment.model import lm_head
from cs336_alignment.model.lm_head import Head, head_values
from cs336_alignment.model.policy import Policy
from cs336_alignment.training import step as step_module
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.step import Cut, accumulate_gradients, objective_of
from tests.conftest import build_dataset, build_model
from tests.reference import dense_log_probs, dense_loss, gradient, relative_error, token_losses

TRAINERS = {
    "smoothed": TrainerConfig(label_smoothing=0.2),
    "z-loss": TrainerConfig(z_loss=0.05),
    "dft": TrainerConfig(loss="dft"),
    "smoothed, z-loss": TrainerConfig(label_smoothing=0.1, z_loss=0.01),
    "dft, z-loss": TrainerConfig(loss="dft", z_loss=0.01),
}
each_trainer = pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS)
IDS = list(range(8))


@each_trainer
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (0.25, 5.0, True)])
@pytest.mark.parametrize("rows", [3, 64])
@pytest.mark.parametrize("slopes", [None, "right", "wrong"])
def test_the_chunked_head_against_whole_logits(
    trainer: TrainerConfig, slopes: str | None, rows: int, scale: float, softcap: float | None,
    bias: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    calls, original = [], lm_head._logits
    monkeypatch.setattr(lm_head, "_logits", lambda *a: calls.append(0) or original(*a))
    monkeypatch.setattr(lm_head, "_chunk_rows", lambda *_: rows)
    linear = nn.Linear(8, 31, bias=bias).double()
    hidden = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(31, (10,))
    upstream = torch.randn(10, dtype=torch.float64)
    logits = linear(hidden) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    want = -token_losses(logits, labels, trainer)
    want_grads = torch.autograd.grad((want * upstream).sum(), [hidden, *linear.parameters()])
    said = {"right": upstream, "wrong": upstream + 1}.get(slopes or "")
    head, objective = Head(linear, scale, softcap), objective_of(trainer)
    assert objective is not None
    got, entropy, log_probs = head_values(head, hidden, labels, objective, True, said)
    got_grads = torch.autograd.grad((got * upstream).sum(), [hidden, *linear.parameters()])
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert not log_probs.requires_grad
    plain, plain_entropy, _ = head_values(head, hidden, labels, with_entropy=True)
    assert torch.equal(log_probs, plain) and torch.equal(entropy, plain_entropy)
    # Known beforehand, the gradient takes no second look at the logits.
    chunks = -(-10 // rows)
    assert len(calls) == chunks * (1 if slopes == "right" else 2) + chunks


def dense(name: str, trainer: TrainerConfig, normalization: str, weighted: bool) -> Tensor:
    model = build_model(name)
    data = build_dataset(prefix=19, weighted=weighted)
    dense_loss(model, data, IDS, normalization, trainer).backward()
    return gradient(model)


@each_trainer
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["llama", "nanochat", "phi", "whole"])
def test_a_step_minimizes_the_objective_and_reports_the_plain_loss(
    name: str, weighted: bool, trainer: TrainerConfig, processes: Processes, wide_norms: None
) -> None:
    """Tied; capped; with a bias; a head that the framework does not know."""
    model = name if name != "whole" else "llama"
    data, want = (
        build_dataset(prefix=19, weighted=weighted),
        dense(model, trainer, "token", weighted),
    )
    log_probs, mask = dense_log_probs(build_model(model), data, IDS)
    reference = dense_loss(build_model(model), data, IDS, "token", trainer).item()
    policy = Policy(build_model(model))
    if name == "whole":
        policy.head = None
    for batching in get_args(Batching):
        policy.zero_grad(set_to_none=True)
        result = accumulate_gradients(
            policy, data, IDS, cut=Cut(None, 3, batching), trainer=trainer, processes=processes,
            seed=0, step=0, with_entropy=True,
        )  # fmt: skip
        assert relative_error(gradient(policy.model), want) <= 1e-12, batching
        assert result.nll.item() == pytest.approx(-log_probs[mask].sum().item(), rel=1e-12)
        assert result.objective.item() == pytest.approx(reference, rel=1e-12)


@each_trainer
def test_bf16_rounds_no_more_than_plain_transformers_do(
    trainer: TrainerConfig, processes: Processes
) -> None:
    data, want = build_dataset(prefix=19), dense("llama", trainer, "token", False)
    plain = build_model("llama", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dense_loss(plain, data, IDS, "token", trainer)
    loss.backward()
    policy = Policy(build_model("llama", torch.float32), torch.bfloat16)
    accumulate_gradients(
        policy, data, IDS, cut=Cut(None, 1, "flat"), trainer=trainer, processes=processes, seed=0, step=0
    )  # fmt: skip
    limit = 1.5 * relative_error(gradient(plain).double(), want)
    assert relative_error(gradient(policy.model).double(), want) <= limit


def test_the_scalar_that_goes_backward_is_masked_normalize(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halve what it returns to the loss, and every gradient must halve."""
    from cs336_alignment.training import loss

    original, found = loss.masked_normalize, []
    for by in (1, 2):
        monkeypatch.setattr(loss, "masked_normalize", lambda *a, by=by, **k: original(*a, **k) / by)
        policy = Policy(build_model("llama"))
        accumulate_gradients(
            policy, build_dataset(), IDS, cut=Cut(None, 2, "flat"), trainer=TRAINERS["smoothed, z-loss"],
            processes=processes, seed=0, step=0,
        )  # fmt: skip
        found.append(gradient(policy.model))
    assert relative_error(found[1] * 2, found[0]) <= 1e-12
    assert step_module.microbatch_loss is loss.microbatch_loss


def test_nothing_chosen_is_no_objective() -> None:
    assert objective_of(TrainerConfig()) is None
