"""The key that was probably meant: other frameworks' words, spelling mistakes, and flags."""

from __future__ import annotations

import difflib

from cs336_alignment.config import ALL_KEYS

# Hydra's own flags: those alone, and those that take a value.
FLAGS = frozenset({
    "--help", "-h", "--hydra-help", "--version", "--resolve", "--multirun", "-m", "--run", "-r",
    "--shell-completion", "-sc",
})  # fmt: skip
VALUE_FLAGS = frozenset({
    "--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--info", "-i",
})  # fmt: skip
# Spellings of other frameworks whose nearest key by letters would be the wrong one.
ALIASES = {
    "per_device_train_batch_size": "trainer.global_batch_size",
    "micro_batch_size": "trainer.global_batch_size",
    "batch_size": "trainer.global_batch_size",
    "lr": "optimizer.learning_rate",
    "epochs": "trainer.num_train_epochs",
    "num_epochs": "trainer.num_train_epochs",
    "model": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "base_model": "model.name_or_path",
    "dataset": "data.train_path",
    "dataset_name": "data.train_path",
    "train_file": "data.train_path",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "output_dir": "output_root",
    "resume_from_checkpoint": "trainer.resume",
    "report_to": "logger",
    "clip_grad_norm": "optimizer.max_grad_norm",
    "scheduler": "optimizer.lr_scheduler_type",
    "rank": "lora.r",
    "target": "lora.target_modules",
    "model_dir": "lora.adapter_path",
    "use_peft": "lora.r",
    "finetuning_type": "lora.r",
    "additional_target": "lora.modules_to_save",
    "use_dora": "lora.dora",
    "peft_use_dora": "lora.dora",
    "use_rslora": "lora.rslora",
    "load_in_4bit": "lora.quantize",
    "quantization_bit": "lora.quantize",
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
}


def nearest_key(key: str) -> str | None:
    """Find the key that was probably meant: another framework's word for it, or the nearest
    spelling.

    Example:
        >>> nearest_key("trainer.learning_rat")
        'optimizer.learning_rate'
        >>> nearest_key("lr")
        'optimizer.learning_rate'
    """
    leaf = key.rsplit(".", 1)[-1].replace("-", "_").removeprefix("lora_")
    if key in ALL_KEYS:
        return key
    if leaf in ALIASES:
        return ALIASES[leaf]
    by_leaf = {full.rsplit(".", 1)[-1]: full for full in reversed(ALL_KEYS)}
    if key not in by_leaf and (
        matches := difflib.get_close_matches(key, ALL_KEYS, n=1, cutoff=0.85)
    ):
        return matches[0]
    if matches := difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.6):
        return by_leaf[matches[0]]
    return None
