"""T4, T16, T17: requests to stop at every microbatch, and guards that keep bad steps out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cs336_alignment.config import OptimizerConfig, TrainerConfig
from cs336_alignment.data.batching import StepPlan
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.model.policy import Policy
from cs336_alignment.training.best import Verdict
from cs336_alignment.training.checkpoint import restore
from cs336_alignment.training.checkpoint_folders import find_latest
from cs336_alignment.training.checkpoint_writer import CheckpointWriter
from cs336_alignment.training.optimizer import allocate_state, build_optimizer
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.snapshot import TrainState, module_tensors, optimizer_tensors
from cs336_alignment.training.step import Cut
from cs336_alignment.training.trainer import Trainer
from tests.conftest import ROOT, Sft, build_dataset, build_model
from tests.faults.tally import Tally

STEPS = 6
OPTIMIZER = OptimizerConfig(learning_rate=0.01)
Poll = Callable[[], ExitStatus | None]


@dataclass
class Report:
    """Stands in for the tracker."""

    metrics: dict[int, Mapping[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)

    def step(self, step: int, metrics: Mapping[str, float], *, log: bool) -> None:
        self.metrics[step] = {k: v for k, v in metrics.items() if not k.startswith("perf/")}

    def sync(self) -> None:
        pass

    def saved(self, step: int, seconds: float) -> None:
        self.checkpoints.append(step)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@dataclass
class Life:
    """One process of a run: as `cs336-sft train` builds it, without its files around it."""

    folder: Path
    processes: Processes
    poll: Poll = lambda: None
    evaluate: Callable[[int], Verdict] = lambda step: Verdict()
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(9)
        model = build_model("gpt2", torch.float32)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2  # random numbers matter
        policy = Policy(model)
        optimizer = build_optimizer(model, OPTIMIZER)
        config = TrainerConfig(**{"save_steps": 2, "logging_steps": 1, **self.trainer})
        latest, _ = find_latest(self.folder)
        state = TrainState()
        if latest is not None:
            state = restore(latest, model, optimizer)
        allocate_state(optimizer)
        dataset = build_dataset()
        self.report, self.policy, self.optimizer, self.dataset = (
            Report(),
            policy,
            optimizer,
            dataset,
        )
        self.writer = CheckpointWriter(
            self.folder, extra={}, save_sidecars=lambda path: None, keep=2,
            asynchronous=config.async_save,
        )  # fmt: skip
        self.loop = Trainer(
            policy, self.processes.wrap(policy), optimizer, dataset,
            plan=StepPlan(len(dataset), 5, seed=3), cut=Cut(None, 3, batching="flat"), total_steps=STEPS,
            state=state, trainer=config, optimizer_config=OPTIMIZER, seed=3,
            processes=self.processes, tracker=self.report, evaluate=self.evaluate,
            writer=self.writer, poll=self.poll,
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        model = self.policy.model
        found = {**module_tensors(model), **optimizer_tensors(model, self.optimizer)}
        return {name: tensor.detach().clone() for name, tensor in found.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def from_poll(k: int, status: ExitStatus) -> Poll:
    """A request that comes before the k-th microbatch."""
    asked = 0

    def poll() -> ExitStatus | None:
        nonlocal asked
        asked += 1
        return status if asked >= k else None

    return poll


def test_the_next_step_is_made_before_the_device_is_waited_for(
    tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cs336_alignment.training import trainer

    life, events = Life(tmp_path, processes), []

    def prepare(dataset: Any, ids: Any, cut: Any, of: Any) -> Any:
        events.append(ids)
        return original(dataset, ids, cut, of)

    original, add = trainer.prepare, Processes.sum
    monkeypatch.setattr(trainer, "prepare", prepare)
    monkeypatch.setattr(Processes, "sum", lambda s, x: events.append("wait") or add(s, x))
    assert life.loop.fit() == ExitStatus.DONE
    made = [life.loop.plan.example_ids(step) for step in range(1, STEPS)]
    assert events == [event for ids in made for event in (ids, "wait")] + ["wait"]


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "status",
    [ExitStatus.STOPPED, pytest.param(ExitStatus.INTERRUPTED, marks=pytest.mark.slow)],
)
@pytest.mark.fault("T4 a request to stop, at each microbatch")
def test_a_request_at_any_microbatch_costs_nothing(
    status: ExitStatus, asynchronous: bool, tmp_path: Path, processes: Processes, tally: Tally
) -> None:
    options = {"async_save": asynchronous}
    whole = Life(tmp_path / "whole", processes, trainer=options)
    assert whole.loop.fit() == ExitStatus.DONE
    given_up = 0
    for k in range(1, 200):
        folder = tmp_path / f"cut-{k}"
        first = Life(folder, processes, from_poll(k, status), trainer=options)
        outcome = first.loop.fit()
        with tally.point(f"microbatch {k}"):
            assert outcome in (status, ExitStatus.DONE)
            step = first.loop.state.step
            assert first.report.checkpoints[-1:] == ([step] if step else [])
            given_up += (k - 1) % 4 != 3  # three microbatches and the end of the step are asked
            second = Life(folder, processes, trainer=options)
            assert second.loop.state.step == step
            assert same(second.tensors(), first.tensors())
            assert second.loop.fit() == ExitStatus.DONE
            assert same(second.tensors(), whole.tensors())
            assert {**first.report.metrics, **second.report.metrics} == whole.report.metrics
        if outcome == ExitStatus.DONE and step == STEPS:
            break
    assert k > 3 * STEPS and given_up > STEPS


@pytest.mark.fault("T16 a loss or gradient that is not finite, at each step")
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_never_reaches_the_weights(
    where: str, tmp_path: Path, processes: Processes, tally: Tally
) -> None:
    for k in range(1, STEPS + 1):
        whole = Life(tmp_path / f"{where}-{k}-whole", processes, trainer={"save_steps": 1})
        life = Life(tmp_path / f"{where}-{k}", processes, trainer={"save_steps": 1})
        weight = next(life.policy.model.parameters())
        count = 0

        def poison(gradient: Tensor) -> Tensor:
            nonlocal count
            count += 1
            if life.loop.state.step == k - 1 and where == "gradient":  # noqa: B023
                return gradient * torch.inf
            return gradient

        weight.register_hook(poison)
        head = life.policy.model.get_output_embeddings()
        assert head is not None

        def blow_up(module: Any, inputs: Any, output: Tensor) -> Tensor:
            if life.loop.state.step == k - 1 and where == "loss":  # noqa: B023
                return output * torch.nan
            return output

        life.policy.model.transformer.ln_f.register_forward_hook(blow_up)
        with tally.point(f"step {k}"):
            with pytest.raises(UserError) as caught:
                life.loop.fit()
            assert (caught.value.code, caught.value.status) == ("R301", ExitStatus.INTERNAL)
            assert f"the {where} of step {k} is not finite" in str(caught.value)
            assert count > 0
            latest, skipped = find_latest(tmp_path / f"{where}-{k}")
            assert not skipped
            assert (0 if latest is None else int(latest.name[-1])) == k - 1
            for _ in range(k - 1):
                whole.loop.train_step()
            assert same(life.tensors(), whole.tensors())


@pytest.mark.distributed
@pytest.mark.fault("T16 one process of two meets what is not finite")
def test_what_is_not_finite_in_one_process_stops_both(
    sft: Sft, tmp_path: Path, tally: Tally
) -> None:
    worker = str(ROOT / "tests" / "faults" / "worker_poison.py")
    done = sft(worker, str(tmp_path), processes=2)
    for point in ("loss 1", "loss 3", "gradient 1", "gradient 3"):
        with tally.point(point):
            assert f"survived {point}" in done.stdout, done.stderr[-3000:]
    assert done.returncode == 0


@pytest.mark.parametrize("policy", ["warn", "stop", "skip"])
@pytest.mark.fault("T17 a loss spike, by each policy")
def test_a_loss_spike_is_told_refused_or_left_out(
    policy: str, tmp_path: Path, processes: Processes, tally: Tally
) -> None:
    def life(name: str, **options: Any) -> Life:
        made = Life(tmp_path / name, processes, trainer=options)
        made.loop.state.recent_losses = [0.0] * 8  # so that every loss is a spike, to begin with
        return made

    whole, spiked = (
        life("off", loss_spike="off"),
        life("on", loss_spike=policy, loss_spike_nats=2.0),
    )
    start = whole.tensors()
    with tally.point(policy):
        assert whole.loop.fit() == ExitStatus.DONE
        if policy == "stop":
            with pytest.raises(UserError, match="loss spike at step 1") as caught:
                spiked.loop.fit()
            assert (caught.value.code, caught.value.status) == ("R302", ExitStatus.INTERNAL)
            assert same(spiked.tensors(), start)
            return
        assert spiked.loop.fit() == ExitStatus.DONE
        assert len(spiked.report.warnings) == STEPS
        assert all(f"spike at step {i}" in w for i, w in enumerate(spiked.report.warnings, 1))
        if policy == "warn":
            assert same(spiked.tensors(), whole.tensors())
        else:
            assert spiked.loop.state.skipped_steps == STEPS
            assert same(spiked.tensors(), start)
            assert spiked.report.metrics[STEPS]["train/skipped_steps"] == STEPS
            latest, _ = find_latest(tmp_path / "on")
            assert latest is not None
            progress = json.loads((latest / "trainer_state.json").read_text())["progress"]
            assert progress["skipped_steps"] == STEPS and len(progress["recent_losses"]) == 14


@pytest.mark.fault("T6 disk full behind the training's back")
@pytest.mark.parametrize("full", [False, True])
def test_what_is_written_behind_is_told_when_another_error_ends_the_run(
    full: bool, tmp_path: Path, processes: Processes, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(step: int) -> Verdict:
        if step == 2:  # its checkpoint is being written
            raise RuntimeError("another error")
        return Verdict()

    folder = tmp_path / "run"
    life = Life(folder, processes, evaluate=evaluate, trainer={"async_save": True})
    if full:
        monkeypatch.setattr("cs336_alignment.training.checkpoint.free_mib", lambda path: 0.0)
    with tally.point(f"full={full}"):
        with pytest.raises(RuntimeError, match="another error"):
            life.loop.fit()
        told = [line for line in life.report.warnings if "checkpoint of step 2 failed, too" in line]
        assert (len(told), life.report.checkpoints) == ((1, []) if full else (0, [2]))


@pytest.mark.fault("T6 disk full behind the training's back")
def test_a_failed_save_behind_the_training_stops_the_run(
    tmp_path: Path, processes: Processes, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    life = Life(folder, processes, trainer={"async_save": True, "save_steps": 1})
    room = iter([1e6, 1e6])  # from the third checkpoint on there is none
    monkeypatch.setattr(
        "cs336_alignment.training.checkpoint.free_mib", lambda path: next(room, 0.0)
    )
    with tally.point("step 3"):
        with pytest.raises(UserError) as caught:
            life.loop.fit()
        assert (caught.value.code, caught.value.status) == ("R206", ExitStatus.IO)
        latest, skipped = find_latest(folder)
        assert latest is not None and latest.name == "step-000002" and not skipped
        assert not list(folder.glob(".tmp*"))
        assert life.loop.state.step < STEPS
