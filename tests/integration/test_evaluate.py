"""`cs336-sft evaluate` as people use it: beside a baseline, stopped and continued, with bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from cs336_alignment.model.loading import load_model, load_tokenizer
from cs336_alignment.model.source import resolve_model
from tests.conftest import Sft
from tests.zygote import Zygote

DATA = ("data.eval_path=builtin:arithmetic", "data.max_eval_examples=60")
FILES = ("evaluation.json", "evaluation.md", "generations.jsonl", "generations-baseline.jsonl")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models, `one` and `two`, whose responses depend on the prompt."""
    folder = tmp_path_factory.mktemp("models")
    source = resolve_model("builtin:arithmetic", None, False)
    for seed, name in enumerate(("one", "two")):
        model = load_model(source, random_init=True, seed=seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(6)
        model.save_pretrained(folder / name)
        load_tokenizer(source).save_pretrained(folder / name)
    return folder


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_beside_a_baseline(sft: Sft, models: Path, tmp_path: Path) -> None:
    options = (
        *DATA, "evaluation.num_prompts=12", "evaluation.max_new_tokens=8",
        "evaluation.num_samples=2", "evaluation.temperature=1.0",
    )  # fmt: skip
    done = sft("evaluate", f"model.name_or_path={models / 'one'}",
               f"evaluation.baseline={models / 'two'}", *options, "run_name=both")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "difference" in done.stdout and "baseline" in done.stdout
    folder = tmp_path / "outputs/both"
    assert {path.name for path in folder.iterdir()} == set(FILES)  # kept responses are gone
    report = json.loads((folder / "evaluation.json").read_text())
    mine, theirs = (lines(folder / name) for name in FILES[2:])
    keys = [(row["index"], row["sample"]) for row in mine]
    assert keys == [(i, n) for i in range(12) for n in range(2)]
    assert keys == [(row["index"], row["sample"]) for row in theirs]
    assert [row["prompt"] for row in mine] == [row["prompt"] for row in theirs]
    assert any(a["response"] != b["response"] for a, b in zip(mine, theirs, strict=True))
    length = report["comparison"]["eval/response_length"]
    for side, rows in (("model", mine), ("baseline", theirs)):
        assert length[side]["value"] == pytest.approx(sum(r["length"] for r in rows) / 24)  # type: ignore[misc]
    low, high = report["intervals"]["eval/response_length"]
    assert low <= report["eval/response_length"] <= high
    assert report["baseline_metrics"]["eval/loss"] != report["eval/loss"]
    assert "two" in (folder / "evaluation.md").read_text()
    # Each arm is what its model's own evaluation is.
    alone = sft("evaluate", f"model.name_or_path={models / 'two'}", *options, "run_name=alone")
    assert alone.returncode == 0, alone.stderr
    assert lines(tmp_path / "outputs/alone/generations.jsonl") == theirs
    metrics = json.loads((tmp_path / "outputs/alone/evaluation.json").read_text())
    assert {key: metrics[key] for key in report["baseline_metrics"]} == report["baseline_metrics"]


@pytest.mark.slow
def test_a_stop_costs_no_response(sft: Sft, zygote: Zygote, models: Path, tmp_path: Path) -> None:
    options = (
        f"model.name_or_path={models / 'one'}", f"evaluation.baseline={models / 'two'}", *DATA,
        "evaluation.num_prompts=null", "evaluation.max_new_tokens=48", "evaluation.batch_size=2",
        "evaluation.temperature=0.7",
    )  # fmt: skip
    whole = sft("evaluate", *options, "run_name=whole")
    assert whole.returncode == 0, whole.stderr
    kept = tmp_path / "outputs/cut/responses"
    for number, status in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        before = sum(len(path.read_bytes()) for path in kept.glob("*"))
        process = zygote.start(["evaluate", *options, "run_name=cut"], tmp_path, tmp_path)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if sum(len(path.read_bytes()) for path in kept.glob("*")) > before:
                break
            time.sleep(0.01)
        os.kill(process, number)
        assert zygote.wait(process) == status
        assert "the same command goes on" in (tmp_path / "stdout").read_text()
        assert not (tmp_path / "outputs/cut/evaluation.json").exists()
    # A copy whose kept responses are marked: they come out marked, so nobody generated them again.
    shutil.copytree(tmp_path / "outputs/cut", tmp_path / "outputs/marked")
    marked = 0
    for path in (tmp_path / "outputs/marked/responses").iterdir():
        chunks = lines(path)
        for chunk in chunks:
            for generation in chunk.values():
                generation["text"] = "MARKED"  # type: ignore[index]
                marked += 1
        path.write_text("".join(json.dumps(chunk) + "\n" for chunk in chunks) + '{"torn": {"te')
    assert 16 <= marked < 120
    for name in ("cut", "marked"):
        done = sft("evaluate", *options, f"run_name={name}")
        assert done.returncode == 0, done.stderr
        assert "responses of an earlier command are there" in done.stdout
    for name in FILES:
        cut, uncut = (tmp_path / "outputs" / run / name for run in ("cut", "whole"))
        assert cut.read_bytes() == uncut.read_bytes(), name
    rows = [row for name in FILES[2:] for row in lines(tmp_path / "outputs/marked" / name)]
    assert sum(row["response"] == "MARKED" for row in rows) == marked


@pytest.mark.slow
def test_groups_and_bad_input(sft: Sft, models: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{i} + 1 =", "response": f" {i + 1}", "ground_truth": i + 1,
         "subject": "even" if i % 2 == 0 else "odd"}
        for i in range(6)
    ]  # fmt: skip
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = f"model.name_or_path={models / 'one'}"
    short = "evaluation.max_new_tokens=4"
    done = sft("evaluate", model, "data.eval_path=eval.jsonl", short, "run_name=groups")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "outputs/groups/evaluation.json").read_text())
    assert {v: g["num_prompts"] for v, g in report["groups"]["subject"].items()} == {
        "even": 3, "odd": 3,
    }  # fmt: skip
    assert "## Reward by subject" in (tmp_path / "outputs/groups/evaluation.md").read_text()

    bare = tmp_path / "bare.jsonl"
    bare.write_text(
        "".join(json.dumps({k: r[k] for k in ("prompt", "response")}) + "\n" for r in rows)
    )
    baseline = f"evaluation.baseline={models / 'two'}"
    done = sft("evaluate", model, "data.eval_path=bare.jsonl", baseline, "run_name=bare")
    assert done.returncode == 65 and "error[D330]" in done.stderr
    assert "loading" not in done.stdout
    done = sft("evaluate", model, "data.eval_path=bare.jsonl", short, "run_name=loss")
    assert done.returncode == 0 and "nothing is generated" in done.stderr

    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "1 + 1 = 2", "ground_truth": "2"}\n')
    done = sft("evaluate", model, "data.eval_path=text.jsonl", short, "run_name=text",
               "data.train_on=all")  # fmt: skip
    assert done.returncode == 65 and "error[D332]" in done.stderr and "text.jsonl:1" in done.stderr
    done = sft("evaluate", model, "data.eval_path=eval.jsonl", "run_name=long",
               "evaluation.max_new_tokens=100000")  # fmt: skip
    assert done.returncode == 78 and "error[M108]" in done.stderr


def test_tokenizers_may_differ(sft: Sft, models: Path, tmp_path: Path) -> None:
    """The baseline is asked the same text, by the model's chat template, in its own tokens."""
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    tuned = tmp_path / "tuned"
    shutil.copytree(models / "one", tuned)
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    tokenizer.chat_template = template
    tokenizer.add_tokens(["seven times"])
    tokenizer.save_pretrained(tuned)
    model = load_model(resolve_model(str(tuned), None, False), random_init=False, seed=0)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tuned)
    rows = [
        {"question": f"What is seven times {i}?", "answer": f"It is.\n#### {7 * i}"}
        for i in range(4)
    ]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = sft("evaluate", "model.name_or_path=tuned", f"evaluation.baseline={models / 'two'}",
               "data.eval_path=eval.jsonl", "data.prompt_template=chat", "run_name=chat",
               "evaluation.max_new_tokens=4")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the tokenizers differ" in done.stderr
    mine, theirs = (lines(tmp_path / "outputs/chat" / name) for name in FILES[2:])
    assert [row["prompt"] for row in mine] == [row["prompt"] for row in theirs]
    assert str(mine[1]["prompt"]).startswith("[user]What is seven times 1?")
