"""`cs336-sft chat` through a pipe: with a run's settings, with a model folder, with nothing."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from cs336_alignment import cli
from cs336_alignment.model.loading import load_model, load_tokenizer
from cs336_alignment.model.source import resolve_model
from tests.conftest import ROOT, TINY, Sft


@pytest.fixture
def run(sft: Sft, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two steps in the r1_zero template."""
    done = sft("train", *TINY, f"data.train_path={rows}", "trainer.max_steps=2", "run_name=r",
               "trainer.save_steps=1", "evaluation.max_new_tokens=7")  # fmt: skip
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs/r"


def chat(text: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return cli.run(["chat", *arguments])


def test_a_run_is_asked_as_it_was_trained(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated = cli.run(["evaluate", f"model.name_or_path={run / 'model'}", "run_name=e",
                         "data.eval_path=rows.jsonl",
                         "evaluation.max_new_tokens=7", "evaluation.num_prompts=2"])  # fmt: skip
    assert evaluated == 0
    expected = [
        json.loads(line)["response"]
        for line in Path("outputs/e/generations.jsonl").read_text().splitlines()
    ]
    capsys.readouterr()
    questions = "0 + 0 = ?\n1 + 3 = ?\n"
    for subject in (str(run), str(run / "model")):
        assert chat(questions, monkeypatch, subject) == 0
        printed = capsys.readouterr()
        assert printed.out == "".join(f"{text}\n" for text in expected)
        assert "template r1_zero: nothing is remembered" in printed.err
        assert "'</answer>', or after 7 tokens" in printed.err
    assert chat(questions, monkeypatch, str(run), "evaluation.max_new_tokens=3") == 0
    assert "after 3 tokens" in capsys.readouterr().err
    shutil.rmtree(run / "model")
    assert chat(questions, monkeypatch, str(run)) == 0
    printed = capsys.readouterr()
    assert "loading" in printed.err and "step-000002" in printed.err
    assert printed.out == "".join(f"{text}\n" for text in expected)
    shutil.rmtree(run / "checkpoints")
    assert chat("", monkeypatch, str(run)) == 66
    assert "error[R331]" in capsys.readouterr().err


def test_a_folder_with_a_chat_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = resolve_model("builtin:arithmetic", None, False)
    tokenizer = load_tokenizer(source)
    tokenizer.chat_template = (ROOT / "tests/chat_templates/chatml.jinja").read_text()
    tokenizer.save_pretrained(tmp_path / "m")
    load_model(source, random_init=True, seed=0).save_pretrained(tmp_path / "m")
    asked: list[list[int]] = []

    def answer(
        model: object, tok: object, prompt_ids: list[int], *_: object, **__: object
    ) -> object:
        from cs336_alignment.evaluation.chat import Reply

        asked.append(prompt_ids)
        return Reply(f"reply {len(asked)}", "eos")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cs336_alignment.chat_command.stream_reply", answer)
    assert chat("a?\nb?\n/save c.jsonl\n", monkeypatch, "m") == 0
    messages = [{"role": "user", "content": "a?"}]
    for number, ids in enumerate(asked, start=1):
        assert ids == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        messages += [{"role": "assistant", "content": f"reply {number}"},
                     {"role": "user", "content": "b?"}]  # fmt: skip
    assert len(asked) == 2
    assert "one conversation" in capsys.readouterr().err
    # What was saved can be trained on.
    status = cli.run(["prepare", "model.name_or_path=m", "data.train_path=c.jsonl"])
    assert status == 0 and "messages" in capsys.readouterr().out


def test_what_makes_no_chat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, status, text in (
        ((), 2, "C152"), (("seed=1",), 2, "C152"), (("./nowhere",), 66, "M101"),
        (("builtin:arithmetic", "trainer.max_steps=3"), 78, "C150"),
        (("builtin:arithmetic",), 66, "M102"),
        (("builtin:arithmetic", "data.prompt_template=chat"), 78, "D403"),
    ):  # fmt: skip
        assert chat("hi\n", monkeypatch, *arguments) == status
        assert f"error[{text}]" in capsys.readouterr().err
