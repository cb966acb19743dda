"""How near the estimate of `cs336-sft doctor --memory` comes to the peak that is measured.

    python scripts/bench_estimate.py MODEL train.jsonl [--train] [--budgets 1024 4096 8192]

MODEL is a model folder, the file holds GSM8K rows. Two more models are drawn at random, of other
shapes, with MODEL's tokenizer: one with a large vocabulary, one for rows of 2,000 tokens. Estimates
and trials come from processes of their own, as the doctor's do; `--train` adds the peak that
`cs336-sft train` reports after one step. float32. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, Qwen2Config

from cs336_alignment.config import Config, DataConfig, LoggerConfig, ModelConfig, TrainerConfig
from cs336_alignment.memory_command import Outlook
from cs336_alignment.tracking.console import Console
from cs336_alignment.training.memory_trial import measure

LONG_ROW = 2000  # tokens
GLOBAL_BATCH = 64
SHAPES = {
    "Qwen2-like, vocabulary of 151,936": Qwen2Config(
        vocab_size=151936, hidden_size=256, intermediate_size=1024, num_hidden_layers=12,
        num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Llama-like, rows of 2,000 tokens": LlamaConfig(
        vocab_size=49152, hidden_size=384, intermediate_size=1024, num_hidden_layers=8,
        num_attention_heads=6, num_key_value_heads=6, tie_word_embeddings=True,
        max_position_embeddings=4096,
    ),
}  # fmt: skip


def write_long_rows(source: Path, target: Path, model: str) -> Path:
    """Join GSM8K's problems, so many to a row that it has about 2,000 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows, text = [], ""
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text += f"{row['question']}\n{row['answer']}\n\n"
        if len(tokenizer(text)["input_ids"]) > LONG_ROW - 250:
            rows.append({"prompt": text[:200], "response": text[200:]})
            text = ""
    target.write_text("".join(json.dumps(row) + "\n" for row in rows[:256]), encoding="utf-8")
    return target


def predict(config: Config) -> tuple[int, float]:
    """Give the number of parameters, and the estimate in GiB."""
    outlook = Outlook.of(config, Console(enabled=False))
    parameters = outlook.foresight.policy.model.num_parameters()
    return parameters, (outlook.base + outlook.whole(config).peak) / 2**30


def train_one_step(config: Config, folder: Path) -> float:
    """Train for one step of the worst microbatch's kind; returns the peak in GiB."""
    budget = config.trainer.microbatch_tokens
    command = [
        sys.executable, "-m", "cs336_alignment.cli", "train", "logger=none", "run_name=run",
        f"output_root={folder}", f"model.name_or_path={config.model.name_or_path}",
        f"model.random_init={str(config.model.random_init).lower()}",
        f"data.train_path={config.data.train_path}", f"data.max_train_examples={GLOBAL_BATCH}",
        f"trainer.global_batch_size={GLOBAL_BATCH}", f"trainer.microbatch_tokens={budget}",
        "trainer.max_steps=1", "trainer.save_steps=0", "trainer.reload_check=false",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    row = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    return float(row["perf/peak_memory_gib"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--budgets", nargs="+", type=int, default=[1024, 4096, 8192])
    parser.add_argument("--train", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        arms = {Path(options.model).name: (options.model, False, options.data)}
        long = write_long_rows(options.data, folder / "long.jsonl", options.model)
        for name, shape in SHAPES.items():
            place = folder / name.partition("-")[0]
            shape.save_pretrained(place)
            AutoTokenizer.from_pretrained(options.model).save_pretrained(place)
            arms[name] = (str(place), True, long if "rows" in name else options.data)
        columns = ["model", "parameters", "`microbatch_tokens`", "predicted, GiB", "measured, GiB"]
        columns += ["predicted / measured", *(["`train`, GiB"] if options.train else [])]
        print(f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", sep="\n", flush=True)
        for name, budget in ((name, budget) for budget in options.budgets for name in arms):
            model, random_init, data = arms[name]
            config = Config(
                ModelConfig(model, random_init=random_init),
                DataConfig(str(data), max_train_examples=GLOBAL_BATCH),
                TrainerConfig(
                    global_batch_size=GLOBAL_BATCH, microbatch_tokens=budget, num_train_epochs=1
                ),
                logger=LoggerConfig("none"),
            )
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                parameters, predicted = pool.submit(predict, config).result()
            trial = measure(config, 1, 2**62)
            assert trial is not None
            peak = trial.peak / 2**30
            cells = [name, f"{parameters:,}", f"{budget:,}", f"{predicted:.2f}", f"{peak:.2f}"]
            cells.append(f"{predicted / peak:.2f}")
            if options.train:
                with tempfile.TemporaryDirectory(dir=folder) as run:
                    cells.append(f"{train_one_step(config, Path(run)):.2f}")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
