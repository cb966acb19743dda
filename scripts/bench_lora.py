"""LoRA and sharding here beside full fine-tuning here and beside TRL with peft: the same weights,
rows, order, batch, optimizer and precision, and all LoRA arms begin with the same adapter.

    python scripts/bench_lora.py MODEL train.jsonl [--rank 16] [--rounds 3] [--arms full lora trl]

On a GPU, all that it is for:

    python scripts/bench_lora.py MODEL train.jsonl --precision bf16 \\
        --arms full fsdp2 fsdp2_offload lora lora_compiled trl qlora trl_qlora

MODEL is a model folder, the file holds GSM8K rows; TRL comes with the extra `bench`, 4-bit weights
with `quantize`. Every arm is a fresh process, this project's by its own command line, and the arms
take turns. Prints a table of medians with the loss and gradient norm of step 1 beside every speed
(memory: of the GPU where there is one, else of the process), and says whether the arms that train
the same do the same work.
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
    "fsdp2": "this project, all weights, FSDP2 in one process",
    "fsdp2_offload": "this project, all weights, FSDP2 in one process, CPU offload",
    "lora": "this project, LoRA",
    "lora_compiled": "this project, LoRA, compiled layers",
    "lora_checkpointing": "this project, LoRA, checkpointing",
    "trl": "TRL + peft, no checkpointing",
    "trl_checkpointing": "TRL + peft, checkpointing",
    "qlora": "this project, QLoRA",
    "trl_qlora": "TRL + peft, QLoRA, no checkpointing",
}
OURS = {
    "full": [],
    "fsdp2": ["parallel=fsdp2"],
    "fsdp2_offload": ["parallel=fsdp2", "parallel.cpu_offload=true"],
    "lora": [],
    "lora_compiled": ["trainer.compile=true"],
    "lora_checkpointing": ["trainer.gradient_checkpointing=true"],
    "qlora": ["lora.quantize=nf4"],
}
# What trains the same weights from the same start, and so has to do the same work.
ALIKE = (
    ("full", "fsdp2", "fsdp2_offload"),
    ("lora", "lora_compiled", "lora_checkpointing", "trl", "trl_checkpointing"),
    ("qlora", "trl_qlora"),
)
SAME_BF16 = {"loss": 1e-2, "grad_norm": 5e-2}


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


def train_trl(name: str, model: str, tokens: str, adapter: str, precision: str) -> dict[str, Any]:
    """Train the adapter in this process with SFTTrainer, on the tokens that this project made."""
    import datasets
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    watch = clock()
    loading: dict[str, Any] = {}
    if name == "trl_qlora":
        compute = torch.bfloat16 if precision == "bf16" else torch.float32
        loading["device_map"] = {"": 0}
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )  # fmt: skip
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **loading)
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
                train_sampling_strategy="sequential", bf16=precision == "bf16",
                gradient_checkpointing=name == "trl_checkpointing",
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


def run_ours(
    name: str, model: str, data: str, folder: Path, adapter: Path, precision: str
) -> dict[str, Any]:
    """Train with this project's command line."""
    lora = [] if name in ALIKE[0] else [f"lora.adapter_path={adapter}"]
    overrides = [*OURS[name], *lora, "trainer.reload_check=false", f"trainer.precision={precision}"]
    result = train_ours(name, model, data, folder, overrides)
    made_of = json.loads((folder / name / "manifest.json").read_text())
    return result | {"share": made_of["trainable_parameters"] / made_of["parameters"]}


def report(
    found: dict[str, list[dict[str, Any]]], sizes: list[tuple[int, int]], bounds: dict[str, float]
) -> None:
    """Print the table, and whether the arms that train the same do the same work."""
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
    groups = [[name for name in alike if name in found] for alike in ALIKE]
    wrong = [
        f"{LABELS[name]} ({key})"
        for alike in groups for name in alike for key, bound in bounds.items()
        if not abs(found[name][0][key] / found[alike[0]][0][key] - 1) <= bound
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
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--arms", nargs="+", choices=[*LABELS], default=["full", "lora", "trl"])
    options = parser.parse_args()
    bounds = SAME_BF16 if options.precision == "bf16" else SAME_WORK

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
                place = folder / str(turn)
                result = run_ours(name, options.model, data, place, adapter, options.precision)
            else:
                result = run_part(
                    "--trl", name, options.model, str(tokens), str(adapter), options.precision
                )
            found[name].append(result)
            if name == options.arms[-1]:  # a round is whole: what is known so far
                report(found, sizes, bounds)


PARTS = {"--adapter": make_adapter, "--trl": train_trl}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in PARTS:
        print("\n" + json.dumps(PARTS[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
