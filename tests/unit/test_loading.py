"""Loading: a folder gives the weights it holds, or says what it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.model.fits import check_fits
from cs336_alignment.model.loading import load_model
from cs336_alignment.model.source import ModelSource, resolve_model
from tests.conftest import VOCABULARY, build_model


def load(folder: Path) -> torch.nn.Module:
    return load_model(ModelSource(str(folder), None, False), random_init=False, seed=0)


def test_weights_come_back_in_float32(tmp_path: Path) -> None:
    model = build_model("llama", torch.bfloat16)
    model.save_pretrained(tmp_path)
    for (name, a), b in zip(model.named_parameters(), load(tmp_path).parameters(), strict=True):
        assert b.dtype == torch.float32, name
        assert torch.equal(a.float(), b), name


@pytest.mark.parametrize("damage", ["missing", "renamed", "reshaped"])
def test_a_tensor_that_is_lacking_is_never_drawn_at_random(damage: str, tmp_path: Path) -> None:
    build_model("llama", torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = tensors.pop(name)
    if damage == "renamed":
        tensors[f"{name}.old"] = tensor
    elif damage == "reshaped":
        tensors[name] = tensor[:-1].contiguous()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert caught.value.status == ExitStatus.NOT_FOUND
    assert "up_proj" in str(caught.value)


def test_random_weights_are_a_function_of_the_seed() -> None:
    source = resolve_model("builtin:arithmetic", None, False)

    def first(seed: int) -> torch.Tensor:
        model = load_model(source, random_init=True, seed=seed)
        return next(model.parameters()).detach().clone()

    state = torch.get_rng_state()
    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert torch.equal(state, torch.get_rng_state())


def test_what_does_not_fit_is_refused() -> None:
    model = build_model("gpt2")
    check_fits(model, VOCABULARY - 1, 65)
    with pytest.raises(UserError, match="token ids"):
        check_fits(model, VOCABULARY, 10)
    with pytest.raises(UserError) as caught:
        check_fits(model, 0, 66)  # 65 inputs for 64 positions
    assert "data.max_length=65" in str(caught.value)
    assert caught.value.status == ExitStatus.BAD_CONFIG
