"""Every key a run has: its type, its default and the values it may take. Imports no torch, no
OmegaConf.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cs336_alignment.errors import ExitStatus, UserError, UserErrors, describe

MISSING = "???"  # OmegaConf's mark for a value that must be given

LOSS_NORMALIZATIONS = ("token", "sequence", "microbatch", "constant")
BATCHINGS = ("auto", "flat", "padded")
PRECISIONS = ("auto", "fp32", "bf16")
OVERLONG = ("drop", "truncate", "error")
SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")
LOGGERS = ("wandb", "none")
REWARDS = ("r1_zero",)
DEFAULT_MICROBATCH_TOKENS = 4096
DEFAULT_WARMUP_RATIO = 0.03
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,150}")


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
    leaf = key.rsplit(".", 1)[-1].replace("-", "_")
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


@dataclass(frozen=True)
class _Rule:
    key: str
    holds: Callable[[Any], bool]
    expected: str


def _at_least(low: float) -> Callable[[Any], bool]:
    return lambda value: math.isfinite(value) and value >= low


def _above(low: float) -> Callable[[Any], bool]:
    return lambda value: math.isfinite(value) and value > low


def _one_of(key: str, allowed: tuple[str, ...]) -> _Rule:
    return _Rule(key, lambda value: value in allowed, "one of " + ", ".join(allowed))


# A value of None passes: the schema says where None is allowed at all.
_RULES = (
    _Rule(
        "run_name",
        lambda v: bool(RUN_NAME.fullmatch(v)),
        "letters, digits, '.', '_' and '-', "
        "beginning with a letter or digit, at most 150 characters",
    ),
    _Rule("output_root", lambda v: bool(v.strip()), "a folder"),
    _Rule("seed", lambda v: 0 <= v < 2**63, "a whole number from 0 to 2**63 - 1"),
    _Rule("model.name_or_path", lambda v: bool(v.strip()), "a hub id or a local folder"),
    _Rule("data.train_path", lambda v: bool(v.strip()), "a file or a hub id"),
    _Rule("data.eval_path", lambda v: bool(v.strip()), "a file, a hub id or null"),
    _Rule("data.max_train_examples", _at_least(1), "a whole number of at least 1, or null"),
    _Rule("data.max_eval_examples", _at_least(1), "a whole number of at least 1, or null"),
    _Rule("data.max_length", _at_least(2), "a whole number of at least 2 tokens"),
    _one_of("data.overlong", OVERLONG),
    _Rule("data.prompt_template", lambda v: bool(v.strip()), "a template's name or a .prompt file"),
    _Rule("trainer.global_batch_size", _at_least(1), "a whole number of at least 1"),
    _Rule("trainer.microbatch_tokens", _at_least(1), "a whole number of at least 1, or null"),
    _Rule(
        "trainer.gradient_accumulation_steps", _at_least(1), "a whole number of at least 1, or null"
    ),
    _Rule("trainer.num_train_epochs", _above(0), "a number above 0"),
    _Rule("trainer.max_steps", _at_least(1), "a whole number of at least 1, or null"),
    _one_of("trainer.loss_normalization", LOSS_NORMALIZATIONS),
    _Rule("trainer.normalize_constant", _above(0), "a finite number above 0"),
    _one_of("trainer.batching", BATCHINGS),
    _one_of("trainer.precision", PRECISIONS),
    _Rule("trainer.logging_steps", _at_least(0), "a whole number of at least 0 (0 = never)"),
    _Rule(
        "trainer.eval_steps",
        _at_least(0),
        "a whole number of at least 0 (0 = only at start and end)",
    ),
    _Rule(
        "trainer.save_steps",
        _at_least(0),
        "a whole number of at least 0 (0 = only on stop and end)",
    ),
    _Rule("trainer.save_total_limit", _at_least(1), "a whole number of at least 1"),
    _Rule("trainer.resume", lambda v: bool(v.strip()), "auto, never or the path of a checkpoint"),
    _Rule("trainer.max_hours", _above(0), "a number above 0, or null"),
    _Rule("optimizer.learning_rate", _at_least(0), "a finite number of at least 0"),
    _Rule(
        "optimizer.betas",
        lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v),
        "two numbers from 0 to below 1",
    ),
    _Rule("optimizer.eps", _above(0), "a finite number above 0"),
    _Rule("optimizer.weight_decay", _at_least(0), "a finite number of at least 0"),
    _Rule("optimizer.max_grad_norm", _above(0), "a finite number above 0"),
    _one_of("optimizer.lr_scheduler_type", SCHEDULES),
    _Rule("optimizer.warmup_ratio", lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    _Rule("optimizer.warmup_steps", _at_least(0), "a whole number of at least 0, or null"),
    _one_of("parallel.strategy", ("ddp",)),
    _Rule("parallel.num_processes", _at_least(1), "a whole number of at least 1, or null"),
    _Rule(
        "evaluation.generation_steps",
        _at_least(0),
        "a whole number of at least 0 (0 = only at start and end), or null for never",
    ),
    _Rule("evaluation.num_prompts", _at_least(1), "a whole number of at least 1, or null for all"),
    _Rule("evaluation.max_new_tokens", _at_least(1), "a whole number of at least 1"),
    _Rule("evaluation.temperature", _at_least(0), "a finite number of at least 0 (0 = greedy)"),
    _Rule("evaluation.batch_size", _at_least(1), "a whole number of at least 1"),
    _Rule(
        "evaluation.stop", lambda v: all(isinstance(s, str) and s for s in v), "non-empty strings"
    ),
    _one_of("evaluation.reward", REWARDS),
    _one_of("logger.backend", LOGGERS),
    _Rule("logger.project", lambda v: bool(v.strip()), "a project's name"),
)


def check(config: Config) -> None:
    """Refuse values out of range and options that do not combine.

    Args:
        config: a config whose types the schema has already checked.

    Raises:
        UserErrors: every mistake at once, exit status 78.
    """
    values = dict(flatten(config))
    errors = [
        UserError(
            "C103",
            f"{rule.key} has a value that it cannot take",
            ExitStatus.BAD_CONFIG,
            expected=rule.expected,
            got=describe(values[rule.key]),
            hint=f"{rule.key}=…",
        )
        for rule in _RULES
        if values[rule.key] is not None and not rule.holds(values[rule.key])
    ]
    errors += _clashes(config)
    if errors:
        raise UserErrors(errors)


def _clashes(config: Config) -> Iterator[UserError]:
    trainer, optimizer, model = config.trainer, config.optimizer, config.model
    if trainer.microbatch_tokens is not None and trainer.gradient_accumulation_steps is not None:
        yield clash(
            "trainer.microbatch_tokens",
            "trainer.gradient_accumulation_steps",
            "both say how a step is cut into microbatches; set one of them to null",
        )
    if optimizer.warmup_steps is not None and optimizer.warmup_ratio != DEFAULT_WARMUP_RATIO:
        yield warmup_clash()
    if trainer.normalize_constant != 1.0 and trainer.loss_normalization != "constant":
        yield clash(
            "trainer.normalize_constant",
            "trainer.loss_normalization",
            "the constant is read only by trainer.loss_normalization=constant",
        )
    if model.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
        yield clash(
            "model.trust_remote_code",
            "model.revision",
            "code from the hub runs only at a pinned commit: model.revision=<40 hex digits>",
        )


def clash(first: str, second: str, why: str) -> UserError:
    """Build the error for two options that do not combine, naming both."""
    return UserError(
        "C104", f"{first} and {second} do not combine", ExitStatus.BAD_CONFIG, hint=why
    )


def warmup_clash() -> UserError:
    """Build the error for two warmups, which two modules can notice."""
    return clash(
        "optimizer.warmup_steps",
        "optimizer.warmup_ratio",
        "both say how long the warmup is; give one (optimizer.warmup_steps=null to use the ratio)",
    )
