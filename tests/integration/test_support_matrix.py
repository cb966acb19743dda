"""Every row of the support matrix in docs/optimizers.md does what it says there."""

from __future__ import annotations

from functools import lru_cache
from typing import get_args

import pytest
import torch
from torch import Tensor

from cs336_alignment.data.batching import shared_prefix
from cs336_alignment.errors import UserErrors
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.averaging import build_average
from cs336_alignment.training.optimizer import (
    allocate_state,
    build_optimizer,
    set_learning_rate,
)
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.preflight import warm_up_compiled
from cs336_alignment.training.snapshot import optimizer_tensors
from cs336_alignment.training.step import Cut, accumulate_gradients
from tests.conftest import build_dataset, build_model
from tests.options import (
    PREFIX,
    RATES,
    STEPS,
    Row,
    apart,
    columns,
    config_of,
    plain_groups,
    refusals,
    start_of,
    support,
    train,
    train_plainly,
    weights_of,
    with_normalization,
)
from tests.unit.test_lora import adapted, by_peft

ROWS = support()
BATCHINGS = get_args(Batching)
NORMALIZATIONS = ("token", "sequence", "constant", "microbatch")
# Over three steps, by how far they go. Muon's iteration in bfloat16 makes of a last digit a third.
BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-4}
BF16_BOUND = 1e-2

# Beside the defaults of the others.
ALWAYS_REFUSED = (
    "optimizer.name=schedule_free", "optimizer.muon_momentum=0.9", "parallel.strategy=fsdp2",
)  # fmt: skip

each_row = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])


def bound(row: Row, dtype: torch.dtype) -> float:
    return BF16_BOUND if "optimizer=muon" in row.overrides else BOUNDS[dtype]


@lru_cache
def plain(row: int, normalization: str, dtype: torch.dtype) -> Tensor:
    config = with_normalization(config_of(*ROWS[row].overrides), normalization)
    return train_plainly(build_model("llama", dtype), build_dataset(prefix=PREFIX), config)


@each_row
def test_every_layout_cut_and_normalization_is_the_plain_training(
    row: Row, processes: Processes, wide_norms: None
) -> None:
    dataset, start = build_dataset(prefix=PREFIX), start_of("llama", torch.float64)
    assert shared_prefix([dataset[i] for i in range(8)])
    config = config_of(*row.overrides)
    budgets = ((None, 1), (None, 3), (70, None))
    for budget, normalization in zip(budgets, columns(row.cells, NORMALIZATIONS[:3]), strict=True):
        want = plain(ROWS.index(row), normalization, torch.float64)
        for batching in columns(row.cells, BATCHINGS):
            policy, cut = Policy(build_model("llama")), Cut(*budget, batching)
            chosen = with_normalization(config, normalization)
            error = apart(train(policy, policy, dataset, chosen, cut, processes), want, start)
            assert error <= bound(row, torch.float64), (normalization, cut, error)


@each_row
def test_adapters_train_as_by_peft_alone(row: Row, processes: Processes, wide_norms: None) -> None:
    if row.cells["lora"] == "no":
        return  # an error, tested below
    dataset, config = build_dataset(prefix=PREFIX), config_of(*row.overrides, "lora.r=4")
    model = adapted("llama")
    reference, start = by_peft(model, "llama"), weights_of(model)
    want = train_plainly(reference, dataset, config)
    assert not torch.equal(want, start)
    other = columns(row.cells, BATCHINGS)[-1]
    for cut in (Cut(None, 3, "flat"), Cut(70, None, other)):
        policy = Policy(adapted("llama"))
        error = apart(train(policy, policy, dataset, config, cut, processes), want, start)
        assert error <= bound(row, torch.float64), (cut, error)


@each_row
def test_with_a_mean_of_means_layouts_of_one_cut_agree(
    row: Row, processes: Processes, wide_norms: None
) -> None:
    assert row.cells["microbatch"] == "yes"
    dataset, start, found = build_dataset(prefix=PREFIX), start_of("llama", torch.float64), []
    config = with_normalization(config_of(*row.overrides), "microbatch")
    for batching in columns(row.cells, BATCHINGS):
        policy = Policy(build_model("llama"))
        found.append(train(policy, policy, dataset, config, Cut(None, 3, batching), processes))
    for other in found[1:]:
        assert apart(other, found[0], start) <= bound(row, torch.float64)


@each_row
def test_what_the_row_says_no_to_is_an_error_that_names_both_keys(row: Row) -> None:
    added = {name: f"trainer.batching={name}" for name in BATCHINGS}
    added |= {name: f"trainer.loss_normalization={name}" for name in NORMALIZATIONS}
    added |= {"state_bits=8": "optimizer.state_bits=8", "compile": "trainer.compile=true"}
    added |= {"lora": "lora.r=4", "fsdp2": "parallel.strategy=fsdp2"}
    assert row.cells.keys() == {*added, "processes"}
    for column, override in added.items():
        if row.cells[column] == "yes":
            config_of(*row.overrides, override)
            continue
        with pytest.raises(UserErrors, match=r"C104.* do not combine") as caught:
            config_of(*row.overrides, override)
        assert override.split("=")[0] in str(caught.value)


@pytest.mark.parametrize("overrides", refusals(), ids=" ".join)
def test_options_that_do_not_combine_are_an_error_that_names_both_keys(
    overrides: tuple[str, ...],
) -> None:
    for alone in overrides:
        if alone not in ALWAYS_REFUSED:
            config_of(alone)
    with pytest.raises(UserErrors) as caught:
        config_of(*overrides)
    (line,) = [text for text in str(caught.value).splitlines() if "do not combine" in text]
    assert "C104" in line
    for override in overrides:
        key = "optimizer.name" if override.startswith("optimizer=") else override.split("=")[0]
        assert key in line


@pytest.fixture(scope="module")
def compiled() -> Policy:
    torch._dynamo.reset()
    policy = Policy(build_model("llama", torch.float32)).train()
    warm_up_compiled(policy, "flat")
    return policy


@pytest.mark.slow
@each_row
def test_compiled_layers_train_the_same(row: Row, compiled: Policy, processes: Processes) -> None:
    assert row.cells["compile"] == "yes"
    compiled.model.load_state_dict(build_model("llama", torch.float32).state_dict())
    dataset, config = build_dataset(prefix=PREFIX), config_of(*row.overrides)
    want = plain(ROWS.index(row), "token", torch.float32)
    got = train(compiled, compiled, dataset, config, Cut(None, 2, "flat"), processes)
    # A second: AdamW divides by its own size what is nearly zero, so last digits grow.
    assert apart(got, want, start_of("llama", torch.float32)) <= 1e-2


@pytest.mark.slow
@each_row
def test_eight_bits_of_state_take_the_steps_of_plain_torchao(
    row: Row, processes: Processes
) -> None:
    """With the same gradients: what 8 bits make of a last digit may be much in a model so small."""
    low_bit = pytest.importorskip("torchao.optim", reason="the extra torchao is not installed")
    if row.cells["state_bits=8"] == "no":
        return  # an error, tested above
    config = config_of(*row.overrides, "optimizer.state_bits=8")
    policy, plain_model = (Policy(build_model("gpt2", torch.float32)) for _ in range(2))
    model, other = policy.model, plain_model.model
    optimizer = build_optimizer(model, config.optimizer)
    allocate_state(optimizer)
    average = build_average(optimizer, config.trainer.ema_decay)
    groups = plain_groups(other, config.optimizer)
    rates = [group.pop("rate") for group in groups]
    library = low_bit.AdamW8bit(groups)
    means = [p.detach().clone() for p in other.parameters()]
    for step, (ids, rate) in enumerate(zip(STEPS, RATES, strict=True)):
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        accumulate_gradients(
            policy, build_dataset(prefix=PREFIX), ids, cut=Cut(None, 2, "flat"),
            trainer=config.trainer, processes=processes, seed=3, step=step,
        )  # fmt: skip
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            theirs.grad = None if mine.grad is None else mine.grad.clone()
        optimizer.step()
        average.update()
        for group, factor in zip(library.param_groups, rates, strict=True):
            group["lr"].fill_(rate * factor)
        library.step()
        for mean, p in zip(means, other.parameters(), strict=True):
            mean.lerp_(p.detach(), 1 - (config.trainer.ema_decay or 0.0))
    narrow = [x for n, x in optimizer_tensors(model, optimizer).items() if x.dtype == torch.uint8]
    assert len(narrow) == 2 * 2 * 2  # moments × layers × matrices of at least 4,096 numbers
    with average.shown():
        for p, mean in zip(model.parameters(), means, strict=True):
            torch.testing.assert_close(p.detach(), mean, rtol=1e-6, atol=1e-6)
