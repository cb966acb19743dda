"""Chat templates that say what was trained, licences, secrets that are not shown, and `env`."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from cs336_alignment import cli
from cs336_alignment.config import Config, DataConfig, ModelConfig
from cs336_alignment.data.templates import PromptTemplate, load_template
from cs336_alignment.data.tokenize import tokenize_prompts
from cs336_alignment.env_command import shown_variables
from cs336_alignment.model.loading import load_tokenizer
from cs336_alignment.model.source import resolve_model
from cs336_alignment.sharing.card import Card, license_of, shorten
from cs336_alignment.sharing.chat_template import as_chat_template

ODD = PromptTemplate("odd", 'It\'s {{ "odd" }}, {% x %}\n\\n é 🙂\tQ: {question} \n')
QUESTIONS = ("1 + 2 = ?", "{{ 7 * 7 }} {question}", " é\n🙂 \\n 'x' ")


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve_model("builtin:arithmetic", None, False))


@pytest.fixture(scope="module")
def with_bos(plain: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """One that begins every text with a token of its own."""
    made = copy.deepcopy(plain)
    bos = made.pad_token
    made.backend_tokenizer.post_processor = TemplateProcessing(  # type: ignore[attr-defined]
        single=f"{bos} $A", special_tokens=[(bos, made.pad_token_id)]
    )
    return made


@pytest.mark.parametrize("name", ["r1_zero", "question_only", "alpaca", "odd"])
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", ["plain", "with_bos"])
def test_a_chat_template_makes_the_tokens_of_training(
    kind: str, special: bool, name: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = copy.deepcopy(request.getfixturevalue(kind))
    template = ODD if name == "odd" else load_template(name)
    assert template is not None
    text = as_chat_template(template, tokenizer, add_special_tokens=special, append_eos=True)
    assert text is not None and tokenizer.chat_template is None
    tokenizer.chat_template = text
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        made = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert made == tokenize_prompts([template.fill(question)], tokenizer, special)[0]
        messages.append({"role": "assistant", "content": " {{ 3 }}"})
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert whole.endswith(f"{template.fill(question)} {{{{ 3 }}}}{tokenizer.eos_token}")
    for turns in (["system", "user"], ["user", "assistant", "user"]):
        with pytest.raises(Exception, match="one question"):
            messages = [{"role": role, "content": "x"} for role in turns]
            tokenizer.apply_chat_template(messages, tokenize=False)


def test_the_licence_is_that_of_the_base_models_card(tmp_path: Path) -> None:
    assert license_of(str(tmp_path), None) is None and license_of("a/b", None) is None
    data = ModelCardData(license="apache-2.0", language="en")
    (tmp_path / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n# base\n")
    assert license_of(str(tmp_path), None) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    assert license_of(str(tmp_path), None) is None
    assert (shorten("/home/ann/x.jsonl"), shorten("a/x.jsonl")) == ("…/x.jsonl", "a/x.jsonl")
    assert shorten("../ann/x.jsonl") == shorten("a/../../ann/x.jsonl") == "…/x.jsonl"


def test_a_card_names_the_hubs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere `a/b` may be no folder and have been one where it was trained."""
    monkeypatch.chdir(tmp_path)

    def head(base: str, data: str, revision: str | None) -> dict[str, object]:
        (tmp_path / "manifest.json").write_text(json.dumps({"model_revision": revision}))
        config = Config(model=ModelConfig(base), data=DataConfig(data), run_name="r")
        card = ModelCard(str(Card(config, tmp_path, 1, None, None, None, "model")))
        return card.data.to_dict()

    found = head("models/base", "data/train.parquet", None)
    assert "base_model" not in found and "datasets" not in found
    found = head("org/base", "org/rows:main:train", "0" * 40)
    assert (found["base_model"], found["datasets"]) == ("org/base", ["org/rows"])
    for ending in (".csv", ".tsv", ".ndjson.gz", ".jsonl.zst", ".parquet", ".json", ".txt"):
        assert "datasets" not in head("org/base", f"data/rows{ending}", None), ending


def test_env_shows_no_secret_and_no_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "0123456789secret"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MASTER_PASSWORD", "MY_OWN"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("HF_ENDPOINT", "https://ann:hunter22@hub.example")
    monkeypatch.setenv("PYTHONPATH", "/home/ann/a:/home/ann/b b")
    assert cli.run(["env"]) == 0
    printed = capsys.readouterr().out
    assert secret not in printed and "hunter22" not in printed and "/home" not in printed
    assert "| HF_TOKEN | set, not shown |" in printed and "| PYTHONPATH | …/a:…/b b |" in printed
    for text in ("### Versions", "| torch | ", "| cores | ", "| SDPA math, ", "| git commit | "):
        assert text in printed, text
    assert str(Path.home()) not in printed
    assert dict(shown_variables({"TOKENIZERS_PARALLELISM": "false", "HOME": "/root"})) == {
        "TOKENIZERS_PARALLELISM": "false"
    }
    assert cli.run(["env", "seed=1"]) == 2 and "error[C174]" in capsys.readouterr().err
