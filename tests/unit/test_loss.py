"""`masked_normalize`, CS336's train step and the trainer's weights, against sums written out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cs336_alignment.data.batching import collate
from cs336_alignment.data.tokenize import TokenizedExample
from cs336_alignment.sft import masked_normalize, sft_microbatch_train_step
from cs336_alignment.training.loss import (
    StepCounts,
    loss_slopes,
    loss_weights,
    microbatch_loss,
)
from tests.conftest import build_dataset

NAN = float("nan")


def test_founding_examples() -> None:
    one = torch.tensor([1.0, 2, 3, 4, 5])
    assert masked_normalize(one, torch.tensor([1, 0, 1, 1, 0]), None, 2).item() == 4.0
    two = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    assert masked_normalize(two, mask, None, 2).item() == 6.5
    assert masked_normalize(two, mask, 0, 2).tolist() == [2.5, 2.5, 1.5]
    assert masked_normalize(two, mask, 1, 2).tolist() == [2.0, 4.5]
    log_probs = torch.tensor([-0.5, -0.3, -0.8, -0.2, -0.1, -0.9])
    value = masked_normalize(log_probs, torch.tensor([0, 0, 1, 1, 1, 0]), normalize_constant=3)
    assert value.item() == pytest.approx(-1.1 / 3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize("dim", [None, 0, 1, 2, -1])
def test_shapes_and_values(dim: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.rand(2, 3, 4) > 0.5
    want = (tensor * mask).sum() / 7 if dim is None else (tensor * mask).sum(dim) / 7
    got = masked_normalize(tensor, mask.to(dtype), dim, 7.0)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("poison", [NAN, math.inf, -math.inf])
def test_what_is_masked_out_does_not_leak(poison: float, dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1.0, poison], [poison, 2.0]], requires_grad=True)
    mask = torch.tensor([[1, 0], [0, 1]]).to(dtype)
    for dim in (None, 0, 1):
        tensor.grad = None
        value = masked_normalize(tensor, mask, dim, 2.0)
        value.sum().backward()
        assert value.isfinite().all()
        assert tensor.grad is not None
        assert tensor.grad.tolist() == [[0.5, 0.0], [0.0, 0.5]]


def test_float_mask_weighs() -> None:
    weights = torch.tensor([0.5, 0.0, 2.0])
    tensor = torch.tensor([4.0, NAN, 3.0], requires_grad=True)
    value = masked_normalize(tensor, weights, normalize_constant=weights.sum())
    value.backward()
    assert value.item() == pytest.approx(8.0 / 2.5)
    torch.testing.assert_close(tensor.grad, torch.tensor([0.2, 0.0, 0.8]))


def test_the_input_is_left_alone() -> None:
    tensor, weights = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])
    masked_normalize(tensor, weights)
    assert tensor.tolist() == [1.0, 2.0]


def test_tensor_constants() -> None:
    tensor = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
    mask = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 0]])
    per_example = masked_normalize(tensor, mask, 1, mask.sum(1))
    assert per_example.tolist() == [2.0, 4.5, 0.0]  # an empty row over zero is 0, not NaN
    per_position = masked_normalize(tensor, mask, 0, mask.sum(0).clamp(min=1))
    assert per_position.tolist() == [2.5, 5.0, 3.0]
    assert masked_normalize(tensor, mask, None, mask.sum()).item() == pytest.approx(13 / 4)
    none = torch.zeros_like(mask)
    assert masked_normalize(tensor, none, None, none.sum()).item() == 0.0
    assert masked_normalize(tensor, mask, 1, torch.tensor([0, 2, 0])).tolist()[0] == math.inf


def test_mistakes_are_named() -> None:
    tensor, mask = torch.ones(2, 3), torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        masked_normalize(tensor, mask)
    for constant in (0, 0.0, NAN, math.inf, -math.inf):
        with pytest.raises(ValueError, match="finite and not zero"):
            masked_normalize(tensor, tensor, None, constant)
    with pytest.raises(ValueError, match="does not broadcast"):
        masked_normalize(tensor, tensor, 1, torch.ones(3))


def test_microbatch_train_step_gradients() -> None:
    """-1 / (rows · accumulation · constant) on response tokens, as in the course's own snapshots."""
    log_probs = torch.randn(2, 10, requires_grad=True)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, 3:7] = mask[1, 5:] = True
    loss, metadata = sft_microbatch_train_step(log_probs, mask, 2, 42.0)
    want = torch.where(mask, -1 / (2 * 2 * 42.0), 0.0)
    torch.testing.assert_close(log_probs.grad, want)
    assert loss.item() == pytest.approx(-(log_probs * mask).sum().item() / (2 * 2 * 42))
    assert not loss.requires_grad
    assert metadata["num_response_tokens"].item() == 9
    assert metadata["token_loss"].item() == pytest.approx(-log_probs[mask].mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="at least 1"):
        sft_microbatch_train_step(log_probs, mask, 0)


def example(num_prompt: int, num_response: int) -> TokenizedExample:
    ids = torch.arange(num_prompt + num_response)
    return TokenizedExample(ids, ids >= num_prompt, 0)


@pytest.mark.parametrize(
    ("normalization", "want"),
    [
        ("token", [1 / 20] * 5),
        ("sequence", [1 / (2 * 6)] * 2 + [1 / (3 * 6)] * 3),
        ("constant", [1 / (4.0 * 6)] * 5),
        ("microbatch", [1 / (5 * 7)] * 5),
    ],
)
def test_weights_of_each_normalization(normalization: str, want: list[float]) -> None:
    """Two examples of 2 and 3 tokens in a step of 6 examples, 20 tokens, 7 microbatches, 1 process."""
    counts = StepCounts(6, 6.0, 20.0, 7, 1)
    log_probs = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    batch = collate([example(1, 2), example(1, 3)], batching="flat")
    mask, constant = loss_weights(normalization, batch, counts, 4.0)
    microbatch_loss(log_probs, mask, constant).backward()
    assert log_probs.grad is not None
    torch.testing.assert_close(-log_probs.grad, torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize(
    ("normalization", "want"),
    [
        ("token", [2 * 1 / 40, 2 * 3 / 40, 5 * 4 / 40]),
        ("sequence", [2 * 1 / 4 / 9, 2 * 3 / 4 / 9, 5 / 9]),
        ("constant", [2 * 1 / (4 * 6), 2 * 3 / (4 * 6), 5 * 4 / (4 * 6)]),
        ("microbatch", [2 * 1 / (28 * 7), 2 * 3 / (28 * 7), 5 * 4 / (28 * 7)]),
    ],
)
def test_weighted_tokens_and_examples(normalization: str, want: list[float]) -> None:
    """Tokens of weight 1, 3 in an example of weight 2, one of 4 in an example of 5; of a step whose
    weights sum to 40 (tokens) and 9 (examples), with 6 examples and 7 microbatches."""
    counts = StepCounts(6, 9.0, 40.0, 7, 1)
    first = replace(example(2, 3), weights=torch.tensor([0.0, 0, 1, 0, 3]), example_weight=2.0)
    first = replace(first, response_mask=first.weights > 0)
    second = replace(example(1, 1), weights=torch.tensor([0.0, 4]), example_weight=5.0)
    log_probs = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    mask, constant = loss_weights(
        normalization, collate([first, second], batching="flat"), counts, 4.0
    )
    microbatch_loss(log_probs, mask, constant).backward()
    assert log_probs.grad is not None
    torch.testing.assert_close(-log_probs.grad, torch.tensor(want, dtype=torch.float64))


def test_filler_has_weight_zero() -> None:
    filler = collate([], batching="flat")
    for normalization in ("token", "sequence", "constant", "microbatch"):
        log_probs = torch.tensor([-3.0], requires_grad=True)
        mask, constant = loss_weights(normalization, filler, StepCounts(3, 3.0, 9.0, 1, 2))
        microbatch_loss(log_probs, mask, constant).backward()
        assert log_probs.grad is not None and log_probs.grad.item() == 0.0
    with pytest.raises(ValueError, match="unknown"):
        loss_weights("mean", filler, StepCounts(1, 1.0, 1.0, 1, 1))


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant", "microbatch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes_are_what_the_backward_pass_brings(normalization: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dataset = build_dataset()
    batch = collate([dataset[i] for i in (0, 3, 5)], batching="flat")
    counts = StepCounts(7, 7.0, 61.0, 3, 2)
    mask, constant = loss_weights(normalization, batch, counts, 13.0)
    log_probs = torch.randn(batch.labels.shape, dtype=dtype, requires_grad=True)
    microbatch_loss(log_probs, mask, constant).backward()
    assert log_probs.grad is not None
    assert torch.equal(loss_slopes(mask, constant, dtype), log_probs.grad)
