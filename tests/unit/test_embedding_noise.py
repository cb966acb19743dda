"""NEFTune's noise: a function of seed, step, example, position and dimension, and of nothing else."""

from __future__ import annotations

import pytest
import torch

from cs336_alignment.config import TrainerConfig
from cs336_alignment.data.batching import collate, mix_seed
from cs336_alignment.data.noise import with_noise
from cs336_alignment.errors import UserError
from cs336_alignment.evaluation.loss import evaluate_loss
from cs336_alignment.model import embedding_noise
from cs336_alignment.model.embedding_noise import uniform
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.batching_choice import choose_batching
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.step import Cut, accumulate_gradients
from tests.conftest import build_dataset, build_model
from tests.reference import dense_loss, dense_noise, gradient, relative_error, splitmix_noise

TRAINER = TrainerConfig(neftune_alpha=5.0)
IDS = list(range(8))


def test_numbers_are_those_of_unsigned_integers_and_chunks_do_not_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, length, width = mix_seed(3, 5, 7), 12, 13
    seeds, positions = torch.full((length - 1,), base), torch.arange(length - 1)
    want = torch.from_numpy(splitmix_noise(base, length, width, 2.0**20))
    whole = uniform(seeds, positions, width)
    scale = torch.tensor(2.0**20 / length**0.5) / width**0.5
    assert torch.equal(whole * scale, want)
    monkeypatch.setattr(embedding_noise, "CHUNK", 3 * width)
    assert torch.equal(uniform(seeds, positions, width), whole)
    backwards = uniform(seeds, positions.flip(0), width)
    assert torch.equal(backwards.flip(0), whole)


def test_numbers_are_uniform_and_examples_unlike() -> None:
    seeds = torch.tensor([mix_seed(0, step, i) for step in range(2) for i in range(20)])
    drawn = uniform(seeds, torch.zeros_like(seeds), 5000)
    assert drawn.min() >= -1 and drawn.max() < 1
    assert drawn.mean().abs() < 0.01 and (drawn.square().mean() - 1 / 3).abs() < 0.01
    shares = torch.histc(drawn, 20, -1, 1) / drawn.numel()
    assert (shares - 0.05).abs().max() < 0.002
    correlations = torch.corrcoef(drawn) - torch.eye(40)
    assert correlations.abs().max() < 0.08  # six deviations
    neighbours = torch.corrcoef(torch.stack([drawn[:, 1:].flatten(), drawn[:, :-1].flatten()]))
    assert neighbours[0, 1].abs() < 0.02


@pytest.mark.parametrize("name", ["llama", "gpt2", "whole"])
def test_every_cut_has_the_noise_of_the_dense_reference(
    name: str, processes: Processes, wide_norms: None
) -> None:
    model = name if name != "whole" else "llama"
    data, reference = build_dataset(), build_model(model)
    dense_loss(build_model(model), data, IDS, "token").backward()
    with dense_noise(reference, data, IDS, 5.0, seed=3, step=4):
        dense_loss(reference, data, IDS, "token").backward()
    want = gradient(reference)
    policy = Policy(build_model(model))
    if name == "whole":
        policy.head = None
    for cut in (
        Cut(None, 1, "padded"),
        Cut(None, 3, "padded"),
        Cut(None, 1, "flat"),
        Cut(17, None, "flat"),
    ):
        policy.zero_grad(set_to_none=True)
        result = accumulate_gradients(
            policy, data, IDS, cut=cut, trainer=TRAINER, processes=processes, seed=3, step=4
        )
        assert relative_error(gradient(policy.model), want) <= 1e-12, cut
        assert result.objective == 0
    for seed, step in ((4, 4), (3, 5)):
        policy.zero_grad(set_to_none=True)
        accumulate_gradients(
            policy, data, IDS, cut=cut, trainer=TRAINER, processes=processes, seed=seed, step=step
        )
        assert relative_error(gradient(policy.model), want) > 1e-3


def test_two_cuts_agree_to_the_last_digits(processes: Processes, wide_norms: None) -> None:
    data, found = build_dataset(), []
    for cut in (Cut(None, 1, "padded"), Cut(None, 4, "flat")):
        policy = Policy(build_model("llama"))
        accumulate_gradients(
            policy, data, IDS, cut=cut, trainer=TRAINER, processes=processes, seed=3, step=4
        )
        found.append(gradient(policy.model))
    assert relative_error(*found) <= 1e-12


def test_evaluation_has_none_and_no_hook_is_left(processes: Processes) -> None:
    data, policy = build_dataset(), Policy(build_model("llama"))

    def evaluate() -> dict[str, float]:
        return evaluate_loss(policy, data, processes, microbatch_tokens=90, batching="flat")

    before = evaluate()
    accumulate_gradients(
        policy, data, IDS, cut=Cut(None, 2, "flat"), trainer=TRAINER, processes=processes, seed=0, step=0
    )  # fmt: skip
    assert evaluate() == before
    assert not policy.model.get_input_embeddings()._forward_hooks


def test_a_filler_stays_as_it_is() -> None:
    filler = collate([], batching="flat")
    assert with_noise(filler, [], [], alpha=5.0, seed=0, step=0) is filler


def test_no_prefix_is_shared() -> None:
    policy = Policy(build_model("llama"))
    choice = choose_batching(policy, "auto", 16, 5.0)
    assert choice.batching == "flat" and "trainer.neftune_alpha=5" in choice.reason
    with pytest.raises(UserError, match="flat_shared_prefix is not exact"):
        choose_batching(policy, "flat_shared_prefix", 16, 5.0)
