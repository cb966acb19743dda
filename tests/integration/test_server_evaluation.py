"""`cs336-sft evaluate` by a server: as by the model at hand, stopped and continued, down and back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from transformers import AutoTokenizer

from cs336_alignment.model.loading import load_model, load_tokenizer
from cs336_alignment.model.source import resolve_model
from tests.conftest import TINY, Sft
from tests.fake_server import FakeServer
from tests.zygote import Zygote

DATA = ("data.eval_path=builtin:arithmetic", "data.max_eval_examples=40")
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose responses depend on the prompt, with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    source = resolve_model("builtin:arithmetic", None, False)
    net = load_model(source, random_init=True, seed=0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(6)
    net.save_pretrained(folder)
    tokenizer = load_tokenizer(source)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def transformers_serve(model: Path) -> Any:
    """The address of a real `transformers serve` with this model, on a thread of this process: to
    import torch anew would take longer than all else.
    """
    pytest.importorskip("fastapi")
    from transformers.cli.serve import Serve
    from transformers.utils import logging

    level, port = logging.get_verbosity(), free_port()
    server = Serve(
        str(model), device="cpu", host="127.0.0.1", port=port, log_level="error", non_blocking=True
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            with suppress(httpx2.TransportError):
                httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False)
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill_server()
        logging.set_verbosity(level)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def served(url: str, model: Path, *options: str) -> list[str]:
    return [
        "evaluate", f"model.name_or_path={model}", *DATA, "evaluation.backend=server",
        f"evaluation.server_url={url}", *options,
    ]  # fmt: skip


def test_transformers_serve_answers_as_the_model_here(
    sft: Sft, model: Path, transformers_serve: str, tmp_path: Path
) -> None:
    options = (
        "evaluation.num_prompts=5",
        "evaluation.max_new_tokens=12",
        "evaluation.stop=[e,i,o]",
    )
    named = f"evaluation.server_model={model}"
    here = sft("evaluate", f"model.name_or_path={model}", *DATA, *options, "run_name=here")
    assert here.returncode == 0, here.stderr
    there = sft(*served(transformers_serve, model, named, *options, "run_name=there"))
    assert there.returncode == 0, there.stderr
    assert "loading" not in there.stdout and "no weights" in there.stdout
    assert "/completions: prompts as text" in there.stdout
    mine, theirs = (
        lines(tmp_path / "outputs" / n / "generations.jsonl") for n in ("here", "there")
    )
    assert {row["stopped"] for row in mine} >= {"stop"}
    same = ("prompt", "response", "stopped", "reward", "ground_truth")
    for a, b in zip(mine, theirs, strict=True):
        assert {key: a[key] for key in same} == {key: b[key] for key in same}
        assert b["token_entropy"] is None
    report = json.loads((tmp_path / "outputs/there/evaluation.json").read_text())
    assert "eval/loss" not in report and "eval/response_entropy" not in report
    assert report["eval/reward"] == 0.0 and "eval/reward" in report["intervals"]
    # Sampled responses follow their seeds, though this server has one seed for all requests.
    drawn = (*options, "evaluation.num_samples=2", "evaluation.temperature=1.0")
    for name in ("one", "two"):
        done = sft(*served(transformers_serve, model, named, *drawn, f"run_name={name}"))
        assert done.returncode == 0, done.stderr
        assert "one response at a time" in done.stderr
    one, two = (lines(tmp_path / "outputs" / n / "generations.jsonl") for n in ("one", "two"))
    assert one == two and any(
        a["response"] != b["response"] for a, b in zip(one[::2], one[1::2], strict=True)
    )


def test_transformers_serve_takes_conversations(
    sft: Sft, model: Path, transformers_serve: str, tmp_path: Path
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i} + 1?"},
                      {"role": "assistant", "content": f"It is {i + 1}."}], "ground_truth": str(i + 1)}
        for i in range(4)
    ]  # fmt: skip
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = (
        "data.eval_path=chat.jsonl", "evaluation.max_new_tokens=12", "evaluation.stop=[e,i,o]",
    )  # fmt: skip
    here = sft("evaluate", f"model.name_or_path={model}", *options, "run_name=here")
    assert here.returncode == 0, here.stderr
    there = sft(*served(transformers_serve, model, f"evaluation.server_model={model}", *options,
                        "evaluation.server_api=chat", "run_name=there"))  # fmt: skip
    assert there.returncode == 0, there.stderr
    assert "as messages" in there.stdout and "template around them" not in there.stderr
    assert "makes" not in there.stderr  # the same tokens of each prompt
    mine, theirs = (
        lines(tmp_path / "outputs" / n / "generations.jsonl") for n in ("here", "there")
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    for a, b in zip(mine, theirs, strict=True):
        assert a["prompt"] == b["prompt"] and a["stopped"] == b["stopped"]
        # This server leaves special tokens out of texts.
        plain = tokenizer.decode(tokenizer(a["response"])["input_ids"], skip_special_tokens=True)
        assert plain == b["response"]


@pytest.mark.slow
def test_messages_and_what_is_told(sft: Sft, model: Path, tmp_path: Path) -> None:
    with FakeServer().running() as server:
        done = sft(*served(server.url, model, "evaluation.server_api=chat", "run_name=plain"))
        assert done.returncode == 0, done.stderr
        assert "template around them" in done.stderr
        sent = [body["messages"] for body in server.bodies]
        assert all(len(m) == 1 and m[0]["content"].endswith("<think>") for m in sent)
        server.bodies.clear()
        done = sft(*served(server.url, model, "evaluation.server_api=chat", "run_name=chat",
                           "data.prompt_template=chat"))  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "template around them" not in done.stderr
        sent = [body["messages"] for body in server.bodies]
        assert all(len(m) == 1 and "conversation" not in m[0]["content"] for m in sent)
        bare = tmp_path / "bare.jsonl"
        bare.write_text('{"prompt": "1 + 1 =", "response": " 2"}\n')
        done = sft(*served(server.url, model, "data.eval_path=bare.jsonl", "run_name=bare"))
        assert done.returncode == 65 and "error[D333]" in done.stderr
    done = sft(*served(server.url, model, "run_name=down"))
    assert done.returncode == 74 and "error[R341]" in done.stderr and server.url in done.stderr
    with FakeServer(context=20).running() as server:
        done = sft(*served(server.url, model, "run_name=long"))
        assert done.returncode == 78 and "error[M108]" in done.stderr


def test_a_local_baseline_beside_a_server(sft: Sft, model: Path, tmp_path: Path) -> None:
    with FakeServer().running() as server:
        done = sft(*served(server.url, model, f"evaluation.baseline={model}", "run_name=both",
                           "evaluation.num_prompts=6", "evaluation.max_new_tokens=16"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "outputs/both/evaluation.json").read_text())
    assert "eval/loss" not in report and report["baseline_metrics"]["eval/loss"] > 0
    assert (
        "eval/reward" in report["comparison"]
        and "eval/response_entropy" not in report["comparison"]
    )
    assert f"{report['baseline_metrics']['eval/loss']:.4f}" in done.stdout


def test_a_stop_costs_no_response(sft: Sft, zygote: Zygote, model: Path, tmp_path: Path) -> None:
    options = ("evaluation.num_prompts=null", "evaluation.server_concurrency=4",
               "evaluation.temperature=0.7", "evaluation.max_new_tokens=16")  # fmt: skip
    kept = tmp_path / "outputs/cut/responses"

    def count() -> int:
        return sum(len(lines(path)) for path in kept.glob("*"))

    with FakeServer().running() as server:
        whole = sft(*served(server.url, model, *options, "run_name=whole"))
        assert whole.returncode == 0, whole.stderr
        trial = len(server.bodies) - 40
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
            before, server.delay = count(), 0.05
            arguments = served(server.url, model, *options, "run_name=cut")
            process = zygote.start(arguments, tmp_path, tmp_path)
            deadline = time.monotonic() + 60
            while count() < before + 5 and time.monotonic() < deadline:
                time.sleep(0.01)
            server.delay = 20.0  # what is asked now is not waited for
            begin = time.monotonic()
            os.kill(process, number)
            assert zygote.wait(process) == status
            assert time.monotonic() - begin < 10
            assert "the same command goes on" in (tmp_path / "stdout").read_text()
            assert before + 5 <= count() < 40
        server.delay, before = 0.0, count()
        server.bodies.clear()
        done = sft(*served(server.url, model, *options, "run_name=cut"))
        assert done.returncode == 0, done.stderr
        assert f"going on: {before} responses" in done.stdout
        assert len(server.bodies) - trial == 40 - before
    for name in ("evaluation.json", "evaluation.md", "generations.jsonl"):
        cut, uncut = (tmp_path / "outputs" / run / name for run in ("cut", "whole"))
        assert cut.read_bytes() == uncut.read_bytes(), name


def test_a_server_that_dies_and_comes_back(sft: Sft, model: Path, tmp_path: Path) -> None:
    options = ("evaluation.num_prompts=null", "evaluation.server_concurrency=3",
               "evaluation.server_retries=1", "evaluation.max_new_tokens=16")  # fmt: skip
    with FakeServer().running() as server:
        server.fault = lambda n: "reset" if n >= 20 else None
        done = sft(*served(server.url, model, *options, "run_name=run"))
        assert done.returncode == 74 and "error[R342]" in done.stderr, done.stderr
        assert "try 2 of 2" in done.stderr and "Traceback" not in done.stderr
        kept = sum(len(lines(p)) for p in (tmp_path / "outputs/run/responses").glob("*"))
        assert 10 <= kept < 40
        server.fault = lambda _: None
        server.bodies.clear()
        done = sft(*served(server.url, model, *options, "run_name=run"))
        assert done.returncode == 0, done.stderr
        assert 40 - kept <= len(server.bodies) < 40 - kept + 10
    assert not (tmp_path / "outputs/run/responses").exists()
    assert len(lines(tmp_path / "outputs/run/generations.jsonl")) == 40


def test_options_that_do_not_combine(sft: Sft, model: Path, tmp_path: Path) -> None:
    done = sft("train", *TINY, "data.train_path=builtin:arithmetic", *DATA, "evaluation.backend=server",
               "evaluation.generation_steps=0", "run_name=train")  # fmt: skip
    assert done.returncode == 78 and "error[C104]" in done.stderr
    assert "evaluation.backend and evaluation.generation_steps" in done.stderr
    assert not (tmp_path / "outputs/train").exists()
    name = f"model.name_or_path={model}"
    done = sft("evaluate", name, *DATA, "evaluation.server_url=http://127.0.0.1:1/v1", "run_name=x")
    assert done.returncode == 78 and "evaluation.server_url and evaluation.backend" in done.stderr
    done = sft("evaluate", name, *DATA, "evaluation.backend=server", "model.random_init=true")
    assert done.returncode == 78 and "model.random_init" in done.stderr
    done = sft("evaluate", name, *DATA, "evaluation.backend=vllm", "run_name=x",
               "evaluation.max_new_tokens=8")  # fmt: skip
    assert done.returncode == 78 and "pip install vllm" in done.stderr
    shutil.rmtree(tmp_path / "outputs", ignore_errors=True)
