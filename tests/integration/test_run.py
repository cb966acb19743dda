"""Runs as users make them: train, stop, continue, lengthen, export, evaluate."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import TINY, Sft, without_times
from tests.zygote import Zygote, metrics_hold, when

FILES = {
    "config.yaml", "status.json", "manifest.json", "data_ledger.json", "metrics.jsonl",
    "checkpoints", "model", "report.html", "loss.png", "lengths.png", "run.lock",
}  # fmt: skip


def read(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text()))


def test_twenty_steps_equal_ten_and_ten(
    sft: Sft, zygote: Zygote, rows: Path, tmp_path: Path
) -> None:
    overrides = [
        *TINY, f"data.train_path={rows}", f"data.eval_path={rows}", "trainer.max_steps=20",
        "trainer.eval_steps=4", "trainer.save_steps=6", "evaluation.generation_steps=10",
        "evaluation.max_new_tokens=5", "evaluation.num_prompts=4", "optimizer.learning_rate=1e-3",
    ]  # fmt: skip
    whole = sft("train", *overrides, "run_name=whole")
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "outputs/cut"
    process_id = zygote.start(["train", *overrides, "run_name=cut"], tmp_path, tmp_path)
    assert when(metrics_hold(run, 9), process_id)
    os.kill(process_id, signal.SIGTERM)
    assert zygote.wait(process_id) == 75
    status = read(run / "status.json")
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    step = status["step"]
    assert isinstance(step, int) and 9 <= step < 20
    before = (run / "metrics.jsonl").read_bytes()
    assert '"state":"preempted"' in (run / "report.html").read_text()
    again = sft("train", *overrides, "run_name=cut")
    assert again.returncode == 0, again.stderr
    assert '"state":"completed"' in (run / "report.html").read_text()
    assert f"step {step} of 20" in again.stdout
    assert (run / "metrics.jsonl").read_bytes().startswith(before)
    assert without_times(run / "metrics.jsonl") == without_times(
        tmp_path / "outputs/whole/metrics.jsonl"
    )
    for name in ("model/model.safetensors", "checkpoints/step-000020/optimizer.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "outputs/whole" / name).read_bytes()
    texts = sorted(p.name for p in (run / "generations").iterdir())
    assert texts == ["step-000000.jsonl", "step-000010.jsonl", "step-000020.jsonl"]


@pytest.mark.fault("F20 a time limit that no step fits in")
def test_a_time_limit_before_the_first_step_is_an_error(
    sft: Sft, rows: Path, tmp_path: Path
) -> None:
    """With status 75 a scheduler would queue the same command again, for ever."""
    overrides = (*TINY, f"data.train_path={rows}", f"data.eval_path={rows}", "run_name=r")
    done = sft("train", *overrides, "trainer.max_hours=0.000001")
    assert done.returncode == 78 and "error[R304]" in done.stderr, done.stderr
    assert sft("train", *overrides, "trainer.max_steps=2").returncode == 0


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), (signal.SIGINT, 130)],
)
@pytest.mark.fault("T4 SIGTERM or SIGINT, once or twice, the same command again")
def test_a_signal_before_the_first_step_leaves_a_run_that_goes_on(
    number: signal.Signals, code: int, sft: Sft, zygote: Zygote, rows: Path, tmp_path: Path
) -> None:
    overrides = [*TINY, f"data.train_path={rows}", "trainer.max_steps=2", "run_name=r"]
    printed = tmp_path / "stdout"
    process_id = zygote.start(["train", *overrides], tmp_path, tmp_path)
    assert when(lambda: printed.is_file() and printed.read_text().startswith("reading"), process_id)
    os.kill(process_id, number)
    assert zygote.wait(process_id) == code
    assert "before the first step" in printed.read_text()
    status = read(tmp_path / "outputs/r/status.json")
    assert (status["state"], status["step"], status["exit_code"]) == ("preempted", 0, code)
    assert sft("train", *overrides).returncode == 0


@pytest.mark.slow
def test_results_of_other_questions_are_not_compared(sft: Sft, rows: Path, tmp_path: Path) -> None:
    overrides = [*TINY, f"data.train_path={rows}", f"data.eval_path={rows}", "run_name=r"]
    first = sft("train", *overrides, "trainer.max_steps=2")
    assert first.returncode == 0 and "eval/loss" in first.stdout.partition("Held-out")[2]
    more = [*overrides, "data.max_eval_examples=3", "trainer.eval_steps=1"]
    second = sft("train", *more, "trainer.max_steps=3")
    assert second.returncode == 0
    assert "results before this step do not compare" in second.stderr
    assert "Held-out" not in second.stdout  # one evaluation is no comparison
    third = sft("train", *more, "trainer.max_steps=4")
    assert third.returncode == 0 and "do not compare" not in third.stderr
    metrics = without_times(tmp_path / "outputs/r/metrics.jsonl")
    losses = {row["step"]: row["eval/loss"] for row in metrics if "eval/loss" in row}
    table = third.stdout.partition("Held-out")[2]
    assert f"{losses[3]:.4f}" in table and f"{losses[4]:.4f}" in table


def test_what_a_run_leaves_and_the_same_command_again(sft: Sft, rows: Path, tmp_path: Path) -> None:
    overrides = [
        *TINY, f"data.train_path={rows}", "run_name=r", "trainer.max_steps=3",
        "model.name_or_path=builtin:arithmetic",
    ]  # fmt: skip
    first = sft("train", *overrides)
    assert first.returncode == 0, first.stderr
    run = tmp_path / "outputs/r"
    assert {path.name for path in run.iterdir()} == FILES
    status = read(run / "status.json")
    assert (status["state"], status["step"], status["exit_code"]) == ("completed", 3, 0)
    ledger = json.loads((run / "data_ledger.json").read_text())["train"]
    assert ledger["rows_read"] == ledger["kept"] == ledger["ends_with_stop"] == 40
    manifest = read(run / "manifest.json")
    assert manifest["parameters"] == manifest["local_parameters"]
    umask = os.umask(0)
    os.umask(umask)
    for path in (run / "model").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask

    stamp = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != "run.lock"}
    again = sft("train", *overrides)
    assert again.returncode == 0 and "is complete: nothing to do" in again.stdout
    assert stamp == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name != "run.lock"}

    changed = sft("train", *overrides, "optimizer.learning_rate=1e-3")
    assert changed.returncode == 78
    assert "optimizer.learning_rate: 2e-05 → 0.001" in changed.stderr
    assert "run_name=r-2" in changed.stderr
    never = sft("train", *overrides, "trainer.resume=never")
    assert never.returncode == 73 and "error[R103]" in never.stderr
    assert read(run / "status.json")["state"] == "completed"

    manifest["versions"]["torch"] = "1.0"
    (run / "manifest.json").write_text(json.dumps(manifest))
    longer = sft("train", *overrides, "trainer.max_steps=5")
    assert longer.returncode == 0
    assert "trainer.max_steps changed from 3 to 5" in longer.stderr
    assert "torch was 1.0 and is" in " ".join(longer.stderr.split())
    assert list(read(run / "manifest.json")["changes"]) == ["3"]
    assert read(run / "status.json")["step"] == 5

    weights = run / "model" / "model.safetensors"
    exported = weights.read_bytes()
    weights.unlink()
    once_more = sft("train", *overrides, "trainer.max_steps=5")
    assert once_more.returncode == 0 and "the model is written once more" in once_more.stderr
    assert weights.read_bytes() == exported

    (run / "manifest.json").unlink()  # the checkpoint has a copy
    rows.write_text(rows.read_text().replace("Add 0", "Put 0"))
    other = sft("train", *overrides, "trainer.max_steps=7")
    assert other.returncode == 78 and "training data differs" in other.stderr

    for folder in (run / "checkpoints").glob("step-*"):
        (folder / "model.safetensors").write_bytes(b"rubbish")
    lost = sft("train", *overrides, "trainer.max_steps=9")
    assert lost.returncode == 74 and "error[R201]" in lost.stderr


def test_export_gives_the_same_log_probs_in_plain_transformers(
    sft: Sft, rows: Path, tmp_path: Path
) -> None:
    done = sft("train", *TINY, f"data.train_path={rows}", f"data.eval_path={rows}", "run_name=r",
               "trainer.max_steps=8", "optimizer.learning_rate=1e-2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / "outputs/r"
    losses = [
        row["eval/loss"] for row in without_times(run / "metrics.jsonl") if "eval/loss" in row
    ]
    assert losses[-1] < losses[0]
    # The whole evaluation again, by transformers and torch alone, from the exported folder.
    model = AutoModelForCausalLM.from_pretrained(run / "model").double()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    from cs336_alignment.data.templates import load_template

    template = load_template("r1_zero").text
    nll, count = 0.0, 0
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        reasoning, final = row["answer"].split("\n#### ")
        prompt = tokenizer(template.replace("{question}", row["question"]))["input_ids"]
        response = tokenizer(
            f" {reasoning} </think> <answer> {final} </answer>", add_special_tokens=False
        )["input_ids"]
        ids = torch.tensor([prompt + response + [tokenizer.eos_token_id]])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].log_softmax(-1)
        picked = log_p.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        nll, count = nll - picked.sum().item(), count + len(picked)
    assert losses[-1] == pytest.approx(nll / count, rel=1e-5)
    card = (run / "model/README.md").read_text()
    assert "eval/loss" in card and "builtin:arithmetic" in card

    evaluated = sft("evaluate", "model.name_or_path=outputs/r/checkpoints/step-000008",
                    f"data.eval_path={rows}", "evaluation.max_new_tokens=4", "run_name=e")  # fmt: skip
    assert evaluated.returncode == 0, evaluated.stderr
    report = read(tmp_path / "outputs/e/evaluation.json")
    assert report["eval/loss"] == pytest.approx(losses[-1], rel=1e-6)
    assert len((tmp_path / "outputs/e/generations.jsonl").read_text().splitlines()) == 40
    other = sft("evaluate", "model.name_or_path=outputs/r/model", f"data.eval_path={rows}",
                "run_name=e")  # fmt: skip
    assert other.returncode == 73 and "error[R104]" in other.stderr
    assert read(tmp_path / "outputs/e/evaluation.json") == report


def test_bad_rows_are_all_named_before_a_model_is_loaded(sft: Sft, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": ""}\nnot json\n'
        b'{"prompt": "a"}\n\n{"prompt": 3, "response": "b"}\n\xff\n'
    )
    done = sft("train", *TINY, f"data.train_path={path}", "run_name=r")
    assert done.returncode == 65
    for line, text in ((2, "response is empty"), (3, "broken JSON"), (4, "missing"),
                       (6, "prompt is not a string"), (7, "invalid UTF-8")):  # fmt: skip
        assert f"bad.jsonl:{line}" in done.stderr and text in done.stderr
    assert "5 errors in all" in done.stderr
    assert "loading" not in done.stdout and "Traceback" not in done.stderr
    assert read(tmp_path / "outputs/r/status.json")["exit_code"] == 65
    path.write_text('{"prompt": "a", "response": "b"}\n' * 4)
    assert sft("train", *TINY, f"data.train_path={path}", "run_name=r").returncode == 0


@pytest.mark.parametrize(
    ("overrides", "status", "text"),
    [
        (("data.train_path=nowhere.jsonl",), 66, "no file nowhere.jsonl"),
        (("model.name_or_path=./nowhere",), 66, "no model folder ./nowhere"),
        (("model.random_init=false",), 66, "model.random_init=true"),
        (("data.max_length=3",), 65, "no example of"),
        (("output_root=rows.jsonl/x",), 73, "cannot write to the run folder"),
        (("trainer.resume=nowhere",), 66, "no checkpoint nowhere"),
    ],
)
def test_what_is_missing_gets_its_status(
    overrides: tuple[str, ...], status: int, text: str, sft: Sft, rows: Path
) -> None:
    done = sft("train", *TINY, f"data.train_path={rows}", *overrides)
    assert done.returncode == status, done.stderr
    assert text in done.stderr and done.stderr.count("error[") == 1


@pytest.mark.fault("T25 token ids beyond the embedding")
def test_a_tokenizer_beyond_the_embedding_is_refused(sft: Sft, rows: Path, tmp_path: Path) -> None:
    from cs336_alignment.model.source import resolve_model

    folder = tmp_path / "small"
    folder.mkdir()
    for path in Path(resolve_model("builtin:arithmetic", None, False).location).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config.update(vocab_size=200, pad_token_id=None, eos_token_id=None)
    (folder / "config.json").write_text(json.dumps(config))
    done = sft("train", *TINY, f"data.train_path={rows}", f"model.name_or_path={folder}")
    assert done.returncode == 78 and "ids below 200" in done.stderr


@pytest.mark.fault("T16 a loss or gradient that is not finite, at each step")
def test_a_loss_that_is_not_finite_stops_before_the_weights(
    sft: Sft, rows: Path, tmp_path: Path
) -> None:
    done = sft("train", *TINY, f"data.train_path={rows}", "run_name=r", "trainer.max_steps=30",
               "optimizer.learning_rate=1e30", "optimizer.warmup_ratio=0")  # fmt: skip
    assert done.returncode == 70
    assert "error[R301]" in done.stderr and "examples (counted from 0" in done.stderr
    status = read(tmp_path / "outputs/r/status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 70)
    assert not list((tmp_path / "outputs/r/checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_run_with_wandb_unreachable_ends_well(sft: Sft, rows: Path, tmp_path: Path) -> None:
    unreachable = {
        "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online",
    }  # fmt: skip
    done = sft("train", *TINY, "logger=wandb", f"data.train_path={rows}", "trainer.max_steps=3",
               "run_name=r", env=unreachable)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning:") == 1
    assert read(tmp_path / "outputs/r/status.json")["state"] == "completed"


def test_wandb_offline_changes_nothing(sft: Sft, rows: Path, tmp_path: Path) -> None:
    overrides = [*TINY, "logger=wandb", f"data.train_path={rows}", "trainer.max_steps=3"]
    offline = sft("train", *overrides, "run_name=a", env={"WANDB_MODE": "offline"})
    assert offline.returncode == 0, offline.stderr
    assert list((tmp_path / "outputs/a/wandb").glob("offline-run-*/run-*.wandb"))
    silent = sft("train", *TINY, f"data.train_path={rows}", "trainer.max_steps=3", "run_name=b")
    assert silent.returncode == 0
    a, b = (tmp_path / f"outputs/{name}/model/model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
