"""LoRA here beside full fine-tuning here and beside TRL with peft: the same weights, rows, order,
batch, optimizer and precision, and both LoRA arms begin with the same adapter.

    python scripts/bench_lora.py MODEL train.jsonl [--rank 16] [--rounds 3] [--arms full lora trl]

MODEL is a model folder, the file holds GSM8K rows; TRL comes with the extra `bench`. Every arm is a
fresh process, this project's by its own command line, and the arms take turns. Prints a table of
medians with the loss and gradient norm of step 1 beside every speed, and says whether the two LoRA
arms do the same work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_peers import (
    BATCH,
    FLOAT32,
    RATE,
    SAME_WORK,
    STEPS,
    WARMUP_STEPS,
    choose_rows,
    clock,
    train_ours,
    write_tokens,
)

LABELS = {
    "full": "this project, all weights",
    "lora": "this project, LoRA",
    "lora_checkpointing": "this project, LoRA, checkpointing",
    "trl": "TRL + peft, fp32, no checkpointing",
    "trl_checkpointing": "TRL + peft, fp32, checkpointing",
}
OURS = {
    "full": [],
    "lora": [],
    "lora_checkpointing": ["trainer.gradient_checkpointing=true"],
}
TRL: dict[str, dict[str, Any]] = {
    "trl": FLOAT32,
    "trl_checkpointing": {"bf16": False, "gradient_checkpointing": True},
}


def make_adapter(model: str, rank: str, folder: str) -> dict[str, Any]:
    """Draw the adapter that both LoRA arms begin with."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(
        r=int(rank), lora_alpha=2 * int(rank), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(net, config)
    wrapped.save_pretrained(folder)
    trained, total = wrapped.get_nb_trainable_parameters()
    return {"share": trained / total}


def train_trl(name: str, model: str, tokens: str, adapter: str) -> dict[str, Any]:
    """Train the adapter in this process with SFTTrainer, on the tokens that this project made."""
    import datasets
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    watch = clock()
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(net, adapter, is_trainable=True)
    trained, total = wrapped.get_nb_trainable_parameters()
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=wrapped,
            processing_class=AutoTokenizer.from_pretrained(model),
            train_dataset=datasets.Dataset.from_json(tokens),
            callbacks=[watch],
            args=SFTConfig(
                output_dir=folder, use_cpu=not torch.cuda.is_available(), report_to=[],
                per_device_train_batch_size=BATCH, max_length=None, max_steps=STEPS,
                learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0,
                max_grad_norm=1.0, logging_steps=1, save_strategy="no", disable_tqdm=True,
                optim="adamw_torch_fused", dataset_kwargs={"skip_prepare_dataset": True},
                train_sampling_strategy="sequential", **TRL[name],
            ),
        )  # fmt: skip
        trainer.train()
    result: dict[str, Any] = watch.result() | {"share": trained / total}
    return result


def run_part(*arguments: str) -> dict[str, Any]:
    """Run a part of this script in a process of its own."""
    begin = time.time()
    done = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "first_step" in result:
        result["first_step"] -= begin
    return result


def run_ours(name: str, model: str, data: str, folder: Path, adapter: Path) -> dict[str, Any]:
    """Train with this project's command line."""
    lora = [] if name == "full" else [f"lora.adapter_path={adapter}"]
    overrides = [*OURS[name], *lora, "trainer.reload_check=false"]
    result = train_ours(name, model, data, folder, overrides)
    made_of = json.loads((folder / name / "manifest.json").read_text())
    return result | {"share": made_of["trainable_parameters"] / made_of["parameters"]}


def report(found: dict[str, list[dict[str, Any]]], sizes: list[tuple[int, int]]) -> None:
    """Print the table, and whether the LoRA arms do the same work."""
    tokens = sum(n for n, _ in sizes[WARMUP_STEPS * BATCH : STEPS * BATCH])
    speed, memory = {}, {}
    for name, rounds in found.items():
        seconds = [sum(each["seconds"][WARMUP_STEPS:]) for each in rounds]
        speed[name] = tokens / statistics.median(seconds)
        memory[name] = statistics.median(each["memory_gib"] for each in rounds)
    base = "trl" if "trl" in found else next(iter(found))
    print(f"after round {min(map(len, found.values()))}")
    print("| arm | trained | tokens/s | × | peak memory, GiB | × | loss, step 1 | gradient norm |")
    print("|---|---|---|---|---|---|---|---|")
    for name, rounds in found.items():
        print(
            f"| {LABELS[name]} | {rounds[0]['share']:.2%} | {speed[name]:.0f} | "
            f"{speed[name] / speed[base]:.2f} | {memory[name]:.2f} | "
            f"{memory[name] / memory[base]:.2f} | {rounds[0]['loss']:.6f} | "
            f"{rounds[0]['grad_norm']:.5f} |"
        )
    of_lora = [name for name in found if name != "full"]
    wrong = [
        f"{LABELS[name]} ({key})"
        for name in of_lora for key, bound in SAME_WORK.items()
        if not abs(found[name][0][key] / found[of_lora[0]][0][key] - 1) <= bound
    ]  # fmt: skip
    print(f"NOT the same work: {', '.join(wrong)}" if wrong else "same loss and gradient: yes")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=[*LABELS], default=["full", "lora", "trl"])
    options = parser.parse_args()

    from rich.progress import track

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.arms}
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        folder = Path(temporary).resolve()
        data = choose_rows(options.data, folder / "rows.jsonl")
        tokens, adapter = folder / "tokens.jsonl", folder / "adapter"
        sizes = write_tokens(options.model, data, tokens, folder)
        run_part("--adapter", options.model, str(options.rank), str(adapter))
        turns = [(turn, name) for turn in range(options.rounds) for name in options.arms]
        for turn, name in track(turns, "training"):
            if name in OURS:
                result = run_ours(name, options.model, data, folder / str(turn), adapter)
            else:
                result = run_part("--trl", name, options.model, str(tokens), str(adapter))
            found[name].append(result)
            if name == options.arms[-1]:  # a round is whole: what is known so far
                report(found, sizes)


PARTS = {"--adapter": make_adapter, "--trl": train_trl}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in PARTS:
        print("\n" + json.dumps(PARTS[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
