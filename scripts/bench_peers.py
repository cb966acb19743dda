"""Training beside TRL's SFTTrainer and LLaMA-Factory: the same weights, rows, order, batch,
optimizer and precision.

    python scripts/bench_peers.py MODEL train.jsonl [--rounds 3] [--arms ours_shared trl_plain]
        [--llama-factory ENVIRONMENT/bin/python]

MODEL is a model folder, the file holds GSM8K rows; TRL comes with the extra `bench`. LLaMA-Factory
pins other versions and needs an environment of its own. Every arm is a fresh process, this
project's by its own command line, and the arms take turns. Prints a table
(medians of the rounds) with the loss and gradient norm of step 1 beside every speed, and writes
what was measured and a picture to the folder given by --out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

WARMUP_STEPS = 1
STEPS = 4  # in all,
FEWER = {"trl_default": 2}  # or less where a step takes minutes
BATCH = 8
RATE = 1e-5
# Overrides of this project's arms; of TRL's, fields of SFTConfig.
OURS: dict[str, list[str]] = {
    "ours_padded": ["trainer.batching=padded"],
    "ours_flat": ["trainer.batching=flat"],
    "ours_shared": ["trainer.batching=flat_shared_prefix"],
    "ours_flat_compiled": ["trainer.batching=flat", "trainer.compile=true"],
    "ours_shared_compiled": ["trainer.batching=flat_shared_prefix", "trainer.compile=true"],
}
FLOAT32 = {"bf16": False, "gradient_checkpointing": False}
TRL: dict[str, dict[str, Any]] = {
    "trl_default": {},
    "trl_plain": FLOAT32,
    "trl_checkpointing": {"bf16": False},
    "trl_grouped": FLOAT32 | {"train_sampling_strategy": "group_by_length"},
}
LLAMA_FACTORY: dict[str, dict[str, Any]] = {
    "lf_default": {},
    "lf_plain": {"disable_gradient_checkpointing": True},
}
LABELS = {
    "lf_default": "LLaMA-Factory, fp32, checkpointing",
    "lf_plain": "LLaMA-Factory, fp32, no checkpointing",
    "ours_padded": "this project, padded",
    "ours_flat": "this project, flat",
    "ours_shared": "this project, flat + shared prefix",
    "ours_flat_compiled": "this project, flat, compiled layers",
    "ours_shared_compiled": "this project, flat + shared prefix, compiled layers",
    "trl_default": "TRL as it comes (bf16, checkpointing)",
    "trl_plain": "TRL, fp32, no checkpointing",
    "trl_checkpointing": "TRL, fp32, checkpointing",
    "trl_grouped": "TRL, fp32, no checkpointing, grouped by length",
}
BASE = "trl_plain"
# Step 1 of an arm that does the same work: relative bounds of its loss and gradient norm. Not for
# arms that compute in bfloat16 or put other rows into a step.
SAME_WORK = {"loss": 1e-4, "grad_norm": 1e-3}
OTHER_WORK = {"trl_default": "bf16", "trl_grouped": "other rows in a step"}


def train_ours(
    name: str, model: str, data: str, folder: Path, overrides: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run `cs336-sft train` and read what it logged."""
    command = [
        sys.executable, "-m", "cs336_alignment.cli", "train", f"data.train_path={data}",
        f"model.name_or_path={model}", f"output_root={folder}", f"run_name={name}",
        f"data.cache_dir={folder}/cache", "data.shuffle=false", "logger.backend=none",
        f"trainer.global_batch_size={BATCH}", "trainer.gradient_accumulation_steps=1",
        f"trainer.max_steps={STEPS}", "trainer.save_steps=0", "trainer.precision=fp32",
        f"optimizer.learning_rate={RATE}", "optimizer.lr_scheduler_type=constant",
        "optimizer.warmup_ratio=0", "optimizer.weight_decay=0", "optimizer.max_grad_norm=1",
        *overrides,
    ]  # fmt: skip
    environment = {**os.environ, **(environment or {})}
    begin = time.time()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    metrics = folder / name / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    first_step = time.time() - begin
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [row for row in rows if "train/loss" in row]
    return {
        "seconds": [row["perf/step_seconds"] for row in rows],
        "loss": rows[0]["train/loss"],
        "grad_norm": rows[0]["train/grad_norm"],
        "first_step": first_step,
        "memory_gib": memory_gib(used, rows[-1]["perf/peak_memory_gib"]),
    }


def memory_gib(used: Any, of_device: float) -> float:
    """Choose an arm's memory: what its GPU gave out, or what its process had resident."""
    import torch

    return of_device if torch.cuda.is_available() else float(used.ru_maxrss / 2**20)


def clock() -> Any:
    """Make a callback of transformers' Trainer that notes when steps begin and end, and logs."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.moments: list[float] = []
            self.logs: list[dict[str, Any]] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.moments.append(time.time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.moments.append(time.time())

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            self.logs.append(logs)

        def result(self) -> dict[str, Any]:
            import resource

            import torch

            allocated = torch.cuda.max_memory_allocated() / 2**30
            return {
                "seconds": [
                    b - a for a, b in zip(self.moments[::2], self.moments[1::2], strict=True)
                ],
                "loss": float(self.logs[0]["loss"]),
                "grad_norm": float(self.logs[0]["grad_norm"]),
                "first_step": self.moments[1],
                "memory_gib": memory_gib(resource.getrusage(resource.RUSAGE_SELF), allocated),
            }

    return Clock()


def train_llama_factory(name: str, model: str, tokens: str) -> dict[str, Any]:
    """Train in this process with LLaMA-Factory on the tokens that this project made."""
    import importlib.machinery
    import types

    # Imported for sound, which is not wanted here; its builds are for CUDA.
    sound = types.ModuleType("torchaudio")
    sound.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = sound
    import datasets
    from llamafactory.train.tuner import run_exp

    watch = clock()
    with tempfile.TemporaryDirectory() as folder:
        rows = datasets.Dataset.from_json(tokens).remove_columns("length")
        rows = rows.map(lambda row: {"attention_mask": [1] * len(row["input_ids"])})
        datasets.DatasetDict({"train": rows}).save_to_disk(f"{folder}/tokens")
        run_exp(
            {
                "model_name_or_path": model, "stage": "sft", "do_train": True, "template": "empty",
                "finetuning_type": "full", "dataset": "tokens", "cutoff_len": 4096,
                "tokenized_path": f"{folder}/tokens", "output_dir": f"{folder}/out",
                "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1,
                "max_steps": STEPS, "learning_rate": RATE, "lr_scheduler_type": "constant",
                "weight_decay": 0.0, "max_grad_norm": 1.0, "logging_steps": 1,
                "save_strategy": "no", "disable_shuffling": True, "use_cpu": True,
                "optim": "adamw_torch_fused", "report_to": "none", "disable_tqdm": True,
                **LLAMA_FACTORY[name],
            },
            callbacks=[watch],
        )  # fmt: skip
    result: dict[str, Any] = watch.result()
    return result


def train_trl(name: str, model: str, tokens: str) -> dict[str, Any]:
    """Train in this process with SFTTrainer on the tokens that this project made."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    watch = clock()
    options = {"train_sampling_strategy": "sequential"} | TRL[name]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(model),
            train_dataset=datasets.Dataset.from_json(tokens),
            callbacks=[watch],
            args=SFTConfig(
                output_dir=folder, use_cpu=not torch.cuda.is_available(), report_to=[],
                per_device_train_batch_size=BATCH, max_length=None,
                max_steps=FEWER.get(name, STEPS),
                learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0,
                max_grad_norm=1.0, logging_steps=1, save_strategy="no", disable_tqdm=True,
                optim="adamw_torch_fused", dataset_kwargs={"skip_prepare_dataset": True},
                **options,
            ),
        )  # fmt: skip
        trainer.train()
    result: dict[str, Any] = watch.result()
    return result


def matrix_rate() -> dict[str, Any]:
    """Measure what matrix products reach in float32: the median of the two shapes, in FLOP/s."""
    import torch
    from bench_common import SMOLLM2_PRODUCTS, product_rate

    return {"flops": product_rate(SMOLLM2_PRODUCTS, torch.float32, torch.device("cpu"))}


def write_tokens(model: str, data: str, path: Path, folder: Path) -> list[tuple[int, int]]:
    """Write the rows' tokens for TRL; returns (tokens, response tokens) of each."""
    from cs336_alignment.config import DataConfig
    from cs336_alignment.data.splits import prepare_run
    from cs336_alignment.model.loading import load_tokenizer
    from cs336_alignment.model.source import resolve_model

    tokenizer = load_tokenizer(resolve_model(model, None, False))
    config = DataConfig(data, cache_dir=str(folder / "cache"))
    dataset = prepare_run(config, tokenizer, seed=0).train.dataset
    sizes = []
    with path.open("w") as file:
        for i in range(len(dataset)):
            ids, mask = dataset[i].input_ids, dataset[i].response_mask
            labels = ids.masked_fill(~mask, -100).tolist()
            row = {"input_ids": ids.tolist(), "labels": labels, "length": len(ids)}
            file.write(json.dumps(row) + "\n")
            sizes.append((len(ids), int(mask.sum())))
    return sizes


def useful_flops(model: str, sizes: list[tuple[int, int]]) -> float:
    """Count what a step over these examples costs at least, forward and backward."""
    import torch
    from bench_common import Shape
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return Shape.of(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))).useful(
            sizes
        )


def run_arm(arguments: list[str], python: str = sys.executable) -> dict[str, Any]:
    """Run a part of this script in a process of its own."""
    begin = time.time()
    done = subprocess.run(
        [python, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "first_step" in result:
        result["first_step"] -= begin
    return result


def choose_rows(source: str, path: Path) -> str:
    """Take rows from all over the file, as many as the steps need."""
    lines = Path(source).read_text(encoding="utf-8").splitlines(keepends=True)
    every = len(lines) // (STEPS * BATCH)
    path.write_text("".join(lines[::every][: STEPS * BATCH]), encoding="utf-8")
    return str(path)


def summarize(
    found: dict[str, list[dict[str, Any]]], sizes: list[tuple[int, int]], model: str
) -> dict[str, dict[str, float]]:
    """Reduce each arm's rounds to medians."""
    rows = {}
    for name, rounds in found.items():
        measured = sizes[WARMUP_STEPS * BATCH : FEWER.get(name, STEPS) * BATCH]
        seconds = [sum(each["seconds"][WARMUP_STEPS:]) for each in rounds]
        # Grouping changes which examples a step holds; over a whole epoch the tokens are the same.
        tokens, total = sum(n for n, _ in measured), sum(n for n, _ in sizes)
        if name == "trl_grouped":
            seconds = [sum(each["seconds"]) * tokens / total for each in rounds]
        second = statistics.median(seconds)
        flops = useful_flops(model, measured)
        shares = [flops / s / each["matrix_flops"] for s, each in zip(seconds, rounds, strict=True)]
        rows[name] = {
            "tokens_per_second": tokens / second,
            "response_tokens_per_second": sum(n for _, n in measured) / second,
            "memory_gib": statistics.median(each["memory_gib"] for each in rounds),
            "first_step": statistics.median(each["first_step"] for each in rounds),
            "share_of_matrix_rate": statistics.median(shares),
            "loss": rounds[0]["loss"],
            "grad_norm": rounds[0]["grad_norm"],
        }
    return rows


def table_of(rows: dict[str, dict[str, float]]) -> str:
    """Write Markdown."""
    lines = [
        "| arm | tokens/s | response tokens/s | × | peak memory, GiB | × | first step, s | "
        "share of GEMM rate | loss, step 1 | gradient norm |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    base = rows.get(BASE)
    for name, row in rows.items():
        speed = row["tokens_per_second"] / base["tokens_per_second"] if base else float("nan")
        memory = row["memory_gib"] / base["memory_gib"] if base else float("nan")
        lines.append(
            f"| {LABELS[name]} | {row['tokens_per_second']:.0f} | "
            f"{row['response_tokens_per_second']:.0f} | {speed:.2f} | {row['memory_gib']:.1f} | "
            f"{memory:.2f} | {row['first_step']:.0f} | {row['share_of_matrix_rate']:.0%} | "
            f"{row['loss']:.6f} | {row['grad_norm']:.5f} |"
        )
    return "\n".join(lines)


def parity_of(rows: dict[str, dict[str, float]]) -> str:
    """Say whether the arms do the same work; one that does not is no comparison."""
    same = [name for name in rows if name not in OTHER_WORK]
    wrong = [
        f"{LABELS[name]} ({key} {rows[name][key]:.6g} instead of {rows[same[0]][key]:.6g})"
        for name in same for key, bound in SAME_WORK.items()
        if not abs(rows[name][key] / rows[same[0]][key] - 1) <= bound
    ]  # fmt: skip
    exempt = [f"{LABELS[name]} ({OTHER_WORK[name]})" for name in rows if name in OTHER_WORK]
    lines = [f"NOT the same work: {', '.join(wrong)}" if wrong else "same loss and gradient: yes"]
    return "; not asked of ".join([*lines, *([", ".join(exempt)] if exempt else [])])


def draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Draw speed and memory, an arm a bar."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(rows)[::-1]
    colours = ["#1f6f8b" if name.startswith("ours") else "#b8b8b8" for name in names]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.45 * len(names) + 1.2), sharey=True)
    for axis, key, title in zip(
        axes, ("tokens_per_second", "memory_gib"),
        ("real tokens a second (more is better)", "peak memory, GiB (less is better)"), strict=True,
    ):  # fmt: skip
        bars = axis.barh([LABELS[name] for name in names], [rows[n][key] for n in names],
                         color=colours)  # fmt: skip
        axis.bar_label(bars, fmt="%.0f" if key == "tokens_per_second" else "%.1f", padding=3)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def report(
    rows: dict[str, dict[str, float]], found: dict[str, list[dict[str, Any]]], out: Path
) -> None:  # fmt: skip
    """Print the table, and write it, what it was made of, and the picture."""
    out.mkdir(parents=True, exist_ok=True)
    measured = {"arms": rows, "rounds": found}
    (out / "peers.json").write_text(json.dumps(measured, indent=2) + "\n")
    draw(rows, out / "peers.png")
    rates = [each["matrix_flops"] / 1e9 for rounds in found.values() for each in rounds]
    number = min(len(rounds) for rounds in found.values())
    print(
        f"after round {number}; matrix products {statistics.median(rates):.0f} GFLOP/s "
        f"({min(rates):.0f} to {max(rates):.0f})"
    )
    print(table_of(rows))
    print(parity_of(rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=[*TRL, *LLAMA_FACTORY, *OURS])
    parser.add_argument("--llama-factory", metavar="PYTHON", help="its environment's interpreter")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    options = parser.parse_args()
    other = LLAMA_FACTORY if options.llama_factory else {}
    options.arms = options.arms or [*TRL, *other, *OURS]
    if not other and set(options.arms) & set(LLAMA_FACTORY):
        parser.error("the arms of LLaMA-Factory need --llama-factory")

    from rich.progress import track

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.arms}
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        folder = Path(temporary)
        data = choose_rows(options.data, folder / "rows.jsonl")
        tokens = folder / "tokens.jsonl"
        sizes = write_tokens(options.model, data, tokens, folder)
        turns = [(turn, name) for turn in range(options.rounds) for name in options.arms]
        for turn, name in track(turns, "training"):
            rate = run_arm(["--matrix-rate"])["flops"]
            if name in OURS:
                result = train_ours(name, options.model, data, folder / str(turn), OURS[name])
            elif name in TRL:
                result = run_arm(["--trl", name, options.model, str(tokens)])
            else:
                part = ["--llama-factory-arm", name, options.model, str(tokens)]
                result = run_arm(part, options.llama_factory)
            found[name].append(result | {"matrix_flops": rate})
            if name == options.arms[-1]:  # a round is whole: what is known so far
                report(summarize(found, sizes, options.model), found, options.out)


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "--trl": train_trl,
    "--llama-factory-arm": train_llama_factory,
    "--matrix-rate": matrix_rate,
}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in PARTS:
        print("\n" + json.dumps(PARTS[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
