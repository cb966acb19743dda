"""Generation: each response is what decoding it alone gives, whatever else is in the making."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from cs336_alignment.config import EvaluationConfig
from cs336_alignment.errors import UserError
from cs336_alignment.evaluation.generate import LocalGenerator, draw
from cs336_alignment.evaluation.sampling import (
    Request,
    Sampling,
    doubtful_sampling,
    end_of_stop,
    request_seed,
)
from cs336_alignment.model.attention import FLAT_ATTENTION
from cs336_alignment.model.source import resolve_model
from cs336_alignment.sft import compute_entropy

WIDE = {
    "initializer_range": 0.5,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
ARCHITECTURES = {
    "llama": {**WIDE, "intermediate_size": 48, "num_key_value_heads": 2},
    "qwen2": {**WIDE, "intermediate_size": 48, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3, "attn_pdrop": 0.2},
    # Soft-capped scores and sliding windows: no slots.
    "gemma2": {**WIDE, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 7},
}  # fmt: skip
SLOTS = {"llama", "qwen2", "gpt2"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve_model("builtin:arithmetic", None, False).location)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    torch.manual_seed(3)
    config = CONFIG_MAPPING[request.param](
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, **ARCHITECTURES[request.param],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    # Gemma's softmax is in float32, where the mask of a float64 padding row is all -inf.
    return model if request.param == "gemma2" else model.double()


def requests_of(tokenizer: Any, count: int = 7, samples: int = 1) -> list[Request]:
    """Prompts of different lengths that begin alike, some of them the same."""
    texts = ["1 + 1 = ?" + " + 2" * (number % 5) for number in range(count)]
    return [
        Request(tokenizer(text)["input_ids"], request_seed(0, number, sample))
        for number, text in enumerate(texts)
        for sample in range(samples)
    ]


def alone(model: Any, request: Request, sampling: Sampling, eos: int) -> tuple[list[int], float]:
    """Decode without a cache, a batch or padding."""
    tokens: list[int] = []
    entropies = []
    generator = torch.Generator().manual_seed(request.seed)
    draws = torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64)
    while len(tokens) < sampling.max_new_tokens:
        with torch.no_grad():
            ids = torch.tensor([request.prompt_ids + tokens])
            logits = model(ids, use_cache=False).logits[:, -1]
        entropies.append(compute_entropy(logits).item())
        if len(tokens) < sampling.min_new_tokens:
            logits[:, eos] = float("-inf")
        if sampling.temperature == 0:
            tokens.append(int(logits.argmax()))
        else:
            one = draws[len(tokens)][None]
            tokens.append(int(draw(logits, one, sampling.temperature, sampling.top_p)))
        if tokens[-1] == eos:
            break
    return tokens, sum(entropies) / len(entropies)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=12, stop=()),
        Sampling(max_new_tokens=12, temperature=1.3, stop=(), min_new_tokens=3),
        Sampling(max_new_tokens=12, temperature=0.8, top_p=0.7, stop=()),
    ],
    ids=["greedy", "sampled", "top_p"],
)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_response_does_not_depend_on_its_batch(
    batch_size: int, sampling: Sampling, model: Any, tokenizer: Any
) -> None:
    requests = requests_of(tokenizer)
    generator = LocalGenerator(model, tokenizer, batch_size=batch_size)
    seen: list[int] = []
    kept: dict[int, Any] = {}
    generations = generator.generate(
        requests, sampling, advance=seen.append, on_done=kept.__setitem__
    )
    assert bool(generator._slots_work) == (model.config.model_type in SLOTS)
    assert sum(seen) == len(requests) and [kept[i] for i in range(len(kept))] == generations
    for request, generation in zip(requests, generations, strict=True):
        tokens, entropy = alone(model, request, sampling, tokenizer.eos_token_id)
        assert list(generation.token_ids) == tokens
        assert generation.length == len(tokens)
        assert generation.token_entropy == pytest.approx(
            entropy, rel=1e-4 if model.dtype == torch.float32 else 1e-9
        )
        ended = tokens[-1] == tokenizer.eos_token_id
        assert generation.stopped == ("eos" if ended else "length")
        assert generation.text == tokenizer.decode(tokens[: len(tokens) - ended])


@pytest.mark.parametrize("trained_flat", [False, True])
def test_a_sliding_window_counts_for_rows_that_are_longer(
    trained_flat: bool, tokenizer: Any
) -> None:
    torch.manual_seed(3)
    config = CONFIG_MAPPING["mistral"](
        vocab_size=len(tokenizer), sliding_window=14, num_key_value_heads=2, intermediate_size=48,
        eos_token_id=tokenizer.eos_token_id, **WIDE,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval().double()
    short, *_, long = sorted(requests_of(tokenizer, 5), key=lambda one: len(one.prompt_ids))
    sampling = Sampling(max_new_tokens=8, temperature=2.0, min_new_tokens=8, stop=())
    limit = 14 - len(short.prompt_ids)
    assert limit > 0 and len(long.prompt_ids) + 8 > 14
    want = alone(model, long, sampling, tokenizer.eos_token_id)
    before = FLAT_ATTENTION if trained_flat else model.config._attn_implementation
    model.set_attn_implementation(before)
    generator = LocalGenerator(model, tokenizer, batch_size=2)
    generator.generate([short], Sampling(max_new_tokens=limit, stop=()))
    assert generator._slots_work and model.config._attn_implementation == before
    (generation,) = generator.generate([long], sampling)
    assert list(generation.token_ids) == want[0]
    assert generation.token_entropy == pytest.approx(want[1], rel=1e-9)
    assert model.config._attn_implementation == before


def test_a_stop_string_ends_where_the_bytes_of_its_last_character_are_complete() -> None:
    assert end_of_stop("x答案", "x答\ufffd\ufffd", ("答案",)) == 3
    assert end_of_stop("x答案 答", "x答案 \ufffd", ("答案",)) is None
    assert end_of_stop("a.b", "a.", (".", "b", "a.b")) == 3


def test_the_model_is_left_as_it_was(model: Any, tokenizer: Any) -> None:
    before = model.config._attn_implementation
    model.train()
    LocalGenerator(model, tokenizer, batch_size=2).generate(
        requests_of(tokenizer, 2), Sampling(max_new_tokens=2)
    )
    assert model.training and model.config._attn_implementation == before
    model.eval()


def test_a_stop_string_counts_from_the_smallest_length_on(model: Any, tokenizer: Any) -> None:
    requests = requests_of(tokenizer)
    generator = LocalGenerator(model, tokenizer, batch_size=3)
    free = generator.generate(requests, Sampling(max_new_tokens=12, stop=()))
    stop = free[0].text[2:4]
    for least in (0, 5):
        rows = generator.generate(
            requests, Sampling(max_new_tokens=12, stop=(stop, "never"), min_new_tokens=least)
        )
        for row, whole in zip(rows, free, strict=True):
            if row.stopped == "stop":
                assert row.text.endswith(stop) and row.length >= least
                assert least or row.text == whole.text[: whole.text.index(stop) + len(stop)]
            elif least == 0:
                assert stop not in whole.text and row.token_ids == whole.token_ids
        assert rows[0].stopped == "stop" or least


def test_samples_of_one_prompt_differ_and_repeat(tokenizer: Any, model: Any) -> None:
    requests = requests_of(tokenizer, count=2, samples=4)
    sampling = Sampling(max_new_tokens=8, temperature=2.0, stop=())
    first, second = (
        LocalGenerator(model, tokenizer, batch_size=size).generate(requests, sampling)
        for size in (2, 8)
    )
    assert [g.token_ids for g in first] == [g.token_ids for g in second]
    assert len({g.token_ids for g in first[:4]}) > 1


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]]).expand(200_000, -1)
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8), (1.0, 1e-9)):
        p = (logits[0].double() / temperature).softmax(-1)
        if top_p < 1:
            kept = p.sort(descending=True).values.cumsum(-1)
            smallest = p.sort(descending=True).values[int((kept < top_p).sum())]
            p = p.where(p >= smallest, 0.0) / p[p >= smallest].sum()
        counts = Counter(draw(logits, uniform, temperature, top_p).tolist())
        for token, probability in enumerate(p.tolist()):
            assert counts[token] / 200_000 == pytest.approx(probability, abs=4e-3)
            assert probability or not counts[token]


def test_the_ends_of_the_unit_interval_draw_what_has_probability() -> None:
    logits = torch.tensor([[float("-inf"), 1.0, float("-inf"), 1.0, float("-inf")]]).repeat(2, 1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for top_p in (1.0, 0.99):
        assert draw(logits, ends, 1.0, top_p).tolist() == [1, 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_of_nan_is_an_error(temperature: float, tokenizer: Any, model: Any) -> None:
    broken = copy.deepcopy(model)
    broken.get_output_embeddings().weight.data[3] = float("nan")
    generator = LocalGenerator(broken, tokenizer, batch_size=2)
    with pytest.raises(UserError, match="NaN") as caught:
        generator.generate(requests_of(tokenizer), Sampling(4, temperature=temperature))
    assert caught.value.code == "R321" and "token 1" in str(caught.value)


def test_bad_prompts_are_named(tokenizer: Any, model: Any) -> None:
    generator = LocalGenerator(model, tokenizer, batch_size=2)
    with pytest.raises(ValueError, match=r"prompt 1 .* is empty"):
        generator.generate([Request([5], 0), Request([], 0)], Sampling())
    most = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=r"prompt 0 .* no position"):
        generator.generate([Request([5] * most, 0)], Sampling())


def test_options_that_do_nothing_are_told() -> None:
    told = doubtful_sampling(EvaluationConfig(num_samples=2, top_p=0.9, min_new_tokens=600))
    assert all(key in line for key, line in zip(("equal", "top_p", "cut"), told, strict=True))
    assert not doubtful_sampling(EvaluationConfig(temperature=1, top_p=0.9))
