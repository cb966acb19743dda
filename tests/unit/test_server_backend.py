"""A server is asked as it understands, and what it answers is what the model at hand would give."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoTokenizer

from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.evaluation import server_client
from cs336_alignment.evaluation.sampling import Generation, Request, Sampling
from cs336_alignment.evaluation.server_answers import (
    Answer,
    NoAnswer,
    read_answer,
    to_generation,
)
from cs336_alignment.evaluation.server_client import ServerClient
from cs336_alignment.evaluation.server_dialect import Dialect, learn
from cs336_alignment.evaluation.server_generator import PromptForms, ServerGenerator
from cs336_alignment.model.source import resolve_model
from tests.fake_server import EXTRAS, FakeServer, words_of

SAMPLING = Sampling(max_new_tokens=40)
STRICT = frozenset(EXTRAS)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve_model("builtin:arithmetic", None, False).location)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "FIRST_WAIT", 0.01)


def client_of(server: FakeServer, **options: Any) -> ServerClient:
    defaults: dict[str, Any] = {"key": None, "timeout": 5.0, "retries": 2, "connections": 8}
    return ServerClient(server.url, **defaults | options)


def learned(
    server: FakeServer, tokenizer: Any, sampling: Sampling = SAMPLING, **options: Any
) -> Dialect:
    options = {"model": None, "api": "completions", **options}
    prompt = PromptForms(tokenizer)(tokenizer("1 + 1 =")["input_ids"])
    return learn(client_of(server), prompt=prompt, sampling=sampling, **options)


def generator_of(
    server: FakeServer, tokenizer: Any, dialect: Dialect, **options: Any
) -> ServerGenerator:
    own = {k: options.pop(k) for k in ("warn", "concurrency") if k in options}
    return ServerGenerator(
        client_of(server, **options), dialect, tokenizer, forms=PromptForms(tokenizer),
        eos=[tokenizer.eos_token], **{"concurrency": 4, **own},
    )  # fmt: skip


def requests_of(tokenizer: Any, count: int = 12) -> list[Request]:
    return [Request(tokenizer(f"{i} + 1 =")["input_ids"], seed=2**40 + i) for i in range(count)]


@pytest.mark.parametrize(
    ("server", "options", "as_ids", "stops"),
    [
        (FakeServer(), "engine", True, "kept"),
        (FakeServer(stops="told"), "engine", True, "told"),
        (FakeServer(takes_ids=False), "engine", False, "kept"),
        (FakeServer(refuses=STRICT, takes_ids=False), "generation_config", False, "kept"),
        (FakeServer(refuses=STRICT | {"generation_config"}), "plain", True, "kept"),
        (
            FakeServer(refuses=STRICT | {"generation_config"}, stops="dropped"),
            "plain",
            True,
            "unsent",
        ),
    ],
)
def test_every_dialect_gives_the_same(
    server: FakeServer, options: str, as_ids: bool, stops: str, tokenizer: Any
) -> None:
    requests = requests_of(tokenizer)
    with server.running():
        dialect = learned(server, tokenizer)
        assert (dialect.options, dialect.as_ids, dialect.stops) == (options, as_ids, stops)
        assert bool(dialect.notes) == (stops == "unsent")
        server.delay = 0.1  # long enough for the requests to meet
        done: list[int] = []
        kept: dict[int, Generation] = {}
        found = generator_of(server, tokenizer, dialect).generate(
            requests, SAMPLING, advance=done.append, on_done=kept.__setitem__
        )
    assert sum(done) == len(requests) and [kept[i] for i in range(12)] == found
    for request, generation in zip(requests, found, strict=True):
        prompt = request.prompt_ids if as_ids else tokenizer.decode(request.prompt_ids)
        assert generation.text == words_of(prompt, 0).removesuffix(" and more")
        assert generation.stopped == "stop" and generation.token_entropy is None
        if stops == "kept":
            assert generation.length == generation.text.count(" ")  # as it was counted there
    assert 1 < server.most_at_once <= 4


def test_seeds_temperature_and_lengths(tokenizer: Any) -> None:
    sampling = Sampling(max_new_tokens=5, temperature=0.7, top_p=0.9, min_new_tokens=2, stop=())
    requests = requests_of(tokenizer)
    with FakeServer().running() as server:
        dialect = learned(server, tokenizer, sampling)
        generator = generator_of(server, tokenizer, dialect)
        first, second = (generator.generate(requests, sampling) for _ in range(2))
        asked = server.bodies[-len(requests) :]
    assert first == second and {g.stopped for g in first} == {"length"}
    assert {g.length for g in first} == {5}
    assert len({body["seed"] for body in asked}) == len(requests)
    assert all(0 <= body["seed"] < 2**31 for body in asked)
    body = asked[0]
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.7, 0.9, 5)
    assert (body["min_tokens"], body["top_k"], body["repetition_penalty"]) == (2, -1, 1.0)
    assert "stop" not in body
    # `transformers serve` samples for its generation_config alone.
    body = replace(dialect, options="generation_config").body(
        PromptForms(tokenizer)([5]), sampling, 1
    )
    assert "temperature" not in body and '"do_sample": true' in body["generation_config"]
    assert '"min_new_tokens": 2' in body["generation_config"]


def test_what_the_start_refuses(tokenizer: Any) -> None:
    def error_of(server: FakeServer, sampling: Sampling = SAMPLING, **options: Any) -> UserError:
        with server.running(), pytest.raises(UserError) as caught:
            learned(server, tokenizer, sampling, **options)
        return caught.value

    several = error_of(FakeServer(models=("a", "b")))
    assert several.code == "R345" and several.got == "a, b"
    assert error_of(FakeServer(models=())).code == "R345"
    missing = error_of(FakeServer(endpoints=("/v1/chat/completions",)))
    assert missing.status == ExitStatus.BAD_CONFIG and "evaluation.server_api=chat" in str(missing)
    assert "/completions" in str(missing) and "/chat/completions" in str(missing)
    wrong = error_of(FakeServer(), model="other")
    assert "does not exist" in str(wrong) and "evaluation.server_model" in str(wrong)
    assert error_of(FakeServer(samples=True)).code == "R347"
    secret = error_of(FakeServer(key="hidden"))
    assert "OPENAI_API_KEY" in str(secret) and "hidden" not in str(secret)
    least = replace(SAMPLING, min_new_tokens=3)
    poor = error_of(FakeServer(refuses=STRICT | {"generation_config"}), least)
    assert poor.code == "C104" and "min_new_tokens" in str(poor)
    down = FakeServer()
    with down.running():
        pass
    with pytest.raises(UserError) as caught:
        learned(down, tokenizer)
    assert caught.value.code == "R341" and caught.value.status == ExitStatus.IO
    assert down.url in str(caught.value) and "vllm serve" in str(caught.value)
    # A minimum that is ignored shows in the responses.
    with FakeServer().running() as server:
        dialect = learned(server, tokenizer, least)
        with pytest.raises(UserError, match="below"):
            generator_of(server, tokenizer, dialect).generate(
                requests_of(tokenizer), Sampling(max_new_tokens=90, min_new_tokens=80)
            )


def test_a_start_that_is_told(tokenizer: Any) -> None:
    with FakeServer(samples=True).running() as server:
        dialect = learned(server, tokenizer, replace(SAMPLING, temperature=1.0))
    assert any("does not repeat" in note for note in dialect.notes)
    with FakeServer(context=77, key="k").running() as server:
        prompt = PromptForms(tokenizer)([5, 6])
        dialect = learn(
            client_of(server, key="k"), model=None, api="chat", prompt=prompt, sampling=SAMPLING
        )
    assert dialect.context == 77 and dialect.api == "chat"
    loading = FakeServer(fault=lambda n: (503, {"error": "loading"}) if n < 2 else None)
    with loading.running():
        assert learned(loading, tokenizer).as_ids


PASSING = {
    "busy": lambda n: (429, {"error": {"message": "slow down"}}, {"retry-after": "0"}),
    "broken": lambda n: (500, b"oops"),
    "loading": lambda n: (503, b""),
    "gone": lambda n: "reset",
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_waited_for(name: str, tokenizer: Any) -> None:
    requests, told = requests_of(tokenizer), []
    with FakeServer().running() as server:
        dialect = learned(server, tokenizer)
        start = len(server.bodies)
        server.fault = lambda n: PASSING[name](n) if (n - start) % 3 == 1 else None
        generator = generator_of(server, tokenizer, dialect, retries=8, tell=told.append)
        assert len(generator.generate(requests, SAMPLING)) == len(requests)
    assert len(server.bodies) - start > len(requests)
    assert len(told) == 1 and "try 2 of 9" in told[0]  # one line, not one a request


def test_retry_after_is_honoured(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    answers = iter([(503, {}, {"retry-after": "7"}), (503, {}, {"retry-after": "Mon, 01 Jan 2001 00:00:00 GMT"}),
                    (503, {}, {"retry-after": "nonsense"}), (503, {}, {"retry-after": "86400"})])  # fmt: skip
    with FakeServer(fault=lambda _: next(answers)).running() as server:
        client = client_of(server, retries=9)
        with pytest.raises(UserError, match="86,400") as caught:
            client.insist("completions", {}, gave_up=lambda s: bool(waits.append(s)))
    assert caught.value.code == "R342" and len(waits) == 3
    assert waits[0] == 7.0 and max(waits[1:]) <= 0.04
    monkeypatch.setattr(server_client, "FIRST_WAIT", 8.0)
    with FakeServer(fault=lambda _: (429, {})).running() as server:
        waits.clear()
        with pytest.raises(UserError, match="429"):
            client_of(server, retries=6).insist(
                "completions", {}, gave_up=lambda s: bool(waits.append(s))
            )
    bounds = [8, 16, 32, 60, 60, 60]
    assert len(waits) == 6 and all(b / 2 <= w <= b for w, b in zip(waits, bounds, strict=True))


def whole(**changes: Any) -> dict[str, Any]:
    choice = {"text": "x", "finish_reason": "stop", **changes.pop("choice", {})}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, **changes.pop("usage", {})}
    return {"model": "tiny", "choices": [choice], "usage": usage, **changes}


RUBBISH = {
    "no JSON": (200, b"<html>hello</html>"),
    "no object": (200, [1, 2]),
    "no choices": (200, {"model": "tiny"}),
    "empty choices": (200, whole(choices=[])),
    "no text": (200, whole(choice={"text": None})),
    "finish_reason": (200, whole(choice={"finish_reason": "content_filter"})),
    "NaN": (200, b'{"model": "tiny", "choices": [{"text": "x", "finish_reason": "stop"}], "usage": {"completion_tokens": NaN}}'),
    "another model": (200, whole(model="huge")),
    "too long": (200, whole(usage={"completion_tokens": 41})),
    "tool_calls": (200, whole(choice={"message": {"content": None, "tool_calls": [1]}})),
    "reasoning": (200, whole(choice={"message": {"content": "4", "reasoning_content": "2 + 2"}})),
}  # fmt: skip


@pytest.mark.parametrize("name", RUBBISH)
def test_rubbish_is_an_error_and_loses_nothing(name: str, tokenizer: Any) -> None:
    kept: dict[int, Generation] = {}
    with FakeServer().running() as server:
        dialect = learned(server, tokenizer)
        start = len(server.bodies)
        server.fault = lambda n: RUBBISH[name] if n - start == 7 else None
        with pytest.raises(UserError) as caught:
            generator_of(server, tokenizer, dialect).generate(
                requests_of(tokenizer), SAMPLING, on_done=kept.__setitem__
            )
    assert caught.value.code == "R344" and caught.value.status == ExitStatus.IO
    assert "the same command goes on" in str(caught.value)
    assert len(kept) >= 4


def test_a_slow_server_and_one_that_refuses(tokenizer: Any) -> None:
    with FakeServer().running() as server:
        dialect = learned(server, tokenizer)
        generator = generator_of(server, tokenizer, dialect, timeout=0.2, retries=1)
        server.delay = 1.0
        with pytest.raises(UserError, match="no answer within") as caught:
            generator.generate(requests_of(tokenizer, 2), SAMPLING)
        assert caught.value.code == "R342" and "evaluation.server_timeout" in str(caught.value)
        server.delay, server.fault = 0.0, lambda _: (400, {"error": {"message": "too long"}})
        asked = len(server.bodies)
        with pytest.raises(UserError, match="refuses") as caught:
            generator.generate(requests_of(tokenizer, 1), SAMPLING)
        assert caught.value.got == "400 Bad Request too long" and len(server.bodies) == asked + 1


def test_a_server_that_never_comes_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeServer(drip=0.05).running() as server:
        with pytest.raises(UserError, match="no whole answer within"):
            client_of(server, timeout=0.3, retries=0).insist("completions", {"model": "?"})
        server.drip = 0.0
        monkeypatch.setattr(server_client, "MOST_BYTES", 10)
        with pytest.raises(UserError, match="larger than 10 bytes"):
            client_of(server).ask("models")


@pytest.mark.parametrize("key", ["sk-se cret\nx", "sk-s\u00e9cret"])
def test_a_key_that_no_header_takes_is_refused_and_not_shown(key: str) -> None:
    with FakeServer(key="sk-secret").running() as server:
        with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
            client_of(server, key=key)
        assert caught.value.code == "C148" and "sk-" not in str(caught.value)
        body = {"model": "tiny", "prompt": "x", "seed": 0, "max_tokens": 2}
        assert client_of(server, key="sk-secret\n").ask("completions", body)["choices"]


def test_a_stop_does_not_wait_for_the_server(tokenizer: Any) -> None:
    kept: dict[int, Generation] = {}

    def stop(_: int) -> None:
        time.sleep(0.5)  # meanwhile others come, which are not lost either
        server.delay = 5.0
        raise KeyboardInterrupt

    with FakeServer(delay=0.05).running() as server:
        generator = generator_of(server, tokenizer, learned(server, tokenizer))
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            generator.generate(
                requests_of(tokenizer), SAMPLING, advance=stop, on_done=kept.__setitem__
            )
        assert len(kept) > 1 and time.monotonic() - begin < 5.0


def test_other_tokens_of_a_prompt_are_told(tokenizer: Any) -> None:
    lines: list[str] = []
    with FakeServer(takes_ids=False).running() as server:  # it counts characters
        dialect = learned(server, tokenizer)
        generator_of(server, tokenizer, dialect, warn=lines.append).generate(
            requests_of(tokenizer), SAMPLING
        )
    assert len(lines) == 1 and "tokenizer makes" in lines[0]


def test_ends_of_texts(tokenizer: Any) -> None:
    def made(text: str, sampling: Sampling = SAMPLING, **fields: Any) -> tuple[str, int, str]:
        answer = Answer(**{"text": text, "cut": False, "matched": None, "num_tokens": None,
                           "num_prompt_tokens": None, **fields})  # fmt: skip
        found = to_generation(answer, sampling, tokenizer, [tokenizer.eos_token])
        return found.text, found.length, found.stopped

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    answer = "4 </answer>"
    assert made(answer, num_tokens=9) == (answer, 9, "stop")
    assert made(answer + "\n\n", num_tokens=9) == (answer, count(answer), "stop")  # it ran on
    assert made("4 ", matched="</answer>", num_tokens=9) == (answer, 9, "stop")
    assert made(answer, cut=True, num_tokens=40) == (answer, 40, "stop")
    assert made("4 </ans", cut=True, num_tokens=40) == ("4 </ans", 40, "length")
    assert made("4 " + tokenizer.eos_token) == ("4 ", count("4 ") + 1, "eos")
    assert made("4 ", matched=tokenizer.eos_token, num_tokens=3) == ("4 ", 3, "eos")
    assert made("", num_tokens=1) == ("", 1, "eos")
    # A stop string that is over before the minimum does not end a response.
    least = Sampling(max_new_tokens=40, min_new_tokens=count(answer) + 2)
    twice = answer + " 5 </answer>"
    assert made(twice, least) == (twice, count(twice), "stop")
    assert made(twice) == (answer, count(answer), "stop")


def test_a_model_may_have_a_longer_name() -> None:
    assert read_answer(whole(model="tiny@main"), "tiny").text == "x"
    with pytest.raises(NoAnswer, match="comes from the model"):
        read_answer(whole(model="tin"), "tiny")
