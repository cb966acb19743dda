"""T2 to T5, T27, T30: runs that are killed or asked to stop, at any moment, and go on.

Every test ends a run by its process id and gives the same command again; what the run leaves must
be what an uninterrupted one leaves, bit for bit. The long ones are a campaign: `make faults-long`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config

from cs336_alignment.model.loading import load_tokenizer
from cs336_alignment.model.source import resolve_model
from tests.conftest import TINY, Sft, clean_environment, without_times
from tests.faults.tally import Tally
from tests.zygote import Zygote, is_zombie, metrics_hold, when

STEPS = 40
LOOP_BEGINS = "largest microbatch"  # what the start prints last
ORDERLY = "stopped on request"  # what a run prints that stopped when it was first asked to


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with dropout everywhere, so that random numbers matter."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = load_tokenizer(resolve_model("builtin:arithmetic", None, False))
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=512,
        attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def command(model: Path, rows: Path) -> list[str]:
    """A run of a few seconds in which everything happens often."""
    return [
        "train", *TINY, f"model.name_or_path={model}", f"data.train_path={rows}",
        f"data.eval_path={rows}", f"trainer.max_steps={STEPS}", "trainer.eval_steps=7",
        "trainer.num_train_epochs=99", "trainer.save_steps=4", "evaluation.generation_steps=15", "evaluation.max_new_tokens=8",
        "evaluation.num_prompts=4", "optimizer.learning_rate=1e-3",
        "trainer.gradient_accumulation_steps=3", "trainer.metric_for_best_model=eval/loss",
    ]  # fmt: skip


def what_is_left(run: Path) -> dict[str, Any]:
    """All of a run that must be the same however often it was ended."""
    last = run / f"checkpoints/step-{STEPS:06d}"
    status = json.loads((run / "status.json").read_text())
    return {
        "weights": (last / "model.safetensors").read_bytes(),
        "export": (run / "model/model.safetensors").read_bytes(),
        "best": json.loads((run / "checkpoints/index.json").read_text())["best"],
        "moments": (last / "optimizer.safetensors").read_bytes(),
        "progress": json.loads((last / "trainer_state.json").read_text())["progress"],
        "metrics": without_times(run / "metrics.jsonl"),
        "generations": {p.name: p.read_text() for p in sorted((run / "generations").iterdir())},
        "status": (status["state"], status["step"], status["exit_code"]),
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
    }


def differences(run: Path, whole: dict[str, Any]) -> list[str]:
    found = what_is_left(run)
    return [name for name in whole if found[name] != whole[name]]


Start = Callable[[list[str]], int]


@pytest.fixture
def start(zygote: Zygote, tmp_path: Path) -> Start:
    """Start a command and give its process id at once."""
    return lambda command: zygote.start(command, tmp_path, tmp_path)


@pytest.mark.parametrize("asynchronous", [pytest.param("false", marks=pytest.mark.slow), "true"])
@pytest.mark.fault("T2 SIGKILL at a step, the same command again")
def test_a_kill_at_a_step_changes_nothing(
    asynchronous: str, command: list[str], start: Start, sft: Sft, zygote: Zygote, tmp_path: Path,
    tally: Tally,
) -> None:  # fmt: skip
    command = [*command, f"trainer.async_save={asynchronous}"]
    assert sft(*command, "run_name=whole").returncode == 0
    whole = what_is_left(tmp_path / "outputs/whole")
    run = tmp_path / "outputs/cut"
    for step in (1, 12, 23, 34):
        with tally.point(f"step {step}"):
            process_id = start([*command, "run_name=cut"])
            assert when(metrics_hold(run, step), process_id)
            os.kill(process_id, signal.SIGKILL)
            assert zygote.wait(process_id) == -signal.SIGKILL
    done = sft(*command, "run_name=cut")
    with tally.point("the end"):
        assert done.returncode == 0, done.stderr
        assert not differences(run, whole)


@pytest.mark.slow
@pytest.mark.fault("T3 SIGKILL while it loads, again and again")
def test_kills_while_a_run_resumes_change_nothing(
    command: list[str], start: Start, sft: Sft, zygote: Zygote, tmp_path: Path, tally: Tally
) -> None:
    assert sft(*command, "run_name=whole").returncode == 0
    whole = what_is_left(tmp_path / "outputs/whole")
    run, printed = tmp_path / "outputs/cut", tmp_path / "stdout"
    process_id = start([*command, "run_name=cut"])
    assert when(metrics_hold(run, 20), process_id)
    os.kill(process_id, signal.SIGKILL)
    zygote.wait(process_id)
    for words in ("reading", "format", "loading", "loss", LOOP_BEGINS):
        with tally.point(f"after it printed {words}"):
            printed.unlink(missing_ok=True)
            process_id = start([*command, "run_name=cut"])
            assert when(lambda w=words: printed.is_file() and w in printed.read_text(), process_id)  # type: ignore[misc]
            os.kill(process_id, signal.SIGKILL)
            assert zygote.wait(process_id) == -signal.SIGKILL
    done = sft(*command, "run_name=cut")
    with tally.point("the end"):
        assert done.returncode == 0, done.stderr
        assert not differences(run, whole)


MOMENTS: dict[str, Callable[[Path], Callable[[], bool]]] = {
    "a step": lambda run: metrics_hold(run, 10),
    "an evaluation": lambda run: (run / "generations/step-000000.jsonl").is_file,
    "a save": lambda run: lambda: any((run / "checkpoints").glob(".tmp-step*")),
}


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
@pytest.mark.fault("T4 SIGTERM or SIGINT, once or twice, the same command again")
def test_a_request_to_stop_saves_and_goes_on(
    number: signal.Signals, code: int, command: list[str], start: Start, sft: Sft, zygote: Zygote,
    tmp_path: Path, tally: Tally,
) -> None:  # fmt: skip
    assert sft(*command, "run_name=whole").returncode == 0
    whole = what_is_left(tmp_path / "outputs/whole")
    for name, moment in MOMENTS.items():
        run = tmp_path / "outputs" / name.replace(" ", "-")
        mine = [*command, f"run_name={run.name}"]
        with tally.point(name):
            process_id = start(mine)
            assert when(moment(run), process_id)
            os.kill(process_id, number)
            assert zygote.wait(process_id) == code
            status = json.loads((run / "status.json").read_text())
            assert (status["state"], status["exit_code"]) == ("preempted", code)
            assert not list(run.glob("checkpoints/.tmp*"))
            assert sft(*mine).returncode == 0
            assert not differences(run, whole)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
@pytest.mark.fault("T30 a second signal leaves at once")
def test_a_second_signal_leaves_at_once_and_nothing_is_lost(
    number: signal.Signals, code: int, command: list[str], start: Start, sft: Sft, zygote: Zygote,
    tmp_path: Path, tally: Tally,
) -> None:  # fmt: skip
    # One microbatch that takes long: the first request is not read before the second.
    long_rows = tmp_path / "long.jsonl"
    row = json.dumps({"prompt": "Seven:", "response": "7" * 480})
    long_rows.write_text(f"{row}\n" * 120)
    slow = [*command, f"data.train_path={long_rows}", "data.lint.duplicate_rows=off",
            "data.lint.eval_overlap=off", "trainer.global_batch_size=120",
            "trainer.gradient_accumulation_steps=1", "evaluation.generation_steps=null"]  # fmt: skip
    run, printed = tmp_path / "outputs/cut", tmp_path / "stdout"
    with tally.point("in a microbatch"):
        process_id = start([*slow, "run_name=cut"])
        assert when(lambda: printed.is_file() and LOOP_BEGINS in printed.read_text(), process_id)
        time.sleep(0.5)
        os.kill(process_id, number)
        time.sleep(2.2)
        assert not is_zombie(process_id), "the microbatch was too short"
        os.kill(process_id, number)
        assert zygote.wait(process_id) == code
        # Whoever heeds the first request says so when the microbatch is over.
        assert ORDERLY not in printed.read_text()
        assert json.loads((run / "status.json").read_text())["state"] == "preempted"


# Two processes.


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a launcher; its workers, in sessions of their own, must not outlive it."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 5
    while alive := [child for child in children if is_alive(int(child))]:
        assert time.monotonic() < deadline, f"processes {alive} outlive their launcher"
        time.sleep(0.01)


def is_alive(process_id: int) -> bool:
    try:
        return not is_zombie(process_id)
    except FileNotFoundError:
        return False


def launch_two(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "cs336_alignment.cli", *command], cwd=folder,
        env=clean_environment(), stdout=subprocess.DEVNULL,
        stderr=(folder / "stderr-of-two").open("wb"), start_new_session=True,
    )  # fmt: skip


def process_of(launcher: subprocess.Popen[bytes], rank: int) -> int:
    """Find the process that the launcher gave this rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for child in map(int, children):
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return child
    raise AssertionError(f"no process has rank {rank}")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("rank", "number"),
    [
        pytest.param(
            1, signal.SIGTERM, marks=pytest.mark.fault("T5 SIGTERM to one process of two")
        ),
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.fault("T27 one process of two dies")),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.fault("T27 one process of two dies")),
    ],
)
def test_what_one_of_two_processes_gets_ends_both_and_costs_nothing(
    rank: int, number: signal.Signals, command: list[str], tmp_path: Path, tally: Tally
) -> None:
    assert launch_two([*command, "run_name=whole"], tmp_path).wait(120) == 0
    whole = what_is_left(tmp_path / "outputs/whole")
    run = tmp_path / "outputs/cut"
    with tally.point(f"rank {rank}"):
        launcher = launch_two([*command, "run_name=cut"], tmp_path)
        assert when(metrics_hold(run, 10), launcher.pid)
        os.kill(process_of(launcher, rank), number)
        assert launcher.wait(60) != 0
        if number == signal.SIGTERM:
            status = json.loads((run / "status.json").read_text())
            assert (status["state"], status["exit_code"]) == ("preempted", 75)
            assert 0 < status["step"] < STEPS
        again = launch_two([*command, "run_name=cut"], tmp_path)
        assert again.wait(120) == 0, (tmp_path / "stderr-of-two").read_text()[-2000:]
        assert not differences(run, whole)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.fault("T27 the launcher of two processes dies")
def test_no_process_outlives_its_launcher(command: list[str], tmp_path: Path, tally: Tally) -> None:
    run = tmp_path / "outputs/cut"
    for moment in (run.is_dir, metrics_hold(run, 10)):
        with tally.point("at its start" if moment == run.is_dir else "at step 10"):
            launcher = launch_two([*command, "run_name=cut"], tmp_path)
            assert when(moment, launcher.pid)
            end_group(launcher)
    with tally.point("the end"):
        assert launch_two([*command, "run_name=cut"], tmp_path).wait(120) == 0


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.fault("T22 another number of processes at each start")
def test_the_number_of_processes_may_change(
    rows: Path, sft: Sft, tmp_path: Path, tally: Tally
) -> None:
    command = ["train", *TINY, f"data.train_path={rows}", "optimizer.learning_rate=1e-3"]
    assert sft(*command, "trainer.max_steps=15", "run_name=whole").returncode == 0
    run = tmp_path / "outputs/cut"
    for steps, processes in ((5, 1), (10, 2), (15, 1)):
        with tally.point(f"{processes} process(es) from step {steps - 5} on"):
            # The schedule's length does not change: the run is ended, not made shorter.
            mine = [*command, "trainer.max_steps=15", "trainer.save_steps=5", "run_name=cut"]
            if processes == 2:
                launcher = launch_two(mine, tmp_path)
                ended = launcher.pid
            else:
                launcher = subprocess.Popen(
                    [sys.executable, "-m", "cs336_alignment.cli", *mine], cwd=tmp_path,
                    env=clean_environment(), stdout=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
                ended = launcher.pid
            if steps < 15:
                assert when((run / f"checkpoints/step-{steps:06d}").is_dir, ended)
                end_group(launcher)
            else:
                assert launcher.wait(120) == 0
    with tally.point("the same losses"):
        want = without_times(tmp_path / "outputs/whole/metrics.jsonl")
        found = without_times(run / "metrics.jsonl")
        assert [row["step"] for row in found] == [row["step"] for row in want]
        for row, other in zip(found, want, strict=True):
            assert row["train/num_tokens"] == other["train/num_tokens"]
            assert row["train/loss"] == pytest.approx(other["train/loss"], rel=1e-6)


# The campaign.


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("asynchronous", ["false", "true"])
@pytest.mark.fault("T2 SIGKILL at a random moment, one process (campaign)")
def test_fifty_random_kills(
    asynchronous: str, command: list[str], start: Start, sft: Sft, zygote: Zygote, tmp_path: Path,
    tally: Tally,
) -> None:  # fmt: skip
    command = [*command, f"trainer.async_save={asynchronous}"]
    begin = time.monotonic()
    assert sft(*command, "run_name=whole").returncode == 0
    took = time.monotonic() - begin
    whole = what_is_left(tmp_path / "outputs/whole")
    rng = random.Random(f"kills {asynchronous}")
    kills, places, runs = 0, Counter[str](), 0
    while kills < 50:
        runs += 1
        run = tmp_path / f"outputs/cut-{runs}"
        lives = 0
        with tally.point(f"run {runs}"):
            while True:
                process_id = start([*command, f"run_name={run.name}"])
                # The longer a run resists, the longer it may live: it comes to its end.
                time.sleep(rng.uniform(0, took * (0.6 + 0.05 * lives)))
                os.kill(process_id, signal.SIGKILL)
                if (code := zygote.wait(process_id)) == 0:
                    break
                assert code == -signal.SIGKILL, (tmp_path / "stderr").read_text()
                kills, lives = kills + 1, lives + 1
                printed = (tmp_path / "stdout").read_text()
                saving = any(run.glob("checkpoints/.tmp*"))
                places["save" if saving else "loop" if LOOP_BEGINS in printed else "load"] += 1
            assert not differences(run, whole)
        tally.tried += lives - 1
    print(f"{kills} kills in {runs} runs: {dict(places)}")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.fault("T2 SIGKILL at a random moment, two processes (campaign)")
def test_twenty_random_kills_of_two_processes(
    command: list[str], tmp_path: Path, tally: Tally
) -> None:
    started = time.monotonic()
    assert launch_two([*command, "run_name=whole"], tmp_path).wait(120) == 0
    took = time.monotonic() - started
    whole = what_is_left(tmp_path / "outputs/whole")
    rng = random.Random("two processes")
    kills = runs = 0
    while kills < 20:
        runs += 1
        lives = 0
        with tally.point(f"run {runs}"):
            while True:
                process = launch_two([*command, f"run_name=cut-{runs}"], tmp_path)
                try:
                    code = process.wait(rng.uniform(0.4 * took, took * (1 + 0.05 * lives)))
                except subprocess.TimeoutExpired:
                    end_group(process)
                    kills, lives = kills + 1, lives + 1
                    continue
                assert code == 0
                break
            assert not differences(tmp_path / f"outputs/cut-{runs}", whole)
        tally.tried += lives - 1


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
@pytest.mark.fault("T1 SIGKILL while several processes tokenize")
def test_processes_that_tokenize_end_with_the_one_that_is_killed(
    tmp_path: Path, tally: Tally
) -> None:
    line = json.dumps({"prompt": "What is 148 plus 67?", "response": "215 " * 30}) + "\n"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(line * 60_000)
    command = [
        sys.executable, "-m", "cs336_alignment.cli", "train", *TINY, f"data.train_path={rows}",
        "data.num_workers=2", "run_name=r", "trainer.max_steps=1", "data.lint.duplicate_rows=off", "data.cache_dir=cache",
    ]  # fmt: skip
    with tally.point("SIGKILL"):
        run = subprocess.Popen(
            command, cwd=tmp_path, env=clean_environment(), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        until = time.monotonic() + 120
        while len(found := children.read_text().split()) < 2:
            assert run.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        run.kill()
        run.wait()
        until = time.monotonic() + 10
        while alive := [pid for pid in found if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < until, alive
            time.sleep(0.05)
        again = subprocess.run(command, cwd=tmp_path, env=clean_environment(), timeout=280)
        assert again.returncode == 0
