"""Options that do not combine."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields

from cs336_alignment.config import (
    FORMATS,
    REWARDS,
    Config,
    DataConfig,
    EvaluationConfig,
    ExportConfig,
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
)
from cs336_alignment.errors import UserError
from cs336_alignment.metric_names import GENERATED, greater_is_better, nearest_metric

HELD_WHOLE = "it is made in a model held whole: parallel=ddp"
SOURCES = "'data.sources=[{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 1}]'"


def clashes(config: Config) -> Iterator[UserError]:
    """Find every pair of options that do not combine."""
    trainer, optimizer, model = config.trainer, config.optimizer, config.model
    if trainer.microbatch_tokens is not None and trainer.gradient_accumulation_steps is not None:
        yield clash(
            "trainer.microbatch_tokens",
            "trainer.gradient_accumulation_steps",
            "both say how a step is cut into microbatches; set one of them to null",
        )
    if (
        optimizer.warmup_steps is not None
        and optimizer.warmup_ratio != OptimizerConfig.warmup_ratio
    ):
        yield warmup_clash()
    if trainer.normalize_constant != 1.0 and trainer.loss_normalization != "constant":
        yield clash(
            "trainer.normalize_constant",
            "trainer.loss_normalization",
            "the constant is read only by trainer.loss_normalization=constant",
        )
    yield from _lora_clashes(config)
    yield from _training_clashes(config)
    yield from _parallel_clashes(config)
    yield from _source_clashes(config.data)
    yield from _best_clashes(config)
    yield from _backend_clashes(config)
    yield from _reward_clashes(config.evaluation)
    yield from _export_clashes(config)
    if (best := config.expert_iteration.metric_for_best_model) and greater_is_better(best) is None:
        near = nearest_metric(best)
        yield UserError(
            "C133",
            f"{best} does not say by its name whether greater is better",
            hint=f"did you mean {near}?" if near else "eval/answer_reward, say",
        )
    if model.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
        yield clash(
            "model.trust_remote_code",
            "model.revision",
            "code from the hub runs only at a pinned commit: model.revision=<40 hex digits>",
        )


def _lora_clashes(config: Config) -> Iterator[UserError]:
    lora, default = config.lora, LoraConfig()
    if lora.active:
        if config.model.random_init:
            why = "an adapter is trained on a model that was trained before: lora.r=null"
            yield clash("lora.r", "model.random_init", why)
        if config.model.freeze:
            why = (
                "adapters leave all weights as they are but those of lora.modules_to_save; choose "
                "with lora.target_modules"
            )
            yield clash("lora.r", "model.freeze", why)
        return
    for name in (field.name for field in fields(lora)):
        if getattr(lora, name) != getattr(default, name):
            why = "it is read where adapters are trained: give lora.r or lora.adapter_path"
            yield clash(f"lora.{name}", "lora.r=null", why)


def _training_clashes(config: Config) -> Iterator[UserError]:
    trainer, optimizer, default = config.trainer, config.optimizer, OptimizerConfig()
    name, averages = optimizer.name, trainer.ema_decay is not None
    free, sharded = name == "schedule_free", config.parallel.strategy == "fsdp2"
    whole = "tried with whole weights alone: parallel=ddp"
    pairs = (
        (optimizer.state_bits != 32 and name != "adamw", "optimizer.state_bits", "optimizer.name",
         "only AdamW has its state in 8 bits"),
        (optimizer.muon_momentum != default.muon_momentum and name != "muon",
         "optimizer.muon_momentum", "optimizer.name", "optimizer.name=muon reads it"),
        (optimizer.betas != default.betas and name == "adafactor", "optimizer.betas",
         "optimizer.name", "adafactor does not read them"),
        (optimizer.eps != default.eps and name == "adafactor", "optimizer.eps", "optimizer.name",
         "adafactor does not read it"),
        (free and not optimizer.betas[0], "optimizer.betas", "optimizer.name",
         "schedule_free interpolates with the first of them, which must be above 0"),
        (free and optimizer.lr_scheduler_type != "constant", "optimizer.name",
         "optimizer.lr_scheduler_type", "an average stands in for the schedule, after a warmup: "
         "optimizer.lr_scheduler_type=constant, or optimizer=schedule_free, which sets both"),
        (free and averages, "trainer.ema_decay", "optimizer.name",
         "schedule_free averages by itself"),
        (trainer.loss == "dft" and trainer.label_smoothing > 0, "trainer.loss",
         "trainer.label_smoothing",
         "dft weighs a label by its probability, and a smoothed target has no one label"),
        (trainer.neftune_alpha is not None and trainer.batching == "flat_shared_prefix",
         "trainer.neftune_alpha", "trainer.batching",
         "each example has a noise of its own, so no prefix can be shared: flat, or auto"),
        (name == "adafactor" and config.lora.active, "optimizer.name", "lora.r",
         "adafactor's steps are relative to a tensor's size, and adapters begin at zero"),
        (sharded and name != "adamw", "optimizer.name", "parallel.strategy", whole),
        (sharded and averages, "trainer.ema_decay", "parallel.strategy", whole),
        (sharded and optimizer.state_bits == 8, "optimizer.state_bits", "parallel.strategy",
         "8-bit state is not sharded; parallel=ddp, or optimizer.state_bits=32, of which each "
         "process holds a part"),
        (sharded and config.lora.dora, "lora.dora", "parallel.strategy", HELD_WHOLE),
        (sharded and config.lora.quantize is not None, "lora.quantize", "parallel.strategy",
         HELD_WHOLE),
        (sharded and bool(config.model.new_tokens), "model.new_tokens", "parallel.strategy",
         HELD_WHOLE),
    )  # fmt: skip
    for wrong, first, second, why in pairs:
        if wrong:
            yield clash(first, second, why)


def _parallel_clashes(config: Config) -> Iterator[UserError]:
    parallel = config.parallel
    if parallel.strategy != "fsdp2":
        for name in ("reshard_after_forward", "shard_gradients", "cpu_offload"):
            if getattr(parallel, name) != getattr(ParallelConfig(), name):
                yield clash(f"parallel.{name}", "parallel.strategy", "parallel=fsdp2 reads it")


def _backend_clashes(config: Config) -> Iterator[UserError]:
    options, default = config.evaluation, EvaluationConfig()
    if options.backend == "transformers":
        why = "evaluation.backend=server reads it"
    elif options.backend == "vllm":
        why = "vLLM generates in this process; evaluation.backend=server asks a server"
    else:
        why = ""
    for name in (field.name for field in fields(options) if field.name.startswith("server_")):
        if why and getattr(options, name) != getattr(default, name):
            yield clash(f"evaluation.{name}", "evaluation.backend", why)


def _reward_clashes(evaluation: EvaluationConfig) -> Iterator[UserError]:
    if evaluation.reward in REWARDS:
        if evaluation.reward_seconds != EvaluationConfig.reward_seconds:
            yield clash(
                "evaluation.reward_seconds",
                "evaluation.reward",
                f"only a function of your own has that limit, and {evaluation.reward} is built in",
            )
    elif ":" in evaluation.reward and not evaluation.allow_custom_reward:
        yield UserError(
            "C141",
            f"evaluation.reward={evaluation.reward} is code, and running it has not been allowed",
            hint="evaluation.allow_custom_reward=true, if you trust it",
        )


def _export_clashes(config: Config) -> Iterator[UserError]:
    export, default = config.export, ExportConfig()
    rows = export.format in ("jsonl", "parquet")
    model, gguf = ("checkpoint", "dtype", "chat_template"), ("gguf_type", "gguf_converter")
    why = {
        "hf": (gguf, "export.format=gguf reads it"),
        "gguf": (("max_shard_size",), "a GGUF file is one file"),
        "adapter": (("dtype", "max_shard_size", *gguf), "an adapter stays as it was trained"),
    }
    of_rows = (*model, "max_shard_size", *gguf), "the rows are written, and no model"
    names, reason = of_rows if rows else why.get(export.format, ((), ""))
    for name in names:
        if getattr(export, name) != getattr(default, name):
            yield clash(f"export.{name}", f"export.format={export.format}", reason)
    if config.hub.hub_model_id is not None and not config.hub.push_to_hub:
        yield clash("hub.hub_model_id", "hub.push_to_hub", "hub.push_to_hub=true pushes there")
    if config.hub.push_to_hub and rows:
        yield clash("hub.push_to_hub", "export.format", "a model is pushed, and rows are not")


def _best_clashes(config: Config) -> Iterator[UserError]:
    trainer, data, metric = config.trainer, config.data, config.trainer.metric_for_best_model
    if metric is None:
        if trainer.early_stopping_patience is not None:
            yield UserError(
                "C134",
                "trainer.early_stopping_patience needs a metric to be patient with",
                hint="trainer.metric_for_best_model=eval/loss",
            )
        return
    if not metric.startswith("eval/"):
        near = nearest_metric(metric)
        yield UserError(
            "C131",
            f"trainer.metric_for_best_model={metric} is no metric that an evaluation writes",
            expected="a name that begins with eval/",
            hint=f"did you mean {near}?" if near else "trainer.metric_for_best_model=eval/loss",
        )
        return
    if trainer.greater_is_better is None and greater_is_better(metric) is None:
        near = nearest_metric(metric)
        yield UserError(
            "C133",
            f"{metric} does not say by its name whether greater is better",
            hint="trainer.greater_is_better=true or false"
            + (f"; or did you mean {near}?" if near else ""),
        )
    cadences = (
        ("evaluation.generation_steps",)
        if metric in GENERATED
        else ("trainer.eval_steps", "evaluation.generation_steps")
    )
    values = (trainer.eval_steps, config.evaluation.generation_steps)
    if data.eval_path is None and not data.eval_fraction:
        lacking = "there is no evaluation data (data.eval_path, data.eval_fraction)"
    elif not any(values[2 - len(cadences) :]):
        lacking = f"{' and '.join(cadences)} ask for no evaluation between start and end"
    else:
        return
    yield UserError(
        "C135",
        f"trainer.metric_for_best_model={metric} finds nothing to choose from: {lacking}",
        hint=f"{cadences[0]}=100, say; or trainer.metric_for_best_model=null",
    )


def _source_clashes(data: DataConfig) -> Iterator[UserError]:
    weights = [source.weight for source in data.sources]
    if any(w is None for w in weights) and any(w is not None for w in weights):
        yield _bad_source("either every source has a weight or none has", str(weights))
    if any(w is not None and not (math.isfinite(w) and w > 0) for w in weights):
        yield _bad_source("weights are finite numbers above 0", str(weights))
    for source in data.sources:
        if source.format not in FORMATS:
            yield _bad_source(f"a format of {', '.join(FORMATS)}", source.format)
    if data.eval_fraction and data.eval_path is not None:
        yield clash(
            "data.eval_fraction",
            "data.eval_path",
            "there is evaluation data already; data.eval_path=null splits some off",
        )
    if data.filter == "correct" and data.overlong == "split":
        yield clash("data.filter", "data.overlong", "a piece of a response cannot be verified")
    if data.eval_fraction and any(w is not None for w in weights):
        yield clash(
            "data.eval_fraction", "data.sources", "with weighted sources give data.eval_path"
        )


def _bad_source(expected: str, got: str) -> UserError:
    return UserError(
        "C112",
        "data.sources has a value that it cannot take",
        expected=expected,
        got=got,
        hint=SOURCES,
    )


def clash(first: str, second: str, why: str) -> UserError:
    """Build the error for two options that do not combine, naming both."""
    return UserError("C104", f"{first} and {second} do not combine", hint=why)


def warmup_clash() -> UserError:
    """Build the error for two warmups, which two modules can notice."""
    return clash(
        "optimizer.warmup_steps",
        "optimizer.warmup_ratio",
        "both say how long the warmup is; give one (optimizer.warmup_steps=null to use the ratio)",
    )
