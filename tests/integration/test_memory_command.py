"""`cs336-sft doctor --memory` as a user types it, and what it starts; the refusal of `train`."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from cs336_alignment.config import Config, DataConfig, ModelConfig, TrainerConfig
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.model.loading import load_tokenizer
from cs336_alignment.model.source import resolve_model
from cs336_alignment.training import memory_trial
from cs336_alignment.training.memory_trial import measure
from tests.conftest import Sft


def test_a_model_beyond_all_memory_is_refused_before_it_is_loaded(
    tmp_path: Path, rows: Path, sft: Sft
) -> None:
    """Terabytes of parameters in a config.json, and no weights."""
    LlamaConfig(
        hidden_size=131072, intermediate_size=524288, num_hidden_layers=4, num_attention_heads=64,
        vocab_size=128256,
    ).save_pretrained(tmp_path / "large")  # fmt: skip
    tokenizer = load_tokenizer(resolve_model("builtin:arithmetic", None, False))
    tokenizer.save_pretrained(tmp_path / "large")
    common = (f"model.name_or_path={tmp_path / 'large'}", f"data.train_path={rows}", "logger=none")
    for verb in (("train",), ("doctor", "--memory")):
        done = sft(*verb, *common)
        assert done.returncode == ExitStatus.BAD_CONFIG, done.stderr
        assert "error[R308]" in done.stderr and "times the machines" in done.stderr


@pytest.mark.slow
def test_a_trial_that_memory_ends_is_told_and_ends_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(
        ModelConfig("builtin:arithmetic", random_init=True),
        DataConfig("builtin:arithmetic", max_train_examples=64, cache_dir=str(tmp_path)),
        TrainerConfig(global_batch_size=64, batching="padded"),
    )
    memory_of_children = 2**20  # less than what is there before the model is loaded
    assert measure(config, 1, memory_of_children) is None
    monkeypatch.setattr(memory_trial, "LIMIT_SECONDS", 0.1)
    with pytest.raises(UserError, match="R307") as caught:
        measure(config, 1, memory_of_children)
    assert caught.value.hint is not None


def test_the_doctor_foretells_measures_and_proposes(sft: Sft) -> None:
    done = sft("doctor", "--memory", "experiment=quickstart", "data.max_train_examples=32",
               "data.eval_path=null", "trainer.max_steps=2", "logger=none")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("estimate", "optimizer state", "measured", "ratio", "proposed", "is a whole step",
                  "for 2 steps"):  # fmt: skip
        assert words in done.stdout, done.stdout
