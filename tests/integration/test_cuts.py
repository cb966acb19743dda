"""The gradient of a step does not depend on how it is cut, on one process."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from cs336_alignment.config import TrainerConfig
from cs336_alignment.data.batching import shared_prefix
from cs336_alignment.evaluation.loss import evaluate_loss
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.policy import Policy
from cs336_alignment.model.recompute import enable_checkpointing
from cs336_alignment.training import step as step_module
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.step import Cut, accumulate_gradients, prepare
from tests.conftest import build_dataset, build_model
from tests.reference import dense_log_probs, dense_loss, gradient, relative_error

STEPS = {"full": list(range(8)), "short": [8, 3, 10], "lone": [5]}
CUTS = [
    Cut(None, 1, "flat"), Cut(None, 2, "flat"), Cut(None, 4, "flat"), Cut(None, 8, "flat"),
    Cut(None, 1, "padded"), Cut(None, 2, "padded"), Cut(None, 4, "padded"), Cut(None, 8, "padded"),
    Cut(None, 2, "flat_shared_prefix"),
    Cut(17, None, "flat"), Cut(17, None, "padded"), Cut(4096, None, "flat"), Cut(1, None, "flat"),
]  # fmt: skip
PREFIX = 19  # tokens that all examples of the second data set begin with
SHARED = [
    Cut(None, 1, "flat_shared_prefix"), Cut(None, 2, "flat_shared_prefix"),
    Cut(None, 3, "flat_shared_prefix"), Cut(70, None, "flat_shared_prefix"),
]  # fmt: skip
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}


def step_gradient(
    policy: Policy, ids: list[int], cut: Cut, normalization: str, processes: Processes,
    *, weighted: bool = False, prefix: int = 0,
) -> Tensor:  # fmt: skip
    policy.zero_grad(set_to_none=True)
    accumulate_gradients(
        policy, build_dataset(weighted=weighted, prefix=prefix), ids, cut=cut, processes=processes, seed=0, step=0,
        trainer=TrainerConfig(loss_normalization=normalization, normalize_constant=3.0),
    )  # fmt: skip
    return gradient(policy.model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.fault("T23 every cut of a step")
def test_every_cut_gives_the_dense_gradient(
    name: str, normalization: str, dtype: torch.dtype, processes: Processes
) -> None:
    policy = Policy(build_model(name, dtype))
    for ids in STEPS.values():
        reference = build_model(name, dtype)
        dense_loss(reference, build_dataset(), ids, normalization).backward()
        want = gradient(reference)
        for cut in CUTS:
            error = relative_error(step_gradient(policy, ids, cut, normalization, processes), want)
            assert error <= BOUNDS[dtype], (ids, cut, error)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.fault("T23 every cut of a step")
def test_a_prefix_computed_once_gives_the_dense_gradient(
    name: str, normalization: str, dtype: torch.dtype, weighted: bool, processes: Processes,
    wide_norms: None,
) -> None:  # fmt: skip
    policy, dataset = Policy(build_model(name, dtype)), build_dataset(prefix=PREFIX)
    # The last token of the prefix may predict a trained one, so it may be each example's own.
    assert shared_prefix([dataset[i] for i in STEPS["full"]]) in (PREFIX - 1, PREFIX)
    for ids in STEPS.values():
        reference = build_model(name, dtype)
        data = build_dataset(weighted=weighted, prefix=PREFIX)
        dense_loss(reference, data, ids, normalization).backward()
        want = gradient(reference)
        for cut in SHARED:
            got = step_gradient(
                policy, ids, cut, normalization, processes, weighted=weighted, prefix=PREFIX
            )
            error = relative_error(got, want)
            assert error <= BOUNDS[dtype], (ids, cut, error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
def test_weights_of_tokens_and_examples_enter_every_cut(
    normalization: str, dtype: torch.dtype, processes: Processes
) -> None:
    policy = Policy(build_model("llama", dtype))
    for ids in STEPS.values():
        reference = build_model("llama", dtype)
        dense_loss(reference, build_dataset(weighted=True), ids, normalization).backward()
        want = gradient(reference)
        plain = step_gradient(policy, ids, CUTS[0], normalization, processes)
        assert relative_error(plain, want) > 1e-3  # or the weights would prove nothing
        for cut in CUTS:
            got = step_gradient(policy, ids, cut, normalization, processes, weighted=True)
            assert relative_error(got, want) <= BOUNDS[dtype], (ids, cut)


@pytest.mark.parametrize("selective", [False, True])
def test_gradient_checkpointing_changes_nothing(selective: bool, processes: Processes) -> None:
    policy, checkpointed = Policy(build_model("llama")), Policy(build_model("llama"))
    enable_checkpointing(checkpointed.model, selective)
    checkpointed.train()
    for cut in (Cut(None, 2, "flat"), Cut(None, 2, "flat_shared_prefix")):
        want = step_gradient(policy, STEPS["full"], cut, "token", processes, prefix=PREFIX)
        got = step_gradient(checkpointed, STEPS["full"], cut, "token", processes, prefix=PREFIX)
        assert relative_error(got, want) <= 1e-12


@pytest.mark.parametrize("batching", get_args(Batching))
def test_a_step_made_beforehand_is_the_same_step(batching: Batching, processes: Processes) -> None:
    policy, dataset, cut = Policy(build_model("llama")), build_dataset(), Cut(None, 3, batching)
    found = []
    for prepared in (None, prepare(dataset, STEPS["full"], cut, processes)):
        policy.zero_grad(set_to_none=True)
        accumulate_gradients(
            policy, dataset, STEPS["full"], cut=cut, processes=processes, seed=0, step=0,
            trainer=TrainerConfig(), prepared=prepared,
        )  # fmt: skip
        found.append(gradient(policy.model))
    assert torch.equal(*found)


def test_a_mean_of_means_does_depend_on_the_cut(processes: Processes) -> None:
    """`microbatch` is the plain recipe; if it agreed, the tests above could not fail."""
    policy = Policy(build_model("llama"))
    one = step_gradient(policy, STEPS["full"], Cut(None, 1, "flat"), "microbatch", processes)
    four = step_gradient(policy, STEPS["full"], Cut(None, 4, "flat"), "microbatch", processes)
    assert relative_error(four, one) > 1e-2
    token = step_gradient(policy, STEPS["full"], Cut(None, 1, "flat"), "token", processes)
    assert relative_error(one, token) <= 1e-12


@pytest.mark.parametrize("cut", [*CUTS, *SHARED])
@pytest.mark.parametrize("normalization", ["token", "sequence", "microbatch", "constant"])
def test_every_path_goes_through_masked_normalize(
    cut: Cut, normalization: str, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halve what `masked_normalize` returns to the loss, and every gradient must halve."""
    policy = Policy(build_model("llama"))
    prefix = PREFIX if cut in SHARED else 0
    want = step_gradient(policy, STEPS["short"], cut, normalization, processes, prefix=prefix) / 2
    from cs336_alignment.training import loss

    original = loss.masked_normalize
    monkeypatch.setattr(loss, "masked_normalize", lambda *a, **k: original(*a, **k) / 2)
    got = step_gradient(policy, STEPS["short"], cut, normalization, processes, prefix=prefix)
    assert relative_error(got, want) <= 1e-12
    assert step_module.microbatch_loss is loss.microbatch_loss


@pytest.mark.parametrize("prefix", [0, PREFIX])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_evaluation_loss_depends_on_neither_layout_nor_batch_size(
    name: str, prefix: int, processes: Processes
) -> None:
    policy, dataset = Policy(build_model(name)), build_dataset(prefix=prefix)
    log_probs, mask = dense_log_probs(build_model(name), dataset, range(len(dataset)))
    want = -log_probs[mask].mean().item()
    for tokens in (1, 20, 1000):
        for batching in get_args(Batching):
            result = evaluate_loss(
                policy, dataset, processes, microbatch_tokens=tokens, batching=batching
            )
            assert result["eval/loss"] == pytest.approx(want, rel=1e-13)


@pytest.mark.parametrize("prefix", [0, PREFIX])
@pytest.mark.parametrize("weighted", [False, True])  # some of several turns
def test_losses_of_first_tokens_stop_tokens_and_sources_are_those_of_plain_transformers(
    weighted: bool, prefix: int, processes: Processes
) -> None:
    dataset = build_dataset(12, prefix=prefix, weighted=weighted)
    log_probs, mask = dense_log_probs(build_model("llama"), dataset, range(len(dataset)))
    groups = [("a", "b/c", "a")[i % 3] for i in range(len(dataset))]
    trained = [dataset[i].input_ids[1:][dataset[i].response_mask[1:]] for i in range(len(dataset))]
    stop_ids = {int(ids[-1]) for ids in trained[::3]}
    nll = [-lp[m] for lp, m in zip(log_probs.detach(), mask, strict=True)]
    stops = [n[-1] for n, ids in zip(nll, trained, strict=True) if int(ids[-1]) in stop_ids]
    assert 4 <= len(stops) < len(dataset)
    want = {
        "eval/loss": torch.cat(nll).mean(),
        "eval/loss_first_token": torch.stack([n[0] for n in nll]).mean(),
        "eval/loss_stop_token": torch.stack(stops).mean(),
        **{
            f"eval/loss/{name}": torch.cat([n for n, g in zip(nll, groups, strict=True) if g == name]).mean()
            for name in ("a", "b/c")
        },
    }  # fmt: skip
    policy = Policy(build_model("llama"))
    for tokens in (1, 20, 1000):
        for batching in get_args(Batching):
            found = evaluate_loss(
                policy, dataset, processes, microbatch_tokens=tokens, batching=batching,
                stop_ids=stop_ids, groups=groups,
            )  # fmt: skip
            del found["eval/token_entropy"]
            assert found == pytest.approx({k: v.item() for k, v in want.items()}, rel=1e-13)
    plain = evaluate_loss(policy, dataset, processes, microbatch_tokens=50, batching="flat",
                          groups=["a"] * len(dataset))  # fmt: skip
    assert set(plain) == {"eval/loss", "eval/token_entropy", "eval/loss_first_token"}


@pytest.mark.fault("T23 every cut of a step")
def test_dropout_is_a_function_of_seed_step_and_microbatch(processes: Processes) -> None:
    model = build_model("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    policy = Policy(model)
    policy.train()

    def at(seed: int, step: int) -> Tensor:
        torch.rand(7)  # the global state must not matter
        policy.zero_grad(set_to_none=True)
        accumulate_gradients(
            policy, build_dataset(), STEPS["full"], cut=Cut(None, 2, "flat"), processes=processes,
            seed=seed, step=step, trainer=TrainerConfig(),
        )  # fmt: skip
        return gradient(policy.model).clone()

    first = at(0, 5)
    assert torch.equal(first, at(0, 5))
    assert not torch.equal(first, at(0, 6))
    assert not torch.equal(first, at(1, 5))
