"""The key that was probably meant: other frameworks' words, spelling mistakes, and flags."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from cs336_alignment.config import ALL_KEYS, Config, flatten

# Hydra's own flags: those alone, and those that take a value.
FLAGS = frozenset({
    "--help", "-h", "--hydra-help", "--version", "--resolve", "--multirun", "-m", "--run", "-r",
    "--shell-completion", "-sc",
})  # fmt: skip
VALUE_FLAGS = frozenset({
    "--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--info", "-i",
})  # fmt: skip
# Other frameworks' words for a key, or for a whole override where their value says nothing here.
ALIASES = {
    "per_device_train_batch_size": "trainer.global_batch_size",
    "micro_batch_size": "trainer.global_batch_size",
    "train_batch_size": "trainer.global_batch_size",
    "batch_size": "trainer.global_batch_size",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "eval_batch_size": "evaluation.batch_size",
    "grad_accum": "trainer.gradient_accumulation_steps",
    "lr": "optimizer.learning_rate",
    "epochs": "trainer.num_train_epochs",
    "num_epochs": "trainer.num_train_epochs",
    "model": "model.name_or_path",
    "model_path": "model.name_or_path",
    "model_name": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "base_model": "model.name_or_path",
    "dataset": "data.train_path",
    "dataset_name": "data.train_path",
    "dataset_path": "data.train_path",
    "data_path": "data.train_path",
    "train_data": "data.train_path",
    "train_dataset": "data.train_path",
    "train_file": "data.train_path",
    "eval_data": "data.eval_path",
    "eval_dataset": "data.eval_path",
    "eval_file": "data.eval_path",
    "validation_file": "data.eval_path",
    "val_size": "data.eval_fraction",
    "val_set_size": "data.eval_fraction",
    "test_size": "data.eval_fraction",
    "max_samples": "data.max_train_examples",
    "max_train_samples": "data.max_train_examples",
    "max_eval_samples": "data.max_eval_examples",
    "cutoff_len": "data.max_length",
    "max_seq_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "template": "data.prompt_template",
    "chat_template": "data.prompt_template=chat",
    "dataset_text_field": "data.columns.text",
    "text_column": "data.columns.text",
    "train_on_inputs": "data.train_on=all",
    "train_on_prompt": "data.train_on=all",
    "completion_only_loss": "data.train_on=response",
    "assistant_only_loss": "data.train_on=assistant",
    "num_proc": "data.num_workers",
    "workers": "data.num_workers",
    "dataloader_num_workers": "data.num_workers",
    "preprocessing_num_workers": "data.num_workers",
    "output_dir": "output_root",
    "resume_from_checkpoint": "trainer.resume",
    "report_to": "logger",
    "wandb_project": "logger.project",
    "project_name": "logger.project",
    "eval_strategy": "trainer.eval_steps=100",
    "evaluation_strategy": "trainer.eval_steps=100",
    "do_eval": "trainer.eval_steps=100",
    "save_strategy": "trainer.save_steps=100",
    "load_best_model_at_end": "trainer.metric_for_best_model=eval/loss",
    "mixed_precision": "trainer.precision",
    "torch_dtype": "trainer.precision",
    "dtype": "trainer.precision",
    "torch_compile": "trainer.compile",
    "gradient_checkpoint": "trainer.gradient_checkpointing",
    "activation_checkpointing": "trainer.gradient_checkpointing",
    "gradient_clipping": "optimizer.max_grad_norm",
    "clip_grad_norm": "optimizer.max_grad_norm",
    "scheduler": "optimizer.lr_scheduler_type",
    "lr_scheduler": "optimizer.lr_scheduler_type",
    "warmup": "optimizer.warmup_steps",
    "deepspeed": "parallel=fsdp2",
    "fsdp": "parallel=fsdp2",
    "ddp_timeout": "parallel.timeout_minutes",
    "rank": "lora.r",
    "target": "lora.target_modules",
    "model_dir": "lora.adapter_path",
    "use_peft": "lora.r=16",
    "finetuning_type": "lora.r=16",
    "additional_target": "lora.modules_to_save",
    "use_dora": "lora.dora",
    "peft_use_dora": "lora.dora",
    "use_rslora": "lora.rslora",
    "load_in_4bit": "lora.quantize=nf4",
    "quantization_bit": "lora.quantize=nf4",
    "qlora": "lora.quantize=nf4",
    "adapter_name_or_path": "lora.adapter_path",
    "unfrozen_parameters": "model.freeze",
    "freeze_layers": "model.freeze",
    "add_tokens": "model.new_tokens",
    "optim": "optimizer.name",
    "optimizer_name": "optimizer.name",
    "neftune_noise_alpha": "trainer.neftune_alpha",
    "noisy_embedding_alpha": "trainer.neftune_alpha",
    "label_smoothing_factor": "trainer.label_smoothing",
    "z_loss_coefficient": "trainer.z_loss",
    "layerwise_lr_decay": "optimizer.layer_lr_decay",
    "use_dft_loss": "trainer.loss",
    "loss_type": "trainer.loss",
    "adam_epsilon": "optimizer.eps",
    "adam_beta1": "optimizer.betas=[0.9,0.999]",
    "adam_beta2": "optimizer.betas=[0.9,0.999]",
}
PACKED = "leave it out: trainer.batching=auto lays rows one behind the other, without padding"
KERNEL = "leave it out: what the device has is chosen; `cs336-sft env` prints it"
VERBS = "the verb says it: cs336-sft train, or cs336-sft evaluate"
WHOLE = "lora.quantize=nf4 keeps weights in 4 bits, optimizer.state_bits=8 AdamW's state in 8"
# Their words for what no key does here, and what stands in its place.
SENTENCES = {
    "packing": PACKED,
    "sample_packing": PACKED,
    "group_by_length": PACKED,
    "attn_implementation": KERNEL,
    "flash_attn": KERNEL,
    "use_flash_attention_2": KERNEL,
    "use_liger_kernel": "leave it out: the head's logits are made in chunks as they are needed",
    "bf16": "type trainer.precision=bf16 (auto chooses it where the GPU has it)",
    "fp16": "type trainer.precision=bf16, or leave it out: fp16 is for exports",
    "load_in_8bit": WHOLE,
    "do_train": VERBS,
    "do_predict": VERBS,
    "save_only_model": "model/ is the model alone; a checkpoint holds what going on needs",
    "plot_loss": "leave it out: every run leaves loss.png and report.html",
    "overwrite_output_dir": "a run is never overwritten: type another run_name=…",
    "pad_token": "leave it out: a tokenizer needs none here",
    "tokenizer_name": "the tokenizer is that of model.name_or_path",
    "hub_token": "set HF_TOKEN in the environment, or type `hf auth login`",
    "streaming": "leave it out: prepared rows are read from the disk as they are needed",
}
# transformers' names of optimizers that are AdamW here.
OPTIMIZERS = {
    **dict.fromkeys(
        ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"),
        "optimizer.state_bits=8",
    ),
    **dict.fromkeys(
        ("adamw_torch", "adamw_torch_fused", "adamw_hf", "paged_adamw_32bit"),
        "optimizer.name=adamw",
    ),
}  # fmt: skip
OFF = ("false", "no", "none", "null", "0")


def nearest_key(key: str) -> str | None:
    """Find the key that was probably meant: another framework's word for it, or the nearest
    spelling.

    Example:
        >>> nearest_key("trainer.learning_rat")
        'optimizer.learning_rate'
        >>> nearest_key("lr")
        'optimizer.learning_rate'
        >>> nearest_key("model.name")
        'model.name_or_path'
    """
    leaf = _leaf(key)
    if key in ALL_KEYS:
        return key
    if leaf in ALIASES:
        return ALIASES[leaf].partition("=")[0]
    if leaf in SENTENCES:
        return None
    if "." in key and len(begun := [full for full in ALL_KEYS if full.startswith(key)]) == 1:
        return begun[0]
    by_leaf = {full.rsplit(".", 1)[-1]: full for full in reversed(ALL_KEYS)}
    if key not in by_leaf and (
        matches := difflib.get_close_matches(key, ALL_KEYS, n=1, cutoff=0.85)
    ):
        return matches[0]
    # A hint that is wrong costs more than none, so what is merely alike is none.
    if matches := difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.82):
        return by_leaf[matches[0]]
    return None


def what_was_meant(key: str, value: str | None = None) -> str | None:
    """Write the hint for a key that does not exist.

    Args:
        key: as typed, or the name of a flag.
        value: of a flag; None: the key stood in an override or a file.

    Returns:
        None: nothing is near.

    Example:
        >>> what_was_meant("load_in_4bit", "true")
        'type lora.quantize=nf4'
        >>> what_was_meant("optim", "adamw_8bit")
        'type optimizer.state_bits=8'
        >>> what_was_meant("trainer.max_step")
        'did you mean trainer.max_steps?'
    """
    leaf, near = _leaf(key), nearest_key(key)
    if near is None:
        return SENTENCES.get(leaf)
    whole = ALIASES.get(leaf, "")
    if value is None:
        return f"did you mean {whole or near}?"
    if near == "optimizer.name" and value in OPTIMIZERS:
        return f"type {OPTIMIZERS[value]}"
    if "=" in whole:
        return f"type {whole}" if value.lower() not in OFF else f"leave it out: {near} is as it was"
    return f"type {near}={value}"


def _leaf(key: str) -> str:
    return key.rsplit(".", 1)[-1].replace("-", "_").removeprefix("lora_")


def with_default(key: str) -> str:
    """Show a key with its default.

    Example:
        >>> with_default("optimizer.eps")
        'optimizer.eps=1e-08 is its default'
        >>> with_default("data.sources[0].path")
        'data.sources[0].path=…'
    """
    defaults = dict(flatten(Config()))
    return f"{key}={json.dumps(defaults[key])} is its default" if key in defaults else f"{key}=…"


def as_preset(file: Path) -> str:
    """Say how a config in a file is given.

    Example:
        >>> as_preset(Path("my/run.yaml"))
        'put the file at my/experiment/run.yaml and type: --config-dir my experiment=run'
        >>> as_preset(Path("my/experiment/run.yaml"))
        'type: --config-dir my experiment=run'
    """
    is_there = file.parent.name == "experiment"
    folder = file.parent.parent if is_there else file.parent
    put = "" if is_there else f"put the file at {folder}/experiment/{file.stem}.yaml and "
    return f"{put}type: --config-dir {folder} experiment={file.stem}"
