"""T1: a kill at every operation between an evaluation, its checkpoint and the mark of the best."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cs336_alignment.tracking.metrics import MetricsFile, read_metrics
from cs336_alignment.training.best import Criterion, Judge, Verdict
from cs336_alignment.training.checkpoint_folders import (
    find_latest,
    folder_of,
    remove_leftovers,
    saved_steps,
    verify,
)
from cs336_alignment.training.parallel import Processes
from tests.checkpoints import fingerprint
from tests.faults.injection import run
from tests.faults.tally import Tally
from tests.faults.test_stops import Life

# Better at 1, 2 and 3, of which 2 is saved anyway; 5 is as good as 3. Two newest stay: 4 and 6.
FOUND = {0: 9.0, 1: 1.0, 2: 3.0, 3: 5.0, 4: 4.0, 5: 5.0, 6: 4.0}


def live(folder: Path, processes: Processes, patience: int | None, *, behind: bool) -> None:
    """One process of a run with an evaluation at every step, as `cs336-sft train` builds it."""
    checkpoints, path = folder / "checkpoints", folder / "metrics.jsonl"
    checkpoints.mkdir(parents=True, exist_ok=True)
    remove_leftovers(checkpoints)
    latest, _ = find_latest(checkpoints)
    metrics = MetricsFile(path)
    metrics.truncate_after(-1 if latest is None else int(latest.name[5:]))
    done = {row["step"] for row in read_metrics(path)}
    judge = Judge(
        Criterion("eval/x", greater=True), patience, comparable_since=1, patient_since=0,
        evaluations=lambda: read_metrics(path), saved_steps=lambda: saved_steps(checkpoints),
    )  # fmt: skip

    def evaluate(step: int) -> Verdict:
        if step not in done:
            metrics.write(step, {"eval/x": FOUND[step]})
        return judge.verdict(step)

    life = Life(checkpoints, processes, evaluate=evaluate, trainer={"async_save": behind})
    life.report.sync = metrics.sync  # type: ignore[method-assign]
    life.loop.fit()
    metrics.close()
    best = judge.choices(life.loop.state.step)[0].step
    assert verify(folder_of(checkpoints, best)) is None
    (folder / "chosen").write_text(str(best))


def left(folder: Path) -> dict[str, Any]:
    return {
        "checkpoints": {p.name: fingerprint(p) for p in folder.glob("checkpoints/step-*")},
        "index": json.loads((folder / "checkpoints/index.json").read_text()),
        "metrics": [(row["step"], row["eval/x"]) for row in read_metrics(folder / "metrics.jsonl")],
        "chosen": (folder / "chosen").read_text(),
    }


@pytest.mark.parametrize(
    ("patience", "steps", "stride"),
    [
        (None, {3, 4, 6}, 23),
        (2, {3, 4, 5}, 31),
        # Each of several hundred operations costs two processes.
        pytest.param(None, {3, 4, 6}, 1, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
@pytest.mark.parametrize("behind", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("kill", marks=pytest.mark.fault("T1 kill, while the best step is chosen")),
        pytest.param(
            "power",
            marks=[
                pytest.mark.fault("T1 loss of power, while the best step is chosen"),
                pytest.mark.slow,
            ],
        ),
    ],
)
def test_a_kill_ends_with_the_same_best_step(
    fault: str, behind: bool, patience: int | None, steps: set[int], stride: int, tmp_path: Path,
    processes: Processes, tally: Tally,
) -> None:  # fmt: skip
    def work(name: str) -> Callable[[], None]:
        return lambda: live(tmp_path / name, processes, patience, behind=behind)

    outcome = run(work("whole"), fault, 10**6)
    assert outcome.failure is outcome.error is None, outcome.failure
    whole = left(tmp_path / "whole")
    assert whole["chosen"] == "3" and whole["index"]["best"] == "step-000003"
    assert set(whole["checkpoints"]) == {f"step-{step:06d}" for step in steps}
    for k in range(1, 2000, stride):
        outcome = run(work("cut"), fault, k)
        with tally.point(f"operation {k}"):
            again = run(work("cut"), fault, 10**6)
            assert again.failure is again.error is None, again.failure
            assert left(tmp_path / "cut") == whole
        shutil.rmtree(tmp_path / "cut")
        if not outcome.reached:
            break
    assert tally.tried > 5
