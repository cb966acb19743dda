"""The doctor passes what is right and fails what is broken, check by check."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from cs336_alignment.config import (
    ColumnsConfig,
    Config,
    DataConfig,
    LoggerConfig,
    ModelConfig,
    OptimizerConfig,
    SourceConfig,
    TrainerConfig,
)
from cs336_alignment.data import batching as data_batching
from cs336_alignment.data import noise as noise_module
from cs336_alignment.data.formats import Example
from cs336_alignment.data.splits import prepare_run
from cs336_alignment.data.tokenize import TokenizedExample, TokenRow
from cs336_alignment.errors import ExitStatus, Place
from cs336_alignment.model import attention
from cs336_alignment.model.loading import load_tokenizer
from cs336_alignment.model.objective import Objective
from cs336_alignment.model.source import resolve_model
from cs336_alignment.training import (
    checkpoint,
    doctor,
    loss,
    optimizer_check,
    snapshot,
    step,
    token_check,
)
from cs336_alignment.training.invariances import Finding, cut_short, in_training
from tests.conftest import build_dataset, build_model

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 512,
}  # fmt: skip
CONFIGS: dict[str, Callable[[int], PreTrainedConfig]] = {
    "llama": lambda size: LlamaConfig(vocab_size=size, attention_dropout=0.1, **SMALL),
    "qwen2": lambda size: Qwen2Config(vocab_size=size, **SMALL),
    "gemma2": lambda size: Gemma2Config(vocab_size=size, head_dim=8, **SMALL),
    "gpt2": lambda size: GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=512),
}  # fmt: skip


@pytest.fixture
def diagnose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Finding]]:
    """Run the doctor on a new small model, and give its findings by name."""

    def run(name: str, **sections: Any) -> dict[str, Finding]:
        tokenizer = load_tokenizer(resolve_model("builtin:arithmetic", None, False))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name](len(tokenizer)))
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        config = Config(
            ModelConfig(str(tmp_path / "model")),
            DataConfig(
                "builtin:arithmetic", max_train_examples=6, cache_dir=str(tmp_path / "cache")
            ),
            logger=LoggerConfig("none"),
            **sections,
        )
        seen: list[Finding] = []
        monkeypatch.setattr(doctor, "_show", lambda findings, console: seen.extend(findings))
        status = doctor.doctor(config)
        failed = any(finding.passed is False for finding in seen)
        assert status == (ExitStatus.INTERNAL if failed else ExitStatus.DONE)
        return {finding.name: finding for finding in seen}

    return run


Diagnose = Callable[..., dict[str, Finding]]


def failed(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if finding.passed is False}


@pytest.mark.parametrize("name", CONFIGS)
def test_healthy_architectures_pass(name: str, diagnose: Diagnose) -> None:
    findings = diagnose(name)
    assert failed(findings) == set()
    flat = findings["flat against padded, fp32"]
    if name == "gemma2":
        assert flat.passed is None and "soft-capped" in flat.text
    else:
        assert flat.passed and flat.difference is not None and flat.difference > 0
    assert len(findings) == (15 if name == "gemma2" else 17)


OPTIONS: dict[str, dict[str, Any]] = {
    "smoothed": {"trainer": TrainerConfig(label_smoothing=0.1, z_loss=0.01, neftune_alpha=5.0)},
    "dft": {"trainer": TrainerConfig(loss="dft", loss_normalization="constant", normalize_constant=7.0)},
    "muon": {"optimizer": OptimizerConfig(name="muon"), "trainer": TrainerConfig(ema_decay=0.9)},
    "schedule_free": {"optimizer": OptimizerConfig(name="schedule_free", layer_lr_decay=0.5)},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_of_the_config_are_checked(name: str, diagnose: Diagnose) -> None:
    findings = diagnose("llama", **OPTIONS[name])
    assert failed(findings) == set()
    more = set(findings) - {"optimizer adamw, saved and continued"}
    objective, noise = (
        "4 microbatches against one, the objective, fp32",
        "4 microbatches against one, noise on embeddings, fp32",
    )
    assert (objective in more) == (name in ("smoothed", "dft"))
    assert (noise in more) == (name == "smoothed")
    assert (f"optimizer {name}, saved and continued" in more) == (name in ("muon", "schedule_free"))


def test_a_wrong_objective_fails(diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Objective.slopes

    def slopes(self: Objective, *arguments: Any) -> Any:
        label, softmax, _ = original(self, *arguments)
        return label, softmax, None  # the spread share of the target gets no gradient

    monkeypatch.setattr(Objective, "slopes", slopes)
    assert failed(diagnose("llama", **OPTIONS["smoothed"])) == {
        f"4 microbatches against one, the objective, fp{bits}" for bits in (32, 64)
    }


def test_noise_that_depends_on_the_cut_fails(
    diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = noise_module.with_noise

    def by_place(batch: Any, ids: Any, lengths: Any, **options: Any) -> Any:
        options["alpha"] *= len(ids)
        return original(batch, ids, lengths, **options)

    monkeypatch.setattr(step, "with_noise", by_place)
    assert failed(diagnose("llama", **OPTIONS["smoothed"])) == {
        f"4 microbatches against one, noise on embeddings, fp{bits}" for bits in (32, 64)
    }


@pytest.mark.parametrize("name", ["muon", "schedule_free"])
def test_an_optimizer_that_forgets_fails(
    name: str, diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = optimizer_check.restore

    def forget(folder: Path, model: Any, optimizer: Any) -> Any:
        state = original(folder, model, optimizer)
        for kept in optimizer.state.values():
            for kind in kept.keys() & {"momentum_buffer", "totals"}:
                kept[kind].zero_()
        return state

    monkeypatch.setattr(optimizer_check, "restore", forget)
    found = failed(diagnose("llama", **OPTIONS[name]))
    assert found == {f"optimizer {name}, saved and continued"}


def test_flat_attention_that_ignores_borders_fails(
    diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = attention._grouped_attention

    def leaky(q: Any, k: Any, v: Any, layout: Any, *rest: Any) -> Any:
        return original(q, k, v, attention.FlatLayout.of([q.shape[2]]), *rest)

    monkeypatch.setattr(attention, "_grouped_attention", leaky)
    findings = failed(diagnose("llama"))
    assert "flat against padded, fp32" in findings
    assert "padded against plain transformers, fp32" not in findings


def test_a_prefix_that_gets_one_example_s_gradient_alone_fails(
    diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log-probs stay right; only the gradient tells."""

    def backward(ctx: Any, grad: Any) -> Any:
        _, own_index = ctx.saved_tensors
        return grad.index_select(0, own_index), None, None, None, None

    monkeypatch.setattr(attention._Shared, "backward", staticmethod(backward))
    findings = failed(diagnose("llama"))
    assert "shared prefix against padded, fp32" in findings
    assert "flat against padded, fp32" not in findings


def test_a_shifted_mask_fails(diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch) -> None:
    original = data_batching.collate

    def shifted(examples: Any, *, batching: Any) -> Any:
        batch = original(examples, batching=batching)
        index = (batch.response_index - 1).clamp(min=0)
        return data_batching.Microbatch(**{**vars(batch), "response_index": index})

    monkeypatch.setattr(step, "collate", shifted)
    assert "padded against plain transformers, fp32" in failed(diagnose("qwen2"))


def test_a_loss_that_drops_a_token_fails(
    diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loss.masked_normalize

    def careless(tensor: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        return original(tensor[:-1], mask[:-1], *rest, **options)

    monkeypatch.setattr(loss, "masked_normalize", careless)
    assert "padded against plain transformers, fp32" in failed(diagnose("llama"))


def test_a_checkpoint_that_loses_a_tensor_fails(
    diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = snapshot.module_tensors

    def forgetful(module: Any) -> Any:
        return dict(list(original(module).items())[1:])

    for module in (checkpoint, snapshot):
        monkeypatch.setattr(module, "module_tensors", forgetful)
    assert failed(diagnose("llama")) == {"checkpoint written and read"}


def test_a_checkpoint_file_that_lacks_a_tensor_fails(
    diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoint.write_safetensors

    def forgetful(path: Path, tensors: Any) -> Any:
        return original(path, dict(list(tensors.items())[1:]))

    monkeypatch.setattr(checkpoint, "write_safetensors", forgetful)
    findings = diagnose("llama")
    assert failed(findings) == {"checkpoint written and read"}
    assert "R205" in findings["checkpoint written and read"].text


LONG = " 2" * 15
TEXTS = "the rows' texts are the tokens trained"


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_data_step_whose_mask_is_shifted_fails(
    shift: int, diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every gradient agrees: all of them are computed from the same wrong mask."""

    def shifted(ids: Any, num_prompt: int, weight: float = 1.0, **_: Any) -> TokenRow:
        start, end = num_prompt + shift, len(ids) + min(shift, 0)
        each = [float(start <= i < end) for i in range(len(ids))]
        return TokenRow.of_weights(ids, each, weight)

    monkeypatch.setattr(TokenRow, "of_response", staticmethod(shifted))
    assert failed(diagnose("llama")) == {TEXTS}


def test_a_data_step_without_eos_fails(diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TokenRow.of_response

    def endless(ids: Any, *rest: Any, **more: Any) -> TokenRow:
        return original(ids[:-1], *rest, **more)

    monkeypatch.setattr(TokenRow, "of_response", staticmethod(endless))
    assert failed(diagnose("llama")) == {TEXTS}


def test_collation_that_drops_a_token_fails(
    diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = data_batching.collate

    def careless(examples: Any, *, batching: Any) -> Any:
        batch = vars(original(examples, batching=batching))
        names = ("response_index", "labels", "response_mask", "example_response_tokens")
        return data_batching.Microbatch(**{**batch, **{name: batch[name][:-1] for name in names}})

    for module in (step, doctor, token_check):
        monkeypatch.setattr(module, "collate", careless)
    assert failed(diagnose("llama")) >= {
        "padded against plain transformers, fp32", "log-probs against plain transformers",
        "padding hides no stop token",
    }  # fmt: skip


def test_a_wrong_constant_of_the_loss_by_sequence_fails(
    diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the gradient for every cut: only plain transformers shows it."""
    original = step.loss_weights

    def doubled(normalization: str, *rest: Any) -> Any:
        mask, constant = original(normalization, *rest)
        return mask, constant / (2 if normalization == "sequence" else 1)

    monkeypatch.setattr(step, "loss_weights", doubled)
    assert failed(diagnose("llama")) == {
        f"4 microbatches against one, loss by sequence, {dtype}" for dtype in ("fp32", "fp64")
    }


def test_an_unused_parameter_is_named_and_does_no_harm(
    diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = doctor.load_model

    def spare(*arguments: Any, **options: Any) -> Any:
        model = original(*arguments, **options)
        model.model.layers[0].spare = torch.nn.Parameter(torch.zeros(3))
        return model

    monkeypatch.setattr(doctor, "load_model", spare)
    findings = diagnose("llama")
    assert "layers.0.spare" in findings["every parameter has a gradient"].text
    assert failed(findings) == {"export read by plain transformers"}  # which knows no such tensor


def test_noise_of_training_mode_does_no_harm(
    diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routers of mixtures of experts have it, and it is no dropout that could be set to 0."""
    original = LlamaMLP.forward

    def noisy(self: Any, x: Any) -> Any:
        return original(self, x * (1 + 0.1 * torch.rand_like(x)) if self.training else x)

    monkeypatch.setattr(LlamaMLP, "forward", noisy)
    assert failed(diagnose("llama")) == set()


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": LONG}]},
    {"text": "1 + 1 =" + LONG},
    {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]},
    {"prompt": "1 + 1 =", "response": LONG},
], ids=lambda row: next(iter(row)))  # fmt: skip
@pytest.mark.parametrize(
    "options", [{}, {"train_on": "all"}, {"overlong": "truncate", "max_length": 20}], ids=str
)
def test_every_format_is_compared_with_its_texts(
    row: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    if "text" in row:
        options = {**options, "train_on": "all"}  # the only thing that text alone can be asked for
    if "input_ids" in row and options.get("train_on") == "all":
        pytest.skip("rows of tokens say themselves what is trained")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    tokenizer = load_tokenizer(resolve_model("builtin:arithmetic", None, False))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    data = DataConfig(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"), **options)
    config = Config(data=data)
    prepared = prepare_run(data, tokenizer, seed=0).train
    texts, padding = token_check.check_tokens(prepared, tokenizer, config, 4)
    assert texts.passed, texts.text
    assert padding.passed


def test_columns_of_a_source_and_of_all_data_are_taken_together(tmp_path: Path) -> None:
    path = str(tmp_path / "rows.jsonl")
    row = {"asked": "1 + 1 =", "said": LONG, "prompt": "2 + 2 =", "response": "4"}
    Path(path).write_text(json.dumps(row) + "\n")
    tokenizer = load_tokenizer(resolve_model("builtin:arithmetic", None, False))
    data = DataConfig(
        sources=[SourceConfig(path, columns=ColumnsConfig(prompt="asked"))],
        columns=ColumnsConfig(response="said"), cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    prepared = prepare_run(data, tokenizer, seed=0).train
    texts, _ = token_check.check_tokens(prepared, tokenizer, Config(data=data), 4)
    assert texts.passed, texts.text


def test_a_reply_without_its_end_is_seen(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve_model("builtin:arithmetic", None, False))
    reply, eos = tokenizer("2")["input_ids"], tokenizer.eos_token_id
    ids = [*tokenizer("1 + 1")["input_ids"], *reply, eos]
    messages = ({"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"})
    row = Example(Place("rows.jsonl", 1), messages=messages)

    def seen(end: int) -> str:
        mask = torch.zeros(len(ids), dtype=torch.bool)
        mask[len(ids) - len(reply) - 1 : end] = True
        example = TokenizedExample(torch.tensor(ids), mask, 0)
        return token_check.compare(example, row, tokenizer, Config())[0]

    assert seen(len(ids)) == ""
    assert "ends the last reply" in seen(len(ids) - 1)


def test_a_frozen_parameter_is_named(diagnose: Diagnose, monkeypatch: pytest.MonkeyPatch) -> None:
    original = doctor.load_model

    def frozen(*arguments: Any, **options: Any) -> Any:
        model = original(*arguments, **options)
        model.model.layers[0].mlp.up_proj.weight.requires_grad = False
        return model

    monkeypatch.setattr(doctor, "load_model", frozen)
    findings = diagnose("llama")
    assert failed(findings) == {"every parameter has a gradient"}
    assert "layers.0.mlp.up_proj" in findings["every parameter has a gradient"].text


def test_examples_are_cut_where_something_is_trained() -> None:
    long = TokenRow.of_response(list(range(90)), 60)
    data = build_dataset().of([long, TokenRow.of_response([1, 2, 3], 1)])
    cut = cut_short(data, 4, 20)
    assert len(cut) == 2 and cut.lengths.tolist() == [20, 3]
    assert cut[0].input_ids.tolist() == list(range(50, 70))
    assert cut[0].response_mask.tolist() == [False] * 10 + [True] * 10


def test_a_layer_recomputes_without_dropout() -> None:
    model = build_model("gpt2").eval()
    layer: Any = model.transformer.h[0]
    layer.dropout = 0.5  # a number that a forward passes on, as OPT's and Falcon's do
    with in_training([layer]) as calls:
        assert layer.training and layer.dropout == 0 and not layer.attn.training
        model(torch.arange(9)[None])
    assert len(calls) == 1 and not layer.training and layer.dropout == 0.5
