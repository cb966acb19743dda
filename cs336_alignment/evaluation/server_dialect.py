"""What an OpenAI-compatible server understands, found out by asking it before anything counts on
it.

Servers differ in what the standard leaves open: whether a prompt may be token ids, which further
options there are, what becomes of the stop string. Nothing here goes by a server's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from cs336_alignment.errors import UserError
from cs336_alignment.evaluation.sampling import Sampling
from cs336_alignment.evaluation.server_answers import Answer, NoAnswer, read_answer
from cs336_alignment.evaluation.server_client import (
    Refused,
    ServerClient,
    Unreachable,
    rubbish,
)

PATHS = {"completions": "completions", "chat": "chat/completions"}
TRIAL_TOKENS = 24
SEED_BITS = 31  # some servers take no wider seed
MISSING = (404, 405, 501)
FORBIDDEN = (401, 403)


@dataclass(frozen=True)
class Prompt:
    """A prompt in the forms that a server may take.

    Attributes:
        ids: its tokens.
        text: without the special prefix that a tokenizer adds by itself.
        messages: of the conversation that it renders, or one of the user.
        tools: of the conversation.
    """

    ids: Sequence[int]
    text: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None


@dataclass(frozen=True)
class Dialect:
    """How one server is asked.

    Attributes:
        model: as it calls it.
        api: `completions` or `chat`.
        options: `engine`: those of vLLM and SGLang; `generation_config`: that of `transformers
            serve`; `plain`: OpenAI's alone.
        as_ids: whether a prompt is sent as token ids.
        stops: whether stop strings are `kept` in the text, are left out and `told`, or must not be
            sent, since the end would be unknown: `unsent`.
        context: tokens of prompt and response at most; None: it does not tell.
        notes: lines of what the trial showed and people must know.
    """

    model: str
    api: str
    options: Literal["engine", "generation_config", "plain"]
    as_ids: bool
    stops: Literal["kept", "told", "unsent"] = "unsent"
    context: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Of the endpoint, behind the address."""
        return PATHS[self.api]

    def body(self, prompt: Prompt, sampling: Sampling, seed: int) -> dict[str, Any]:
        """Make the request for one response."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.max_new_tokens,
            "seed": seed % 2**SEED_BITS,
        }
        if self.api == "chat":
            body["messages"] = list(prompt.messages)
            if prompt.tools:
                body["tools"] = list(prompt.tools)
        else:
            body["prompt"] = list(prompt.ids) if self.as_ids else prompt.text
        if sampling.stop and self.stops != "unsent":
            body["stop"] = list(sampling.stop)
        if self.options == "generation_config":
            # It takes `temperature` and does not sample for it; and has defaults of the model.
            body["generation_config"] = json.dumps(_generation_config(sampling))
            return body
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if self.options == "engine":
            body |= _engine_options(sampling)
        return body

    def describe(self) -> str:
        """Say in a line how the server is asked."""
        sent = "token ids" if self.as_ids else "text"
        if self.api == "chat":
            sent = "messages, which the server's chat template renders"
        return f"/{self.path}: prompts as {sent}"


def _engine_options(sampling: Sampling) -> dict[str, Any]:
    options: dict[str, Any] = {
        "include_stop_str_in_output": True,  # vLLM
        "no_stop_trim": True,  # SGLang
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        # Otherwise the model's generation_config.json decides.
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    return options | ({"min_tokens": sampling.min_new_tokens} if sampling.min_new_tokens else {})


def _generation_config(sampling: Sampling) -> dict[str, Any]:
    options: dict[str, Any] = {"do_sample": sampling.temperature > 0, "repetition_penalty": 1.0}
    if sampling.temperature > 0:
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        options |= drawn
    return options | (
        {"min_new_tokens": sampling.min_new_tokens} if sampling.min_new_tokens else {}
    )


def learn(
    client: ServerClient, *, model: str | None, api: str, prompt: Prompt, sampling: Sampling
) -> Dialect:
    """Find out how a server is asked: a few short responses to one prompt.

    Args:
        client: of the server.
        model: its name there; None: the one that the server lists.
        api: `completions` or `chat`.
        prompt: one that will be asked.
        sampling: that will be asked for.

    Raises:
        UserError: it is not there (74), lists several models or none, has no such endpoint, refuses
            the request, or samples where greedy responses were asked for (78).
    """
    try:
        listed = _listed(client, needed=model is None)
        name = model if model is not None else _the_one(listed, client)
        trial = replace(sampling, max_new_tokens=min(TRIAL_TOKENS, sampling.max_new_tokens))
        trial = replace(trial, min_new_tokens=min(sampling.min_new_tokens, trial.max_new_tokens))
        dialect, first = _try_forms(client, Dialect(name, api, "plain", False), prompt, trial)
        if sampling.min_new_tokens and dialect.options == "plain":
            raise UserError(
                "C104",
                "evaluation.min_new_tokens and evaluation.backend=server do not combine here",
                got=f"{client.url} takes no such option",
                hint="evaluation.min_new_tokens=0",
            )
        dialect = _see_repeats(client, dialect, prompt, trial, first)
        dialect = _see_stops(client, dialect, prompt, trial)
    except Unreachable as failure:
        raise client.down(failure) from failure
    except NoAnswer as failure:
        raise rubbish(client.url, str(failure), "") from failure
    except Refused as refused:
        raise refusal(client, Dialect(model or "", api, "plain", False), refused) from refused
    return replace(dialect, context=_context(listed, name))


def _listed(client: ServerClient, *, needed: bool) -> list[Mapping[str, Any]]:
    try:
        answer = client.ask("models")
        models = answer["data"]
        if not all(isinstance(each["id"], str) for each in models):
            raise TypeError
    except (Refused, KeyError, TypeError) as failure:
        if not needed:
            return []
        raise UserError(
            "R345",
            f"the server {client.url} does not list its models",
            got=str(failure) if isinstance(failure, Refused) else "an answer without their names",
            hint="evaluation.server_model=MODEL, as the server was started with",
        ) from failure
    return list(models)


def _the_one(listed: Sequence[Mapping[str, Any]], client: ServerClient) -> str:
    names = [str(each["id"]) for each in listed]
    if len(names) != 1:
        raise UserError(
            "R345",
            f"the server {client.url} lists {len(names)} models, and one is asked",
            got=", ".join(names) or "none",
            hint=f"evaluation.server_model={names[0] if names else 'NAME'}",
        )
    return names[0]


def _context(listed: Sequence[Mapping[str, Any]], name: str) -> int | None:
    found = next((each.get("max_model_len") for each in listed if each["id"] == name), None)
    return found if isinstance(found, int) and found > 0 else None


def _try_forms(
    client: ServerClient, plain: Dialect, prompt: Prompt, sampling: Sampling
) -> tuple[Dialect, Answer]:
    """Try the forms of a request, the one that says most first."""
    ids = (True, False) if plain.api == "completions" else (False,)
    last: Refused | None = None
    for options, as_ids in product(("engine", "generation_config", "plain"), ids):
        if options == "generation_config" and as_ids:
            continue
        dialect = replace(plain, options=options, as_ids=as_ids)  # type: ignore[arg-type]
        try:
            return dialect, _answer(client, dialect, prompt, sampling)
        except Refused as refused:
            if refused.status in (*MISSING, *FORBIDDEN):
                raise refusal(client, dialect, refused) from refused
            if refused.status != 500 and refused.status not in range(400, 500):
                raise
            last = refused
    assert last is not None
    raise refusal(client, plain, last) from last


def _answer(
    client: ServerClient, dialect: Dialect, prompt: Prompt, sampling: Sampling, seed: int = 0
) -> Answer:
    body = dialect.body(prompt, sampling, seed)
    try:
        answer = client.ask(dialect.path, body)
    except (Refused, Unreachable) as failure:
        if isinstance(failure, Refused) and failure.status not in (429, 502, 503, 504):
            raise
        answer = client.insist(dialect.path, body)  # it is loading, or busy; it was there before
    try:
        return read_answer(answer, dialect.model)
    except NoAnswer as failure:
        raise rubbish(client.url, str(failure), answer) from failure


def _see_repeats(
    client: ServerClient, dialect: Dialect, prompt: Prompt, sampling: Sampling, first: Answer
) -> Dialect:
    """See that the same request is answered the same."""
    said = [first.text]
    while len(said) < 3 and len(set(said)) == len(said):  # what it kept of a prompt may round
        said.append(_answer(client, dialect, prompt, sampling).text)
    if len(set(said)) < len(said):
        return dialect
    if sampling.temperature == 0:
        raise UserError(
            "R347",
            f"the server {client.url} samples, and greedy responses were asked for",
            got=" / ".join(repr(text[:40]) for text in said),
            hint="evaluation.temperature=0 needs a server that reads `temperature: 0`; one that "
            "does not can be asked with evaluation.temperature=1",
        )
    note = "the server does not repeat itself with a seed: another run gives other responses"
    return replace(dialect, notes=(*dialect.notes, note))


def _see_stops(
    client: ServerClient, dialect: Dialect, prompt: Prompt, sampling: Sampling
) -> Dialect:
    """See what becomes of a stop string: one that a greedy response holds is asked for."""
    if not sampling.stop:
        return dialect
    greedy = replace(sampling, temperature=0.0, top_p=1.0, stop=(), min_new_tokens=0)
    text = _answer(client, dialect, prompt, greedy).text
    for start in range(len(text) // 2, len(text) - 1):
        piece = text[start : start + 2]
        if piece.isascii() and piece.isprintable() and piece.strip() == piece:
            asking = replace(dialect, stops="told")
            answer = _answer(client, asking, prompt, replace(greedy, stop=(piece,)))
            if piece in answer.text:
                return replace(dialect, stops="kept")
            if answer.matched == piece:
                return asking
            break
    note = (
        "the server does not tell what ended a response, so no stop string is sent: it generates "
        "on to EOS or evaluation.max_new_tokens, and what stands behind a stop string is cut here"
    )
    return replace(dialect, notes=(*dialect.notes, note))


def refusal(client: ServerClient, dialect: Dialect, refused: Refused) -> UserError:
    """Make the error of a request that a server will not do (78)."""
    got, hint, expected = str(refused), None, None
    if refused.status in FORBIDDEN:
        hint = "set OPENAI_API_KEY in the environment"
    elif refused.status in MISSING:
        other = "chat" if dialect.api == "completions" else "completions"
        expected = f"POST {client.url}/{dialect.path}, and a model {dialect.model}"
        hint = (
            f"where there is only /{PATHS[other]}: evaluation.server_api={other}; where the model "
            "has another name: evaluation.server_model=NAME"
        )
    return UserError(
        "R343",
        f"the server {client.url} refuses the request to /{dialect.path}",
        expected=expected,
        got=got,
        hint=hint,
    )
