"""Compiled layers: the same gradient, one compilation for every cut, and the same bits on resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cs336_alignment.config import TrainerConfig
from cs336_alignment.errors import UserError
from cs336_alignment.model import compile as compilation
from cs336_alignment.model.compile import compiled_graphs, in_eager
from cs336_alignment.model.policy import Policy
from cs336_alignment.model.recompute import enable_checkpointing
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.preflight import warm_up_compiled
from cs336_alignment.training.step import Cut, accumulate_gradients
from tests.conftest import TINY, Sft, build_dataset, build_model
from tests.reference import dense_loss, gradient, relative_error

pytestmark = pytest.mark.slow
CUTS = [
    Cut(None, 1, "flat_shared_prefix"), Cut(None, 3, "flat_shared_prefix"), Cut(None, 2, "flat"),
    Cut(60, None, "flat"),
]  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_compiled_layers_give_the_dense_gradient_and_are_compiled_once(
    recompute: bool | str, processes: Processes
) -> None:
    torch._dynamo.reset()
    dataset, ids = build_dataset(prefix=19), list(range(8))
    reference = build_model("llama", torch.float32)
    dense_loss(reference, dataset, ids, "token").backward()
    policy = Policy(build_model("llama", torch.float32)).train()
    if recompute:
        enable_checkpointing(policy.model, selective=recompute == "selective")
    warm_up_compiled(policy, "flat")
    before = compiled_graphs()
    assert before > 0
    for cut in CUTS:
        policy.zero_grad(set_to_none=True)
        accumulate_gradients(
            policy, dataset, ids, cut=cut, trainer=TrainerConfig(), processes=processes, seed=0,
            step=0,
        )  # fmt: skip
        assert relative_error(gradient(policy.model), gradient(reference)) <= 1e-5, cut
    assert compiled_graphs() == before
    with torch.no_grad(), in_eager():
        policy.model(torch.arange(6)[None])
    assert compiled_graphs() == before


def test_a_resumed_run_computes_with_the_same_kernels(sft: Sft, rows: Path, tmp_path: Path) -> None:
    overrides = (
        *TINY, f"data.train_path={rows}", "trainer.compile=true",
        "optimizer.lr_scheduler_type=constant", "optimizer.warmup_ratio=0",
        "trainer.num_train_epochs=9",
    )  # fmt: skip
    for name, lengths in {"whole": (8,), "resumed": (3, 8)}.items():
        for steps in lengths:
            done = sft("train", *overrides, f"run_name={name}", f"trainer.max_steps={steps}")
            assert done.returncode == 0, done.stderr
    whole, resumed = (
        next(tmp_path.rglob(f"{name}/model/model.safetensors")) for name in ("whole", "resumed")
    )
    assert whole.read_bytes() == resumed.read_bytes()


def test_what_cannot_be_compiled_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(build_model("llama", torch.float32))
    monkeypatch.setattr(policy.model, "_no_split_modules", None)
    with pytest.raises(UserError, match=r"trainer\.compile=false"):
        warm_up_compiled(policy, "flat")
    monkeypatch.undo()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(policy, "forward", fail)
    monkeypatch.setattr(compilation, "compile_layers", lambda model: 1)
    with pytest.raises(UserError, match=r"no compiler[\s\S]*trainer\.compile=false"):
        warm_up_compiled(policy, "flat")
