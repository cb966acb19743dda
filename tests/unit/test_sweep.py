"""A sweep: what is tried is a pure function of seed and trials, and a kill anywhere changes nothing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from cs336_alignment import cli
from cs336_alignment.config import Config
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.experiments import sweep as module
from cs336_alignment.experiments.search_space import Choice, Range, read_space, to_text
from cs336_alignment.experiments.study import Study
from cs336_alignment.experiments.trial_process import TrialEnd

SPACE = (
    "sweep.space={optimizer.learning_rate: {low: 1e-5, high: 1e-1, log: true}, "
    "trainer.global_batch_size: {choices: [8, 16]}}"
)
GIVEN = ("model.name_or_path=m", "data.train_path=d.jsonl", "data.eval_path=e.jsonl", "logger=none")


class Killed(BaseException):
    """The process dies here."""


@pytest.mark.parametrize(
    ("space", "texts"),
    [
        ({}, ("sweep.space is empty",)),
        ({"optimizer.learning_rat": {"low": 1, "high": 2}}, ("C101", "optimizer.learning_rate")),
        ({"optimizer": {"lr": {"low": 1, "high": 2}}}, ("no key optimizer.lr", "learning_rate")),
        ({"seed": {"lo": 1}}, ("sweep.space.seed", "unknown: lo")),
        ({"seed": 3}, ("low and high, or choices",)),
        ({"seed": {"low": 3, "high": 2}}, ("low at most high",)),
        ({"seed": {"low": 0, "high": 2, "log": True}}, ("low above 0",)),
        ({"seed": {"choices": []}}, ("choices alone",)),
        ({"run_name": {"choices": ["a"]}}, ("sets it itself",)),
        ({"seed": {"lo": 1}, "sed": {"low": 1, "high": 2}}, ("2 errors in all", "mean seed?")),
    ],
)  # fmt: skip
def test_mistakes_in_the_space(space: dict[str, Any], texts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as raised:
        read_space(space)
    assert raised.value.status == ExitStatus.BAD_CONFIG
    for text in texts:
        assert text in str(raised.value)


def test_a_space_is_read_whole_or_nested() -> None:
    want = [
        Range("optimizer.learning_rate", 1e-6, 1e-3, True),
        Choice("optimizer.betas", ("[0.9,0.99]",)),
    ]
    whole = {
        "optimizer.learning_rate": {"low": 1e-6, "high": 1e-3, "log": True},
        "optimizer.betas": {"choices": [[0.9, 0.99]]},
    }
    nested = {"optimizer": {key.split(".")[1]: value for key, value in whole.items()}}
    assert read_space(whole) == read_space(nested) == want
    assert to_text("a=b, c") == '"a=b, c"' and to_text(True) == "true" and to_text(1e-05) == "1e-05"


def test_what_is_tried_does_not_depend_on_where_it_was_killed(tmp_path: Path) -> None:
    space = read_space({
        "optimizer.learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
        "seed": {"low": 1, "high": 99},
        "optimizer.weight_decay": {"low": 0.0, "high": 0.3, "step": 0.1},
    })  # fmt: skip

    def study(name: str) -> Study:
        (tmp_path / name).mkdir(exist_ok=True)
        return Study(tmp_path / name, space, maximize=False, seed=5)

    whole, tried = study("whole"), []
    for number in range(13):  # beyond Optuna's random ones
        tried.append(whole.begin(number))
        whole.complete(number, float(tried[-1]["seed"]))
    assert len({json.dumps(values) for values in tried}) == 13
    for number in range(13):
        cut = study("cut")
        cut.begin(number)
        cut = study("cut")  # the first was killed before its trial was told
        assert cut.begin(number) == tried[number]
        cut.report(number, 1, 2.0)
        cut.report(number, 1, 3.0)
        cut.complete(number, float(tried[number]["seed"]))
    assert study("cut").trials == whole.trials
    importances = whole.importances()
    assert set(importances) == {part.key for part in space}
    assert max(importances, key=lambda key: importances[key]) == "seed"


class Fake:
    """Stands for the trials' processes: the loss is the learning rate, at three evaluations."""

    def __init__(self) -> None:
        self.began: list[list[str]] = []
        self.ends: dict[int, TrialEnd | type[BaseException]] = {}
        self.dies_in = -1

    def __call__(
        self, arguments: Sequence[str], folder: Path, log: Path, metric: str,
        is_hopeless: Callable[[int, float], bool],
    ) -> TrialEnd:  # fmt: skip
        self.began.append(list(arguments))
        number = int(folder.name[-3:])
        end = self.ends.pop(number, None)
        if isinstance(end, type):
            raise end
        if end is not None:
            return end
        values = dict(word.split("=", 1) for word in arguments if "=" in word)
        loss = float(values["optimizer.learning_rate"])
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for step in (5, 10, 15):
            lines.append(json.dumps({"step": step, metric: loss + 1 / step}) + "\n")
            if is_hopeless(step, loss + 1 / step):
                return TrialEnd(75, True, None)
            if number == self.dies_in:
                self.dies_in = -1
                raise Killed
        (folder / "metrics.jsonl").write_text("".join(lines))
        (folder / "status.json").write_text('{"state": "completed", "step": 15}')
        return TrialEnd(0, False, None)


def test_the_last_step_of_a_trial_ends_it_by_itself(tmp_path: Path) -> None:
    reported = []

    class Noting:
        def report(self, number: int, step: int, value: float) -> None:
            reported.append(step)

        def should_prune(self, number: int) -> bool:
            return True

    config = Config()
    search = module._Search(config, [], tmp_path, Noting(), None, None, 0.0)  # type: ignore[arg-type]
    assert search._is_hopeless(0, 10, 1.0)  # nothing is known of its end
    (tmp_path / "trial-000").mkdir()
    (tmp_path / "trial-000/manifest.json").write_text('{"total_steps": 10}')
    assert search._is_hopeless(0, 5, 1.0) and not search._is_hopeless(0, 10, 1.0)
    assert reported == [10, 5]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    monkeypatch.chdir(tmp_path)
    stands_in = Fake()
    monkeypatch.setattr(module, "run_trial", stands_in)
    # A process holds a run's lock until it ends, and here one stands for several.
    monkeypatch.setattr(
        module.RunFolder, "claim", lambda self, _: self.path.mkdir(parents=True, exist_ok=True)
    )
    return stands_in


def run(*more: str, name: str = "s") -> int:
    return int(cli.run(["sweep", *GIVEN, SPACE, "sweep.num_trials=8", f"run_name={name}", *more]))


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_kill_and_ends_as_without(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(name="whole") == 0
    whole = json.loads((tmp_path / "outputs/whole/sweep.json").read_text())
    assert {trial["state"] for trial in whole["trials"]} == {"complete", "pruned"}
    losses = {t["number"]: float(t["values"]["optimizer.learning_rate"]) for t in whole["trials"]}
    assert whole["best"] == min(losses, key=lambda number: losses[number])
    words = whole["command"].split()
    assert words[:2] == ["cs336-sft", "train"] and words[-1] == "run_name=whole-best"
    assert not any(word.startswith(("sweep", "output_root", "hydra")) for word in words[2:])
    assert f"optimizer.learning_rate={losses[whole['best']]}" in words
    assert (tmp_path / "outputs/whole/sweep.png").is_file()
    for number in (0, 3, 7):
        fake.ends[number] = Killed
        with pytest.raises(Killed):
            run(name="cut")
    begun = len(fake.began)
    assert run(name="cut") == 0
    assert len(fake.began) == begun + 1  # the killed one alone
    cut = json.loads((tmp_path / "outputs/cut/sweep.json").read_text())
    assert cut["trials"] == whole["trials"]
    assert "best first" in capsys.readouterr().out
    assert run(name="cut") == 0 and len(fake.began) == begun + 1
    assert run("sweep.num_trials=9", name="cut") == 0 and len(fake.began) == begun + 2
    assert run("optimizer.eps=1e-6", name="cut") == 78
    assert "optimizer.eps: 1e-08 → 1e-06" in capsys.readouterr().err


@pytest.mark.slow
def test_without_pruning_a_killed_trial_is_not_given_up_either(fake: Fake, tmp_path: Path) -> None:
    assert run("sweep.prune=false") == 0
    whole = json.loads((tmp_path / "outputs/s/sweep.json").read_text())["trials"]
    fake.dies_in = max(whole[4:], key=lambda trial: float(trial["value"]))["number"]
    with pytest.raises(Killed):
        run("sweep.prune=false", name="cut")
    assert run("sweep.prune=false", name="cut") == 0
    assert json.loads((tmp_path / "outputs/cut/sweep.json").read_text())["trials"] == whole


@pytest.mark.slow
def test_the_time_limit_is_that_of_the_whole_sweep(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))

    def trial(*rest: Any) -> TrialEnd:
        nonlocal now
        now += 1800
        return fake(*rest)

    monkeypatch.setattr(module, "run_trial", trial)
    assert run("trainer.max_hours=1.2", "sweep.prune=false") == 75
    given = [[w for w in words if w.startswith("trainer.max_hours")][-1] for words in fake.began]
    assert [round(float(word.split("=")[1]), 9) for word in given] == [1.2, 0.7, 0.2]
    assert "the same command goes on" in capsys.readouterr().out
    # The time that is left may be too short for a step: no failure of the trial.
    now, fake.ends[4] = 0.0, TrialEnd(78, False, "error[R304]: the time was over")
    assert run("trainer.max_hours=2", "sweep.prune=false") == 75
    fake.ends[4] = TrialEnd(78, False, "error[R304]: the time was over")
    assert run("trainer.max_hours=1e-9", "sweep.prune=false") == 78  # and comes no further so
    assert run("sweep.prune=false") == 0
    written = json.loads((tmp_path / "outputs/s/sweep.json").read_text())
    assert {trial["state"] for trial in written["trials"]} == {"complete"}


def test_folders_of_any_name_reach_the_trials(fake: Fake, tmp_path: Path) -> None:
    assert run("sweep.num_trials=1", "output_root='a (1), b=[c'") == 0
    words = [word for word in fake.began[0] if word.startswith("output_root=")]
    given = [o.value() for o in OverridesParser.create().parse_overrides(words)]
    assert given == ["a (1), b=[c/s"]
    command = json.loads(Path("a (1), b=[c/s/sweep.json").read_text())["command"]
    assert "output_root='a (1), b=[c'" in shlex.split(command)


def test_a_failed_trial_is_told_and_the_sweep_goes_on(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.ends[2] = TrialEnd(70, False, "error[R301]: loss is not finite\n  hint: h")
    assert run("sweep.prune=false") == 0
    written = json.loads((tmp_path / "outputs/s/sweep.json").read_text())
    states = [trial["state"] for trial in written["trials"]]
    assert states == ["complete"] * 2 + ["fail"] + ["complete"] * 5
    assert "trial-002 failed: error[R301]" in capsys.readouterr().err
    assert json.loads((tmp_path / "outputs/s/status.json").read_text())["state"] == "completed"


@pytest.mark.slow
def test_a_mistake_that_every_trial_would_have_ends_it_at_once(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.ends[0] = TrialEnd(66, False, "error[D101]: there is no file d.jsonl")
    assert run() == 66 and len(fake.began) == 1
    assert "error[D101]: there is no file d.jsonl" in capsys.readouterr().err
    status = json.loads((tmp_path / "outputs/s/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 66)
    assert run("optimizer.eps=1e-6") == 0  # nothing was tried that the change could spoil


def test_mistakes_before_any_trial(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in (
        (("sweep.metric=eval/fish",), "sweep.greater_is_better"),
        (("sweep.metric=eval/answer_reward",), "evaluation.generation_steps=0"),
        (("data.eval_path=null",), "no evaluation data"),
        (
            ("sweep.space={trainer.global_batch_size: {choices: [8, x]}}",),
            "trainer.global_batch_size",
        ),
        (("sweep.space={optimizer.learning_rate: {low: -1, high: 1}}",), "optimizer.learning_rate"),
    ):
        assert run(*words) == 78, words
        assert text in capsys.readouterr().err
    assert run("-m") == 2
    assert not fake.began
