"""Every key a run has: its type and its default. Imports no torch, no OmegaConf."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MISSING = "???"  # OmegaConf's mark for a value that must be given

DEFAULT_MICROBATCH_TOKENS = 4096
DEFAULT_WARMUP_RATIO = 0.03


@dataclass
class ModelConfig:
    """Which model is trained."""

    name_or_path: str = MISSING
    revision: str | None = None
    trust_remote_code: bool = False
    random_init: bool = False


@dataclass
class DataConfig:
    """Which rows are trained on and evaluated, and how they become tokens."""

    train_path: str = MISSING
    eval_path: str | None = None
    max_train_examples: int | None = None
    max_eval_examples: int | None = None
    shuffle: bool = True
    max_length: int = 2048
    overlong: str = "drop"
    prompt_template: str = "r1_zero"
    add_special_tokens: bool = True
    append_eos: bool = True


@dataclass
class TrainerConfig:
    """How the loop runs: batches, lengths, cadences, precision."""

    global_batch_size: int = 32
    microbatch_tokens: int | None = None
    gradient_accumulation_steps: int | None = None
    num_train_epochs: float = 3.0
    max_steps: int | None = None
    loss_normalization: str = "token"
    normalize_constant: float = 1.0
    batching: str = "auto"
    precision: str = "auto"
    gradient_checkpointing: bool = False
    logging_steps: int = 1
    eval_steps: int = 0
    save_steps: int = 100
    save_total_limit: int = 2
    resume: str = "auto"
    max_hours: float | None = None


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 2e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = DEFAULT_WARMUP_RATIO
    warmup_steps: int | None = None


@dataclass
class ParallelConfig:
    """How processes share the work."""

    strategy: str = "ddp"
    num_processes: int | None = None


@dataclass
class EvaluationConfig:
    """Generation on held-out prompts, while training and in `cs336-sft evaluate`."""

    generation_steps: int | None = None
    num_prompts: int | None = 64
    max_new_tokens: int = 512
    temperature: float = 0.0
    batch_size: int = 16
    stop: list[str] = field(default_factory=lambda: ["</answer>"])
    reward: str = "r1_zero"


@dataclass
class LoggerConfig:
    """Where metrics go besides the console and metrics.jsonl."""

    backend: str = "wandb"
    project: str = "cs336-sft"
    entity: str | None = None
    group: str | None = None


@dataclass
class Config:
    """One run, whole. Functions receive a section or plain values of it, never the root."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    run_name: str | None = None  # null: the names of model and data, joined
    output_root: str = "outputs"
    seed: int = 42


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of a config dataclass as (`section.key`, value), in the order of the
    schema.
    """
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


ALL_KEYS = tuple(key for key, _ in flatten(Config()))
