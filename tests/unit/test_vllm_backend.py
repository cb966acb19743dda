"""The vLLM adapter, against a stand-in.

vLLM needs a GPU and a torch of its own, so it cannot be installed beside the tests. `StandIn` has the
part of its documented interface that is used: `LLM(model=…, …).generate(prompts, sampling_params,
use_tqdm=…)` with prompts as `{"prompt_token_ids": …}` and one `SamplingParams` each, giving objects
whose `outputs[0]` has `token_ids`, `finish_reason` and `stop_reason`. Like vLLM it refuses keywords
that it does not know. It decodes with the same tiny model as `LocalGenerator`, so the responses can be
compared with those.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.evaluation.generate import LocalGenerator
from cs336_alignment.evaluation.sampling import Request, Sampling
from cs336_alignment.evaluation.vllm_backend import VllmGenerator
from cs336_alignment.model.loading import eos_ids, load_model
from cs336_alignment.model.source import resolve_model

SOURCE = resolve_model("builtin:arithmetic", None, False)


@dataclass
class StandInParams:
    n: int
    seed: int
    temperature: float
    top_p: float
    max_tokens: int
    min_tokens: int
    stop: list[str] | None
    stop_token_ids: list[int] | None
    include_stop_str_in_output: bool
    skip_special_tokens: bool


@pytest.fixture(scope="module")
def model() -> Any:
    model = load_model(SOURCE, random_init=True, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SOURCE.location)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Install the stand-in as `vllm`; what engines were made with is noted."""
    made: list[dict[str, Any]] = []

    class StandIn:
        def __init__(
            self, model: str, *, revision: str | None, tokenizer_revision: str | None, dtype: str,
            trust_remote_code: bool, max_num_seqs: int, max_model_len: int, seed: int,
        ) -> None:  # fmt: skip
            made.append(dict(locals()))

        def generate(self, prompts: Any, sampling_params: Any, *, use_tqdm: bool) -> list[Any]:
            return [self.one(p, s) for p, s in zip(prompts, sampling_params, strict=True)]

        def one(self, prompt: dict[str, list[int]], params: StandInParams) -> Any:
            assert params.n == 1 and params.include_stop_str_in_output
            assert (
                not params.skip_special_tokens and tokenizer.eos_token_id in params.stop_token_ids
            )
            made[-1].setdefault("seeds", []).append(params.seed)
            sampling = Sampling(
                params.max_tokens,
                params.min_tokens,
                params.temperature,
                params.top_p,
                tuple(params.stop or ()),
            )
            request = Request(prompt["prompt_token_ids"], params.seed)
            (found,) = LocalGenerator(model, tokenizer, batch_size=1).generate([request], sampling)
            reason = {"eos": tokenizer.eos_token_id, "stop": "a stop string", "length": None}[
                found.stopped
            ]
            output = SimpleNamespace(
                token_ids=list(found.token_ids), stop_reason=reason, text="unused",
                finish_reason="length" if found.stopped == "length" else "stop",
            )  # fmt: skip
            return SimpleNamespace(outputs=[output])

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = StandIn, StandInParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return made


def generator_of(tokenizer: Any, model: Any, dtype: Any = torch.bfloat16) -> VllmGenerator:
    return VllmGenerator(
        SOURCE,
        tokenizer,
        eos=eos_ids(model.generation_config, tokenizer),
        dtype=dtype,
        batch_size=3,
        longest=64,
    )


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=12, min_new_tokens=2),
        Sampling(max_new_tokens=9, stop=()),
        Sampling(max_new_tokens=30, temperature=2.0, top_p=0.99),
    ],
)
def test_responses_are_those_of_the_local_generator(
    sampling: Sampling, engines: list[dict[str, Any]], tokenizer: Any, model: Any
) -> None:
    requests = [Request(tokenizer(f"{i} + 1 = ?")["input_ids"], seed=i) for i in range(8)]
    if sampling.stop:  # something that the first response says
        said = (
            LocalGenerator(model, tokenizer, batch_size=8).generate(requests[:1], sampling)[0].text
        )
        sampling = replace(sampling, stop=(said[len(said) // 2 : len(said) // 2 + 2], "never"))
    done: list[int] = []
    found = generator_of(tokenizer, model).generate(requests, sampling, advance=done.append)
    expected = LocalGenerator(model, tokenizer, batch_size=1).generate(requests, sampling)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.text, ours.token_ids, ours.stopped) == (
            theirs.text,
            theirs.token_ids,
            theirs.stopped,
        )
        assert ours.length == theirs.length and ours.token_entropy is None
    assert sum(done) == 8 and engines[0]["seeds"] == list(range(8))
    assert (engines[0]["dtype"], engines[0]["max_num_seqs"]) == ("bfloat16", 3)
    assert engines[0]["max_model_len"] == 64
    assert (found[0].stopped == "stop") == bool(sampling.stop)


def test_precision_and_what_goes_wrong(
    engines: list[dict[str, Any]], tokenizer: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = generator_of(tokenizer, model, None)
    assert engines[0]["dtype"] == "float32"
    output = SimpleNamespace(token_ids=[5], finish_reason="abort", stop_reason=None)
    generator._engine = SimpleNamespace(
        generate=lambda *_, **__: [SimpleNamespace(outputs=[output])]
    )
    with pytest.raises(UserError, match="abort"):
        generator.generate([Request([5], 0)], Sampling())

    def cannot(**_: Any) -> None:
        raise RuntimeError("no GPU")

    sys.modules["vllm"].LLM = cannot  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="no GPU") as caught:
        generator_of(tokenizer, model)
    assert caught.value.code == "R351"
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="needs vLLM") as caught:
        generator_of(tokenizer, model)
    assert caught.value.status == ExitStatus.BAD_CONFIG and "pip install vllm" in str(caught.value)
