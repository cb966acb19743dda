"""The prompts of a conversation, the reply as it streams, and the commands."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.data.templates import load_template
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.evaluation.chat import Conversation, Reply, stream_reply
from cs336_alignment.evaluation.chat_session import ChatSession
from cs336_alignment.evaluation.generate import LocalGenerator
from cs336_alignment.evaluation.sampling import Request, Sampling
from cs336_alignment.model.loading import load_model, load_tokenizer
from cs336_alignment.model.source import resolve_model
from tests.conftest import ROOT

SOURCE = resolve_model("builtin:arithmetic", None, False)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(SOURCE)
    tokenizer.chat_template = (ROOT / "tests/chat_templates/chatml.jinja").read_text()
    return tokenizer


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    model = load_model(SOURCE, random_init=True, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return model.eval()


def test_the_prompt_of_each_turn_is_the_chat_templates(tokenizer: PreTrainedTokenizerBase) -> None:
    conversation = Conversation(tokenizer, None)
    conversation.turns = [("1 + 1?", "2"), ("and 1?", " 3 ")]
    conversation.system = "Be short."
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"},
        {"role": "user", "content": "and 1?"}, {"role": "assistant", "content": " 3 "},
        {"role": "user", "content": "and 4?"},
    ]  # fmt: skip
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert conversation.prompt_ids("and 4?") == ids
    assert conversation.messages("and 4?") == messages


def test_a_prompt_template_remembers_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    template = load_template("r1_zero")
    assert template is not None
    conversation = Conversation(tokenizer, template)
    first = conversation.prompt_ids("1 + 1?")
    conversation.turns.append(("1 + 1?", "2"))
    assert conversation.prompt_ids("1 + 1?") == first
    assert tokenizer.decode(first) == template.fill("1 + 1?")
    conversation.turns += [("3?", " "), ("4?", "4")]
    assert [len(row["messages"]) for row in conversation.rows()] == [2, 2]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(24, stop=()), Sampling(24, temperature=1.3, top_p=0.9, stop=()),
        Sampling(24, temperature=1.0, stop=("e", "1")),
        Sampling(24, min_new_tokens=9, temperature=2.0, stop=("e",)),
    ],
)  # fmt: skip
def test_a_streamed_reply_is_the_generators(
    sampling: Sampling, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    generator = LocalGenerator(model, tokenizer, batch_size=1)
    for seed in range(4):
        prompt = list(range(5, 11 + seed))
        (expected,) = generator.generate([Request(prompt, seed)], sampling)
        shown: list[str] = []
        reply = stream_reply(model, tokenizer, prompt, sampling, seed=seed, show=shown.append)
        assert (reply.text, reply.stopped) == (expected.text, expected.stopped)
        assert "".join(shown) == reply.text
        assert len(shown) > 1 or len(expected.token_ids) < 3


def test_the_end_token_and_the_context_end_a_reply(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = list(range(5, 15))
    free = stream_reply(model, tokenizer, prompt, Sampling(6, stop=()), seed=0, show=lambda _: None)
    assert free.stopped == "length"
    monkeypatch.setattr(model.config, "max_position_embeddings", 13)
    short = stream_reply(
        model, tokenizer, prompt, Sampling(6, stop=()), seed=0, show=lambda _: None
    )
    assert short == Reply(free.text[: len(short.text)], "length")
    assert 1 <= len(short.text) <= 3 < len(free.text)  # each token is a character here, or a part
    first = LocalGenerator(model, tokenizer, batch_size=1).generate(
        [Request(prompt, 0)], Sampling(1, stop=())
    )[0]
    monkeypatch.setattr(model.generation_config, "eos_token_id", first.token_ids[0])
    ended = stream_reply(
        model, tokenizer, prompt, Sampling(6, stop=()), seed=0, show=lambda _: None
    )
    assert ended == Reply("", "eos")


Chat = Callable[..., "tuple[ExitStatus, Conversation]"]


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """Chat through a pipe with something that counts; interrupted at its second reply if asked."""

    def run(
        text: str, context: int | None = None, interrupting: bool = False
    ) -> tuple[ExitStatus, Conversation]:
        conversation = Conversation(tokenizer, None)

        def answer(
            ids: list[int], turn: int, show: object, interrupted: Callable[[], bool]
        ) -> Reply:
            question = (conversation.turns and "again") or "first"
            if len(conversation.turns) == 1 and interrupting:
                signal.raise_signal(signal.SIGINT)
                assert interrupted()
                return Reply("half", "interrupted")
            print(f"{question} {turn}", end="")
            return Reply(f"{question} {turn}", "eos")

        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        session = ChatSession(conversation, answer, context=context, max_new_tokens=9)  # type: ignore[arg-type]
        return session.run(), conversation

    return run


def test_commands(chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.jsonl"
    status, conversation = chat(
        f"/save {path}\n/system Be kind.\none\n\n two\n/nonsense\n/save\n/save {path}\n/help\n/reset\n"
        f"three\n/save {path}\n/save {tmp_path}\n/system\n/exit\nnever\n"
    )
    assert status == ExitStatus.DONE
    printed = capsys.readouterr()
    assert printed.out == "first 0\nagain 1\nfirst 2\n"
    for text in ("nothing to save", "system message is set", "no command /nonsense", "needs a file",
                 "/reset  ", "is empty", "cannot write", "no system message"):  # fmt: skip
        assert text in printed.err
    assert conversation.turns == [("three", "first 2")] and conversation.system is None
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert [[m["content"] for m in row] for row in rows] == [
        ["Be kind.", "one", "first 0", "two", "again 1"], ["Be kind.", "three", "first 2"],
    ]  # fmt: skip


def test_an_interrupt_ends_the_reply_alone(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    status, conversation = chat("one\nstop\ntwo\n", interrupting=True)
    assert status == ExitStatus.DONE and signal.getsignal(signal.SIGINT) is before
    assert conversation.turns == [("one", "first 0"), ("stop", "half"), ("two", "again 2")]
    assert "stopped" in capsys.readouterr().err


def test_an_interrupt_between_replies_leaves(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "cs336_alignment.evaluation.chat_session.ChatSession._command",
        lambda *_: signal.raise_signal(signal.SIGINT),
    )
    status, conversation = chat("one\n/help\ntwo\n")
    assert status == ExitStatus.INTERRUPTED and len(conversation.turns) == 1


def test_a_full_context_is_told_and_nothing_is_dropped(
    chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    status, conversation = chat("one\n" + "much " * 80 + "\n/reset\ntwo\n", context=150)
    assert status == ExitStatus.DONE
    assert "/reset begins anew" in capsys.readouterr().err
    assert [question for question, _ in conversation.turns] == ["two"]


def test_a_template_that_refuses_or_ignores(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    status, conversation = chat("/system x\none\n")
    assert status == ExitStatus.DONE and len(conversation.turns) == 1
    assert "no system" in capsys.readouterr().err
    tokenizer.chat_template = (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    chat("/system x\n")
    assert "ignores a system message" in capsys.readouterr().err
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        Conversation(tokenizer, None)
