"""Every key a run has: its type and its default. Imports no torch, no OmegaConf."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

MISSING = "???"  # OmegaConf's mark for a value that must be given

# What two modules check with.
FORMATS = (
    "auto", "messages", "sharegpt", "prompt_response", "question_answer", "alpaca", "math",
    "multiple_choice", "tokens", "text",
)  # fmt: skip
REWARDS = ("r1_zero", "gsm8k", "exact_match", "multiple_choice")

DEFAULT_MICROBATCH_TOKENS = 4096


@dataclass
class ModelConfig:
    """Which model is trained."""

    name_or_path: str = MISSING
    revision: str | None = None
    trust_remote_code: bool = False
    random_init: bool = False
    freeze: list[str] = field(default_factory=list)
    new_tokens: list[str] = field(default_factory=list)


@dataclass
class LoraConfig:
    """Adapters that are trained instead of all weights."""

    r: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: Any = "all-linear"
    modules_to_save: list[str] = field(default_factory=list)
    dora: bool = False
    rslora: bool = False
    quantize: str | None = None
    adapter_path: str | None = None
    export: str = "both"

    @property
    def active(self) -> bool:
        """Whether adapters are trained at all."""
        return self.r is not None or self.adapter_path is not None


@dataclass
class ColumnsConfig:
    """Which column plays a role, where it is not called as formats expect."""

    messages: str | None = None
    conversations: str | None = None
    prompt: str | None = None
    response: str | None = None
    question: str | None = None
    problem: str | None = None
    solution: str | None = None
    choices: str | None = None
    answer: str | None = None
    instruction: str | None = None
    input: str | None = None
    input_ids: str | None = None
    labels: str | None = None
    text: str | None = None
    tools: str | None = None
    system: str | None = None
    weight: str | None = None
    ground_truth: str | None = None


@dataclass
class SourceConfig:
    """One source of several."""

    path: str = MISSING
    weight: float | None = None
    format: str = "auto"
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)


@dataclass
class LintConfig:
    """What is done about each thing that is found in the data: `error`, `warning` or `off`."""

    no_trained_token: str = "error"
    no_stop_token: str = "warning"
    doubled_bos: str = "error"
    moved_boundary: str = "warning"
    changed_text: str = "warning"
    trained_scaffolding: str = "error"
    duplicate_rows: str = "warning"
    eval_overlap: str = "warning"
    ignored_keys: str = "warning"
    special_text: str = "warning"
    empty_turn: str = "error"


@dataclass
class DataConfig:
    """Which rows are trained on and evaluated, and how they become tokens."""

    train_path: str = MISSING
    eval_path: str | None = None
    eval_fraction: float = 0.0
    sources: list[SourceConfig] = field(default_factory=list)
    mixture_stop: str = "first_exhausted"
    max_train_examples: int | None = None
    max_eval_examples: int | None = None
    shuffle: bool = True
    format: str = "auto"
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    train_on: str = "response"
    max_length: int = 2048
    overlong: str = "drop"
    prompt_template: str = "r1_zero"
    add_special_tokens: bool = True
    append_eos: bool = True
    on_bad_row: str = "error"
    max_bad_fraction: float = 0.01
    filter: str = "none"
    num_workers: int | None = None
    cache_dir: str | None = None
    lint: LintConfig = field(default_factory=LintConfig)


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
    loss: str = "nll"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    neftune_alpha: float | None = None
    ema_decay: float | None = None
    batching: str = "auto"
    precision: str = "auto"
    gradient_checkpointing: bool | str = False
    compile: bool = False
    logging_steps: int = 1
    eval_steps: int = 0
    save_steps: int = 100
    save_total_limit: int = 2
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    early_stopping_patience: int | None = None
    reload_check: bool = True
    resume: str = "auto"
    async_save: bool = False
    max_hours: float | None = None
    loss_spike: str = "warn"
    loss_spike_nats: float = 2.0
    watchdog_minutes: float | None = 15.0


@dataclass
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    name: str = "adamw"
    learning_rate: float = 2e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    state_bits: int = 32
    muon_momentum: float = 0.95
    layer_lr_decay: float = 1.0
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None


@dataclass
class ParallelConfig:
    """How processes share the work."""

    strategy: str = "ddp"
    num_processes: int | None = None
    timeout_minutes: float = 30.0
    reshard_after_forward: bool = True
    shard_gradients: bool = True
    cpu_offload: bool = False


@dataclass
class EvaluationConfig:
    """Generation on held-out prompts, while training and in `cs336-sft evaluate`."""

    generation_steps: int | None = None
    num_prompts: int | None = 64
    num_samples: int = 1
    max_new_tokens: int = 512
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 16
    stop: list[str] = field(default_factory=lambda: ["</answer>"])
    reward: str = "r1_zero"
    reward_seconds: float = 10.0
    allow_custom_reward: bool = False
    baseline: str | None = None
    backend: str = "transformers"
    server_url: str = "http://127.0.0.1:8000/v1"
    server_model: str | None = None
    server_api: str = "completions"
    server_concurrency: int = 32
    server_timeout: float = 600.0
    server_retries: int = 5


@dataclass
class InspectConfig:
    """Which examples `cs336-sft inspect` shows."""

    select: str = "first"
    num_examples: int = 3
    rows: list[int] = field(default_factory=list)


@dataclass
class ExportConfig:
    """What `cs336-sft export` writes of a run, and where."""

    checkpoint: str | None = None
    format: str = "hf"
    dtype: str = "fp32"
    max_shard_size: str = "5GB"
    chat_template: str = "trained"
    gguf_type: str | None = None
    gguf_converter: str | None = None
    output_dir: str | None = None


@dataclass
class HubConfig:
    """Where `model/` goes at the end of a run, and what `cs336-sft export` wrote."""

    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool = True


@dataclass
class ExpertIterationConfig:
    """What `cs336-sft expert-iteration` samples and keeps."""

    iterations: int = 2
    num_questions: int | None = None
    num_samples: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    metric_for_best_model: str | None = None


@dataclass
class SweepConfig:
    """What `cs336-sft sweep` tries."""

    space: dict[str, Any] = field(default_factory=dict)
    num_trials: int = 20
    metric: str = "eval/loss"
    greater_is_better: bool | None = None
    prune: bool = True


@dataclass
class LoggerConfig:
    """Where metrics go besides the console and metrics.jsonl."""

    backend: str = "wandb"
    project: str = "cs336-sft"
    entity: str | None = None
    group: str | None = None


@dataclass
class Config:
    """One run, whole. What puts runs together takes it, all else a section or plain values."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    inspect: InspectConfig = field(default_factory=InspectConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    expert_iteration: ExpertIterationConfig = field(default_factory=ExpertIterationConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    run_name: str | None = None  # null: the names of model and data, joined
    output_root: str = "outputs"
    seed: int = 42


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of a config dataclass as (`section.key`, value), in the order of the
    schema.
    """
    for item in fields(config):
        name, value = f"{prefix}{item.name}", getattr(config, item.name)
        if is_dataclass(value):
            yield from flatten(value, f"{name}.")
        elif isinstance(value, list):
            yield name, [asdict(v) if isinstance(v, SourceConfig) else v for v in value]
        else:
            yield name, value


ALL_KEYS = tuple(key for key, _ in flatten(Config()))
