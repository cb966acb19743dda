"""What many tests share: tiny models of several architectures, ragged data, a run's command line."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def remove_cache(folder: str, owner: int) -> None:
    """Remove the session's cache at exit, but not at the exit of a child that was forked from it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
os.environ.setdefault("WANDB_MODE", "disabled")
# Prepared data of the tests go where nobody keeps anything; workers of one session share it.
if "HF_HOME" not in os.environ:
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="cs336-tests-")
    atexit.register(remove_cache, os.environ["HF_HOME"], os.getpid())
CACHE = os.environ["HF_HOME"]

from cs336_alignment.quiet import silence

silence()  # before transformers is imported

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from cs336_alignment.config import ParallelConfig
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.data.tokenize import TokenRow
from cs336_alignment.model.loading import load_model, load_tokenizer
from cs336_alignment.model.source import resolve_model
from cs336_alignment.training.parallel import Processes, start_processes
from tests.faults.tally import (  # noqa: F401  hooks and a fixture
    pytest_runtest_makereport,
    pytest_terminal_summary,
    tally,
)
from tests.reference import stay_in_float64
from tests.zygote import Zygote, free_port, read_presets_once

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 97
torch.set_num_threads(1)  # the models are so small that threads only wait for each other
read_presets_once()


# Logits that are capped, divided, or have a bias; the second with tied embeddings. Experts.
MORE_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "nanochat": (NanoChatConfig, NanoChatForCausalLM, {"final_logit_softcapping": 3.0}),
    "granite": (
        GraniteConfig, GraniteForCausalLM, {"logits_scaling": 4.0, "tie_word_embeddings": True}
    ),
    "phi": (PhiConfig, PhiForCausalLM, {}),
    "qwen3_moe": (
        Qwen3MoeConfig, Qwen3MoeForCausalLM,
        {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8},
    ),
}  # fmt: skip


def build_model(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Make a small model with weights large enough that every token matters."""
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "initializer_range": 0.3}
    model: PreTrainedModel
    if name == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2,
                        tie_word_embeddings=True, **common)
        )  # fmt: skip
    elif name == "qwen2":
        model = Qwen2ForCausalLM(
            Qwen2Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, **common)
        )  # fmt: skip
    elif name in MORE_MODELS:
        config, architecture, options = MORE_MODELS[name]
        model = architecture(
            config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, max_position_embeddings=128, **common, **options)
        )  # fmt: skip
    else:
        model = GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0,
                       embd_pdrop=0.0, resid_pdrop=0.0, **common)
        )  # fmt: skip
    return model.to(dtype)


def build_dataset(
    num_examples: int = 11, *, weighted: bool = False, prefix: int = 0
) -> TokenizedDataset:
    """Make ragged examples, a prompt of one token and a response of one token among them; weighted:
    with examples and stretches of unequal weight, some of several turns; all begin with the same
    `prefix` tokens.
    """
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(num_examples):
        num_prompt = prefix + 1 + index * 7 % 5
        num_response = 1 + index * 5 % 9
        ids = torch.randint(VOCABULARY, (num_prompt + num_response,), generator=generator)
        ids[:prefix] = torch.arange(prefix) * 5 % VOCABULARY
        if weighted:
            each = [0.0] * num_prompt + [0.5 + place % 3 for place in range(num_response)]
            each[-3::-4] = [0.0] * len(each[-3::-4])  # a second turn's question
            rows.append(TokenRow.of_weights(ids.tolist(), each, 0.25 + index % 4))
        else:
            rows.append(TokenRow.of_response(ids.tolist(), num_prompt))
    return TokenizedDataset.of(rows)


def launch(kind: str) -> tuple[str, ...]:
    """Give the module and flags that start two processes."""
    if kind == "torchrun":
        return ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    flags = ("--multi_gpu", "--num_processes", "2", "--main_process_port", free_port())
    return ("accelerate.commands.launch", *flags)


@pytest.fixture(scope="session")
def processes() -> Processes:
    """This process alone, as the trainer sees it."""
    return Processes(start_processes(ParallelConfig()))


@pytest.fixture
def wide_norms() -> Iterator[None]:
    """No RMSNorm rounds to float32 (`stay_in_float64`)."""
    patch = stay_in_float64()
    yield
    patch.undo()


READ_AT_IMPORT = {"HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE"}
Sft = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """What runs the commands that need no launcher and no environment of their own."""
    started = Zygote(clean_environment())
    yield started
    started.close()


@pytest.fixture
def sft(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Sft:
    """Run `cs336-sft` as a user does, in a folder of its own; `processes` of it as a launcher
    starts them, or by a real launcher.
    """
    scratch = tmp_path_factory.mktemp("printed")

    def run(
        *arguments: str, launcher: tuple[str, ...] = (), processes: int = 1, **options: Any
    ) -> Any:
        folder, given = options.pop("cwd", tmp_path), options.pop("env", {})
        if not launcher and not READ_AT_IMPORT & given.keys():
            return zygote.run(list(arguments), folder, scratch, processes, given)
        command = [sys.executable, "-m", *(launcher or ("cs336_alignment.cli",)), *arguments]
        return subprocess.run(
            command, cwd=folder, text=True, capture_output=True, timeout=280,
            env={**clean_environment(), **given},
        )  # fmt: skip

    return run


def clean_environment() -> dict[str, str]:
    """The environment without what a launcher around the tests may have set."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in drop and not k.startswith("ACCELERATE")}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": CACHE}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A small file of prompts and responses."""
    path = tmp_path / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(40):
            a, b = index, 3 * index % 17
            row = {"question": f"{a} + {b} = ?", "answer": f"Add {b} to {a}.\n#### {a + b}"}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, such as adapters are trained on."""
    folder = tmp_path_factory.mktemp("models") / "tiny-base"
    source = resolve_model("builtin:arithmetic", None, False)
    load_model(source, random_init=True, seed=0).save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return folder


# Overrides for a run of seconds on the built-in tiny model.
TINY = (
    "model.name_or_path=builtin:arithmetic", "model.random_init=true", "logger=none",
    "trainer.global_batch_size=4", "trainer.save_steps=0", "trainer.reload_check=false",
)  # fmt: skip


def without_times(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file but for its times and speeds."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")} for row in rows
    ]
