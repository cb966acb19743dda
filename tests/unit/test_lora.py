"""Adapters against peft alone, their files, and everything that is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CTRLConfig,
    FalconConfig,
    PhimoeConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from cs336_alignment.config import LoraConfig, TrainerConfig
from cs336_alignment.errors import UserError
from cs336_alignment.model.adapters import adapter_layers, adapter_tensors, describe_adapter
from cs336_alignment.model.base_model import Base, weights_sha256
from cs336_alignment.model.loading import load_model
from cs336_alignment.model.lora import (
    add_adapter,
    copy_adapter,
    load_adapter,
    merge_adapter,
    wake_adapters,
)
from cs336_alignment.model.narrow import narrow_frozen, narrowed_to
from cs336_alignment.model.policy import Policy
from cs336_alignment.model.recompute import enable_checkpointing
from cs336_alignment.model.source import resolve_model
from cs336_alignment.model.trainable import freeze
from cs336_alignment.training.batching_choice import choose_batching, dropout_options
from cs336_alignment.training.export import export_model
from cs336_alignment.training.parallel import Processes
from cs336_alignment.training.reload_check import bit_sums, trained_sums
from cs336_alignment.training.step import Cut, accumulate_gradients
from tests.conftest import build_dataset, build_model
from tests.reference import dense_log_probs, dense_loss, relative_error

IDS = [*range(8), 10]
PREFIX = 19
CUTS = [
    Cut(None, 1, "flat"), Cut(None, 3, "flat"), Cut(30, None, "flat"), Cut(None, 2, "padded"),
    Cut(None, 1, "flat_shared_prefix"), Cut(None, 2, "flat_shared_prefix"),
]  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "names": {
        "target_modules": ["q_proj", "down_proj"],
        "modules_to_save": ["embed_tokens", "norm"],
    },
}
# Experts that are one parameter have no adapter, and can be trained whole.
MADE = [
    *(("llama", options) for options in KINDS.values()),
    *(("qwen3_moe", options) for options in ({}, {"modules_to_save": ["experts"]})),
]


@pytest.fixture
def tokenizer(tokenizer_of: Any) -> Any:
    return tokenizer_of()


def adapted(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> PreTrainedModel:
    """A model with adapters that do something."""
    model = build_model(name, dtype)
    base = Base("org/m", None, weights_sha256(model.named_parameters()))
    add_adapter(model, LoraConfig(r=4, **options), base, seed=0)
    wake_adapters(model)
    return model


def by_peft(model: PreTrainedModel, name: str, **options: Any) -> Any:
    """The same adapters in the same model by peft alone, with the same weights."""
    config = PeftLora(
        r=4, lora_alpha=8, target_modules=options.get("target_modules", "all-linear"),
        use_dora=options.get("dora", False), use_rslora=options.get("rslora", False),
        modules_to_save=model.peft_config["default"].modules_to_save, task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = get_peft_model(build_model(name), config)
    weights = {key: tensor.detach().clone() for key, tensor in adapter_tensors(model).items()}
    found = set_peft_model_state_dict(wrapped, weights)
    assert not found.unexpected_keys
    return wrapped


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


CASES: list[tuple[str, str, bool | str]] = [
    *((name, kind, False) for name in ("llama", "qwen2") for kind in KINDS),
    ("gpt2", "lora", False), ("gpt2", "head", True),
    ("llama", "lora", True), ("llama", "lora", "selective"),
    ("qwen2", "dora", True), ("qwen2", "names", "selective"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "checkpointing"), CASES)
def test_every_cut_gives_the_gradient_of_peft_alone(
    name: str, kind: str, checkpointing: bool | str, processes: Processes, wide_norms: None
) -> None:
    options, dataset = KINDS[kind], build_dataset(prefix=PREFIX)
    model = adapted(name, **options)
    reference = by_peft(model, name, **options)
    dense_loss(reference, dataset, IDS, "token").backward()
    want: dict[str, Tensor] = {}
    for key, parameter in reference.named_parameters():
        if parameter.grad is not None:
            key = key.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
            want[key] = parameter.grad
    if name != "qwen2" and "modules_to_save" in options:  # tied: peft trains two copies
        head = "lm_head.weight"
        embedding = "model.embed_tokens.weight" if name == "llama" else "transformer.wte.weight"
        want[embedding] = want.pop(head) + want[embedding]
    policy = Policy(model)
    assert policy.head is not None
    if checkpointing:
        enable_checkpointing(model, checkpointing == "selective")
    policy.train()
    for cut in CUTS:
        policy.zero_grad(set_to_none=True)
        accumulate_gradients(
            policy, dataset, IDS, cut=cut, trainer=TrainerConfig(), processes=processes, seed=0,
            step=0,
        )  # fmt: skip
        got = gradients(model)
        assert got.keys() == want.keys()
        flat = [torch.cat([grads[n].flatten() for n in want]) for grads in (got, want)]
        error = relative_error(*flat)
        assert error <= 1e-12, (cut, error)


@pytest.mark.parametrize(("name", "options"), MADE)
def test_merged_gives_the_log_probs_of_unmerged(name: str, options: dict[str, Any]) -> None:
    model, dataset = adapted(name, torch.float32, **options), build_dataset()
    plain = build_model(name, torch.float32)
    apart, mask = dense_log_probs(model, dataset, IDS)
    names = set(plain.state_dict())
    merge_adapter(model)
    assert set(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())
    merged, _ = dense_log_probs(model, dataset, IDS)
    base, _ = dense_log_probs(plain, dataset, IDS)
    torch.testing.assert_close(merged[mask], apart[mask], rtol=1e-5, atol=1e-5)
    assert (base - apart)[mask].abs().max() > 1e-2  # or it would prove nothing


@pytest.mark.parametrize(("name", "options"), MADE)
def test_peft_and_this_project_read_an_adapter_as_it_was_trained(
    name: str, options: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    model, dataset = adapted(name, torch.float32, **options), build_dataset()
    with torch.no_grad():  # what is trained whole is trained
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in key:
                parameter.mul_(1.25)
    want, _ = dense_log_probs(model, dataset, IDS)
    export_model(tmp_path / "adapter", model, tokenizer, "card")
    theirs: Any = PeftModel.from_pretrained(build_model(name, torch.float32), tmp_path / "adapter")
    assert torch.equal(dense_log_probs(theirs, dataset, IDS)[0], want)
    ours = build_model(name, torch.float32)
    load_adapter(
        tmp_path / "adapter", ours, Base("org/m", None, weights_sha256(ours.named_parameters()))
    )
    assert torch.equal(dense_log_probs(ours, dataset, IDS)[0], want)
    build_model(name, torch.float32).save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert torch.equal(dense_log_probs(auto, dataset, IDS)[0], want)


def test_frozen_layers_in_the_compute_dtype_compute_the_same(processes: Processes) -> None:
    dataset, grads = build_dataset(prefix=PREFIX), []
    for narrow in (False, True):
        model = adapted("qwen2", torch.float32)
        if narrow:
            narrow_frozen(model, torch.bfloat16)
            assert narrowed_to(model) == torch.bfloat16
            assert model.lm_head.weight.dtype == torch.float32
        policy = Policy(model, torch.bfloat16)
        choice = choose_batching(policy, "auto", 40)
        assert choice.batching == "flat_shared_prefix", choice.reason
        accumulate_gradients(
            policy.train(), dataset, IDS, cut=Cut(None, 2, "flat_shared_prefix"),
            trainer=TrainerConfig(), processes=processes, seed=0, step=0,
        )  # fmt: skip
        grads.append(gradients(model))
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    whole = build_model("qwen2", torch.float32)  # what an export reads anew
    copy_adapter(model, whole, adapter_tensors(model))
    copied = adapter_tensors(whole)
    assert all(torch.equal(copied[name], t) for name, t in adapter_tensors(model).items())


def test_dropout_of_adapters_is_told_and_not_shared() -> None:
    policy = Policy(adapted("llama", torch.float32, dropout=0.25))
    assert dropout_options(policy) == ["lora.dropout=0.25"]
    assert choose_batching(policy, "auto", 40).batching == "flat"
    with pytest.raises(UserError, match="flat_shared_prefix is not exact"):
        choose_batching(policy, "flat_shared_prefix", 40)


def test_the_adapters_are_those_of_the_seed() -> None:
    def weights(seed: int) -> Tensor:
        model = build_model("llama", torch.float32)
        add_adapter(model, LoraConfig(r=2), Base("m", None, ""), seed=seed)
        return torch.cat([t.flatten() for t in adapter_tensors(model).values()])

    state = torch.get_rng_state()
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_what_training_must_change_is_known_by_its_merged_name(kind: str) -> None:
    model = build_model("qwen2", torch.float32)
    before = bit_sums(model)
    add_adapter(model, LoraConfig(r=4, **KINDS[kind]), Base("m", None, ""), seed=0)
    sums = trained_sums(model, before)
    wake_adapters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.mul_(1.25)
    merge_adapter(model)
    now = bit_sums(model)
    named = sums.keys() & now.keys()
    assert named == {name for name in now if now[name] != before[name]}
    assert len(named) >= 4


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"target_modules": ["q_proj", "qproj"]}, "M124", "qproj"),
    ({"target_modules": ".*nothing"}, "M124", "nothing"),
    ({"target_modules": ["act_fn"]}, "M124", ""),
    ({"target_modules": ["q_proj", "lm_head"]}, "M125", "lora.modules_to_save=[lm_head]"),
    ({"target_modules": ["embed_tokens"]}, "M125", "embed_tokens"),
    ({"modules_to_save": ["lm_haed"]}, "M124", "lm_haed"),
    ({"modules_to_save": ["q_proj"]}, "M126", "q_proj"),
    ({"modules_to_save": ["layers"]}, "M126", "q_proj"),
]


@pytest.mark.parametrize(("options", "code", "text"), REFUSED)
def test_modules_that_cannot_be_adapted_are_named(
    options: dict[str, Any], code: str, text: str
) -> None:
    with pytest.raises(UserError) as error:
        adapted("llama", torch.float32, **options)
    assert error.value.code == code and text in str(error.value)


def test_an_adapter_goes_on_only_where_it_belongs(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "adapter"
    first = adapted("llama", torch.float32, modules_to_save=["norm"])
    export_model(folder, first, tokenizer, "")

    def go_on(name: str = "llama", base: str = "org/m", **options: Any) -> PreTrainedModel:
        model = build_model(name, torch.float32)
        digest = weights_sha256(model.named_parameters())
        given = LoraConfig(**{"adapter_path": str(folder), **options})
        add_adapter(model, given, Base(base, None, digest), seed=5)
        return model

    for options in ({}, {"r": 4}, {"alpha": 8, "base": "/another/place"}):
        again = adapter_tensors(go_on(**options))
        assert all(torch.equal(again[n], t) for n, t in adapter_tensors(first).items())

    def refused(code: str, **options: Any) -> str:
        with pytest.raises(UserError) as error:
            go_on(**options)
        assert error.value.code == code, error.value
        return str(error.value)

    assert "lora.r=4" in refused("M123", r=8)
    refused("M123", dora=True)
    refused("M123", target_modules=["q_proj"])
    refused("M123", modules_to_save=["lm_head"])
    assert "sha256" in refused("M121", name="qwen2")
    refused("M122", adapter_path=str(tmp_path))
    (folder / "base_model.json").unlink()  # as other tools leave it
    go_on()
    assert "org/m" in refused("M121", base="org/n")
    refused("M127", name="gpt2")
    config = json.loads((folder / "adapter_config.json").read_text())
    for more in ({"r": 8}, {"bias": "all"}, {"modules_to_save": None}, {"peft_type": "IA3"}):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **more}))
        refused("M127")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "adapter_model.safetensors cannot be read" in refused("M127")


def test_a_base_model_that_went_is_told_with_the_adapter(tmp_path: Path, tokenizer: Any) -> None:
    model = build_model("llama", torch.float32)
    add_adapter(model, LoraConfig(r=2), Base(str(tmp_path / "gone"), None, ""), seed=0)
    export_model(tmp_path / "adapter", model, tokenizer, "")
    with pytest.raises(UserError, match=r"no model folder .*gone") as error:
        load_model(resolve_model(str(tmp_path / "adapter"), None, False), random_init=False, seed=0)
    assert 'adapter_config.json, field "base_model_name_or_path"' in str(error.value)


TINY = {"vocab_size": 50, "num_hidden_layers": 5, "num_attention_heads": 4}
MANY = [  # twenty linear layers, from which on peft shortens their names
    # A layer of others and a linear one in it are both called 0; linear layers of a class of its own.
    CTRLConfig(vocab_size=50, n_embd=32, dff=48, n_layer=4, n_head=4, n_positions=32),
    FalconConfig(hidden_size=32, **TINY),
    PhimoeConfig(hidden_size=32, intermediate_size=48, num_key_value_heads=2, num_local_experts=4, **TINY),
    Qwen3MoeConfig(
        hidden_size=32, intermediate_size=48, num_key_value_heads=2, head_dim=8, num_experts=4,
        moe_intermediate_size=16, num_experts_per_tok=2, mlp_only_layers=[0], **TINY,
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", MANY, ids=lambda config: config.model_type)
def test_every_linear_layer_is_found_that_computes_as_one(
    config: Any, tmp_path: Path, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    plain, ids = copy.deepcopy(model), torch.arange(12)[None]
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    # The first layer's names here are those that peft takes for experts.
    dense = "gate_proj", "up_proj", "down_proj"
    apart = "lm_head", "router", *(dense if config.model_type == "qwen3_moe" else ())
    add_adapter(model, LoraConfig(r=2), Base("m", None, ""), seed=0)
    assert sorted(adapter_layers(model)) == sorted(n for n in linear if not n.endswith(apart))
    assert len(adapter_layers(model)) >= 20
    wake_adapters(model)
    export_model(tmp_path, model, tokenizer, "")
    load_adapter(tmp_path, plain, Base("m", None, ""))
    assert torch.equal(plain(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_mixture_has_adapters_on_its_linear_layers(dropout: float) -> None:
    def layers(**options: Any) -> list[str]:
        return sorted(adapter_layers(adapted("qwen3_moe", dropout=dropout, **options)))

    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert layers() == layers(target_modules=attention) and len(layers()) == 2 * len(attention)
    assert describe_adapter(adapted("qwen3_moe")).endswith("; fused experts stay as they are")
    whole = describe_adapter(adapted("qwen3_moe", modules_to_save=["experts"]))
    assert whole.endswith("trained whole: model.layers.0.mlp.experts, model.layers.1.mlp.experts")
    assert len(layers(target_modules=".*_proj")) == 2 * len(attention)
    assert layers(target_modules=r"model\.layers\.0\..*q_proj") == [
        "model.layers.0.self_attn.q_proj"
    ]
    with pytest.raises(UserError) as error:
        layers(target_modules=["q_proj", "gate"])
    assert error.value.code == "M125" and "lora.modules_to_save=[gate]" in str(error.value)


def test_freezing_by_name() -> None:
    model = build_model("llama", torch.float32)
    freeze(model, [r"layers\.0\.", "^lm_head"])  # tied: the embedding, too
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert "model.embed_tokens.weight" in frozen
    assert all("layers.0." in name or "embed" in name for name in frozen) and len(frozen) > 5
    for patterns, text in ((["layers.7"], "layers.7"), ([""], "nothing to train")):
        with pytest.raises(UserError, match=r"model\.freeze") as error:
            freeze(build_model("llama", torch.float32), patterns)
        assert text in str(error.value)
