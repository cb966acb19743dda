"""Values that keys may take."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cs336_alignment.config import ALL_KEYS, FORMATS, REWARDS, Config, flatten
from cs336_alignment.config_clashes import clashes
from cs336_alignment.config_names import with_default
from cs336_alignment.errors import UserError, UserErrors, describe

LOSS_NORMALIZATIONS = ("token", "sequence", "microbatch", "constant")
LOSSES = ("nll", "dft")
BATCHINGS = ("auto", "flat", "flat_shared_prefix", "padded")
LOSS_SPIKES = ("off", "warn", "stop", "skip")
PRECISIONS = ("auto", "fp32", "bf16")
OVERLONG = ("drop", "truncate", "split", "error")
TRAIN_ON = ("response", "assistant", "last_turn", "all")
MIXTURE_STOPS = ("first_exhausted", "all_exhausted")
SECRET_WORDS = {"token", "key", "secret", "password", "passwd", "credential", "credentials"}
SECRET_LENGTH = 8  # shorter ones are found in ordinary words
SECRET_SHAPE = re.compile(  # Hugging Face, GitHub, OpenAI and others, AWS; a password in a URL
    r"\b(hf_\w{16,}|gh[pousr]_\w{16,}|sk-[\w-]{16,}|AKIA[0-9A-Z]{16})\b|://[^/\s:@]+:[^/\s@]+@"
)
SELECTIONS = ("first", "longest", "random", "findings")
LEVELS = ("error", "warning", "off")
OPTIMIZERS = ("adamw", "adafactor", "muon", "schedule_free")
SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")
LOGGERS = ("wandb", "none")
LORA_EXPORTS = ("both", "merged", "adapter")
EXPORT_FORMATS = ("hf", "adapter", "gguf", "jsonl", "parquet")
REPO_ID = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}")
BACKENDS = ("transformers", "server", "vllm")
SERVER_APIS = ("completions", "chat")
CUSTOM_REWARD = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,150}")


@dataclass(frozen=True)
class _Rule:
    key: str
    holds: Callable[[Any], bool]
    expected: str


def _at_least(low: float) -> Callable[[Any], bool]:
    return lambda value: math.isfinite(value) and value >= low


def _above(low: float) -> Callable[[Any], bool]:
    return lambda value: math.isfinite(value) and value > low


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return isinstance(value, str) and bool(value.strip())


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v.strip() for v in value)


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
    _Rule("model.freeze", lambda v: all(map(_is_pattern, v)), "a list of regular expressions"),
    _Rule(
        "model.new_tokens",
        lambda v: all(token.strip() for token in v) and len({*v}) == len(v),
        "a list of tokens, each once",
    ),
    _Rule("lora.r", _at_least(1), "a whole number of at least 1, or null to train all weights"),
    _Rule("lora.alpha", _above(0), "a number above 0, or null for twice the rank"),
    _Rule("lora.dropout", lambda v: 0 <= v < 1, "a number from 0 to below 1"),
    _Rule(
        "lora.target_modules",
        lambda v: bool(v) and (_is_pattern(v) or _are_names(v)),
        "all-linear, a list of modules' names, or a regular expression",
    ),
    _Rule("lora.modules_to_save", lambda v: _are_names(v), "a list of modules' names"),
    _one_of("lora.quantize", ("nf4",)),
    _Rule("lora.adapter_path", lambda v: bool(v.strip()), "a folder, or null"),
    _one_of("lora.export", LORA_EXPORTS),
    _Rule("data.train_path", lambda v: bool(v.strip()), "a file or a hub id"),
    _Rule("data.eval_path", lambda v: bool(v.strip()), "a file, a hub id or null"),
    _Rule("data.max_train_examples", _at_least(1), "a whole number of at least 1, or null"),
    _Rule("data.max_eval_examples", _at_least(1), "a whole number of at least 1, or null"),
    _Rule("data.max_length", _at_least(2), "a whole number of at least 2 tokens"),
    _one_of("data.overlong", OVERLONG),
    _Rule("data.eval_fraction", lambda v: 0 <= v < 1, "a number from 0 to below 1"),
    _one_of("data.mixture_stop", MIXTURE_STOPS),
    _one_of("data.format", FORMATS),
    _one_of("data.train_on", TRAIN_ON),
    _one_of("data.on_bad_row", ("error", "drop")),
    _one_of("data.filter", ("none", "correct")),
    _Rule("data.max_bad_fraction", lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    _Rule("data.num_workers", _at_least(1), "a whole number of at least 1, or null for the cores"),
    _Rule("data.cache_dir", lambda v: bool(v.strip()), "a folder, or null"),
    *(_one_of(key, LEVELS) for key in ALL_KEYS if key.startswith("data.lint.")),
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
    _one_of("trainer.loss", LOSSES),
    _Rule("trainer.label_smoothing", lambda v: 0 <= v < 1, "a number from 0 to below 1"),
    _Rule("trainer.z_loss", _at_least(0), "a finite number of at least 0"),
    _Rule("trainer.neftune_alpha", _above(0), "a finite number above 0, or null"),
    _Rule("trainer.ema_decay", lambda v: 0 < v < 1, "a number between 0 and 1, or null"),
    _one_of("trainer.batching", BATCHINGS),
    _one_of("trainer.precision", PRECISIONS),
    _Rule(
        "trainer.gradient_checkpointing",
        lambda v: isinstance(v, bool) or v == "selective",
        "false, true or selective",
    ),
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
    _Rule("trainer.metric_for_best_model", lambda v: bool(v.strip()), "a metric's name, or null"),
    *(
        _Rule(key, lambda v: isinstance(v, bool), "true, false, or null where the name tells")
        for key in ("trainer.greater_is_better", "sweep.greater_is_better")
    ),
    _Rule("trainer.early_stopping_patience", _at_least(1), "a whole number of at least 1, or null"),
    _Rule("trainer.resume", lambda v: bool(v.strip()), "auto, never or the path of a checkpoint"),
    _Rule("trainer.max_hours", _above(0), "a number above 0, or null"),
    _one_of("trainer.loss_spike", LOSS_SPIKES),
    _Rule("trainer.loss_spike_nats", _above(0), "a number of nats above 0"),
    _Rule("trainer.watchdog_minutes", _above(0), "a number above 0, or null"),
    _one_of("optimizer.name", OPTIMIZERS),
    _Rule("optimizer.muon_momentum", lambda v: 0 <= v < 1, "a number from 0 to below 1"),
    _Rule("optimizer.layer_lr_decay", lambda v: 0 < v <= 1, "a number above 0, at most 1"),
    _Rule("optimizer.learning_rate", _at_least(0), "a finite number of at least 0"),
    _Rule(
        "optimizer.betas",
        lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v),
        "a list of two numbers from 0 to below 1",
    ),
    _Rule("optimizer.eps", _above(0), "a finite number above 0"),
    _Rule("optimizer.weight_decay", _at_least(0), "a finite number of at least 0"),
    _Rule("optimizer.max_grad_norm", _above(0), "a finite number above 0"),
    _Rule("optimizer.state_bits", lambda v: v in (8, 32), "32 or 8"),
    _one_of("optimizer.lr_scheduler_type", SCHEDULES),
    _Rule("optimizer.warmup_ratio", lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    _Rule("optimizer.warmup_steps", _at_least(0), "a whole number of at least 0, or null"),
    _one_of("parallel.strategy", ("ddp", "fsdp2", "single")),
    _Rule("parallel.timeout_minutes", lambda v: 0 < v < 1e6, "minutes, above 0"),
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
        "evaluation.stop",
        lambda v: all(isinstance(s, str) and s for s in v),
        "a list of strings, none empty",
    ),
    _Rule("evaluation.num_samples", _at_least(1), "a whole number of at least 1"),
    _Rule("evaluation.min_new_tokens", _at_least(0), "a whole number of at least 0"),
    _Rule("evaluation.top_p", lambda v: 0 < v <= 1, "a number above 0, at most 1"),
    _Rule(
        "evaluation.reward",
        lambda v: v in REWARDS or bool(CUSTOM_REWARD.fullmatch(v)),
        f"one of {', '.join(REWARDS)}, or package.module:function",
    ),
    _Rule("evaluation.reward_seconds", lambda v: 0 < v <= 86_400, "seconds, above 0"),
    _Rule("evaluation.baseline", lambda v: bool(v.strip()), "a hub id, a local folder or null"),
    _one_of("evaluation.backend", BACKENDS),
    _Rule(
        "evaluation.server_url",
        lambda v: bool(re.fullmatch(r"https?://[^/\s?#]+[^\s?#]*", v)),
        "an address such as http://127.0.0.1:8000/v1",
    ),
    _Rule("evaluation.server_model", lambda v: bool(v.strip()), "a model's name, or null"),
    _one_of("evaluation.server_api", SERVER_APIS),
    _Rule("evaluation.server_concurrency", lambda v: 1 <= v <= 1024, "a number from 1 to 1024"),
    _Rule("evaluation.server_timeout", _above(0), "a number of seconds above 0"),
    _Rule("evaluation.server_retries", _at_least(0), "a whole number of at least 0"),
    _one_of("inspect.select", SELECTIONS),
    _Rule("inspect.num_examples", _at_least(1), "a whole number of at least 1"),
    _Rule(
        "inspect.rows",
        lambda v: all(row >= 1 for row in v),
        "a list of numbers from 1",
    ),
    _Rule(
        "export.checkpoint",
        lambda v: v in ("best", "latest") or v.isdecimal(),
        "best, latest, the number of a step, or null for the step that the run exported",
    ),
    _one_of("export.format", EXPORT_FORMATS),
    _one_of("export.dtype", ("fp32", "bf16", "fp16")),
    _Rule(
        "export.max_shard_size",
        lambda v: bool(re.fullmatch(r"[1-9]\d*[KMGT]B", v)),
        "a size such as 5GB",
    ),
    _one_of("export.chat_template", ("trained", "keep")),
    _Rule("export.gguf_type", lambda v: bool(re.fullmatch(r"\w+", v)), "Q4_K_M, say, or null"),
    _Rule("export.gguf_converter", lambda v: bool(v.strip()), "the path of a program, or null"),
    _Rule("export.output_dir", lambda v: bool(v.strip()), "a folder, or null"),
    _Rule(
        "hub.hub_model_id",
        lambda v: bool(REPO_ID.fullmatch(v)) and "--" not in v and ".." not in v,
        "a name, or user/name, of letters, digits, '.', '_' and '-'; or null for the run's name",
    ),
    _Rule("expert_iteration.iterations", _at_least(1), "a whole number of at least 1"),
    _Rule("expert_iteration.num_questions", _at_least(1), "a whole number of at least 1, or null"),
    _Rule("expert_iteration.num_samples", _at_least(1), "a whole number of at least 1"),
    _Rule(
        "expert_iteration.temperature", _above(0), "a finite number above 0: samples must differ"
    ),
    _Rule("expert_iteration.top_p", lambda v: 0 < v <= 1, "a number above 0, at most 1"),
    _Rule("sweep.num_trials", _at_least(1), "a whole number of at least 1"),
    _Rule("sweep.metric", lambda v: bool(v.strip()), "a metric's name"),
    _one_of("logger.backend", LOGGERS),
    _Rule("logger.project", lambda v: bool(v.strip()), "a project's name"),
)


def _secrets(
    values: Iterable[tuple[str, Any]], environment: Mapping[str, str]
) -> Iterator[UserError]:
    """Find keys, tokens and passwords: a config goes into files, to wandb and onto screens."""
    known = {
        value: name
        for name, value in environment.items()
        if len(value) >= SECRET_LENGTH
        and value[0] not in "/~"  # where a key lies, not the key
        and SECRET_WORDS & set(re.split(r"[^a-z]+", name.lower()))
    }
    for key, value in values:
        text = str(value)
        name = next((known[secret] for secret in known if secret in text), None)
        if name is not None or SECRET_SHAPE.search(text):
            yield UserError(
                "C116",
                f"{key} holds a secret" + (f", the value of {name}" if name else ""),
                hint="secrets belong into the environment (HF_TOKEN, WANDB_API_KEY), where the "
                "libraries find them; what a config holds is written to files",
            )


def refuse_secrets(values: Iterable[tuple[str, Any]]) -> None:
    """Refuse keys, tokens and passwords among values of keys, or words as they were typed.

    Raises:
        UserErrors: every one, unshown, exit status 78.
    """
    if errors := list(_secrets(values, os.environ)):
        raise UserErrors(errors)


def values_of(key: str) -> str | None:
    """Say which values a key takes; None: no rule says more than its type.

    Example:
        >>> values_of("trainer.max_steps")
        'a whole number of at least 1, or null'
        >>> values_of("trainer.compile")
        'true or false'
    """
    rules = (rule.expected for rule in _RULES if rule.key == key)
    switch = isinstance(dict(flatten(Config())).get(key), bool)
    return next(rules, "true or false" if switch else None)


def check(config: Config) -> None:
    """Refuse values out of range and options that do not combine.

    Args:
        config: a config whose types the schema has already checked.

    Raises:
        UserErrors: every mistake at once, exit status 78.
    """
    values = dict(flatten(config))
    refuse_secrets(values.items())  # alone: the others would show values
    errors = [
        UserError(
            "C103",
            f"{rule.key} has a value that it cannot take",
            expected=rule.expected,
            got=describe(values[rule.key]),
            hint=with_default(rule.key),
        )
        for rule in _RULES
        if values[rule.key] is not None and not rule.holds(values[rule.key])
    ]
    for error in clashes(config):
        named = [key for key in ALL_KEYS if key in error.message.split()]
        if error.code == "C104" and named:
            shown = {key: json.dumps(values[key], ensure_ascii=False) for key in named}
            error.got = ", ".join(f"{k}={v}" for k, v in shown.items() if k != "data.sources")
        errors.append(error)
    if errors:
        raise UserErrors(errors)
