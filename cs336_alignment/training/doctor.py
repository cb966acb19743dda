"""`cs336-sft doctor`: the promises, proven on the user's own model, tokenizer and data."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.config import Config
from cs336_alignment.data.batching import MIN_SHARED_TOKENS, collate, shared_prefix
from cs336_alignment.errors import ExitStatus, UserError, first_few
from cs336_alignment.microbatch import Batching
from cs336_alignment.model.adapters import is_adapted
from cs336_alignment.model.attention import FLAT_ATTENTION, why_not_flat
from cs336_alignment.model.compile import compile_layers
from cs336_alignment.model.fits import check_fits
from cs336_alignment.model.loading import base_of, load_model, open_model
from cs336_alignment.model.lora import merge_adapter, wake_adapters
from cs336_alignment.model.policy import Policy
from cs336_alignment.model.recompute import disable_checkpointing, enable_checkpointing
from cs336_alignment.model.source import ModelSource
from cs336_alignment.model.trainable import choose_trained
from cs336_alignment.tracking.console import Console
from cs336_alignment.training.batching_choice import choose_batching
from cs336_alignment.training.checkpoint import restore, save_checkpoint
from cs336_alignment.training.export import export_model, save_sidecars
from cs336_alignment.training.inputs import load_data
from cs336_alignment.training.invariances import (
    Finding,
    Gradient,
    Subject,
    apart_by,
    begin_alike,
    cut_short,
    differing,
    guarded,
    has_nothing,
    in_training,
    plain_log_probs,
    relative_difference,
)
from cs336_alignment.training.optimizer_check import check_optimizer, has_choices
from cs336_alignment.training.parallel import Processes, join, refuse_sharding, set_threads
from cs336_alignment.training.snapshot import Snapshot, TrainState
from cs336_alignment.training.step import objective_of
from cs336_alignment.training.token_check import check_tokens

NUM_EXAMPLES = 4
MAX_LENGTH = 256
SHORT_LENGTH = 64  # for what does not depend on length: a whole gradient costs seconds
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}
SENSITIVITY = 20  # a bound is never tighter than this times what padding alone does to the model
LAXEST = 1e-3
FLOAT64_PARAMETERS = 50_000_000  # larger models are checked in float32 alone: time and memory
DTYPE_NAMES = {torch.float32: "fp32", torch.float64: "fp64"}
PLAIN = "against plain transformers"


def doctor(config: Config) -> ExitStatus:
    """Check the invariances on the first examples of the training data, and print a table.

    Returns:
        DONE, or INTERNAL if a check fails.

    Raises:
        UserError: model or data cannot be loaded, as in training; several processes (78).
    """
    start, console = time.perf_counter(), Console()
    refuse_sharding(config.parallel, "doctor")
    processes = join(config.parallel)
    try:
        if processes.count > 1:
            raise UserError(
                "C129",
                "the doctor works in one process, and the launcher started several",
                hint="type cs336-sft doctor …",
            )
        findings = []
        for finding in examine(config, processes, console):
            text = f" ({finding.text})" if finding.text else ""
            console.note(f"  {finding.name}: {finding.verdict}{text}")
            findings.append(finding)
        _show(findings, console)
    finally:
        processes.close()
    failed = [finding.name for finding in findings if finding.passed is False]
    verdict = f"failed: {', '.join(failed)}" if failed else "all that applies holds"
    console.note(f"{verdict} ({time.perf_counter() - start:.0f} s)")
    return ExitStatus.INTERNAL if failed else ExitStatus.DONE


def examine(config: Config, processes: Processes, console: Console) -> Iterator[Finding]:
    """Load model and data as training does, and yield the outcome of every check as it comes."""
    options = config.model
    source, tokenizer = open_model(config.model)
    data = load_data(config, tokenizer, console)
    yield from guarded(
        "text and tokens", lambda: check_tokens(data.train, tokenizer, config, NUM_EXAMPLES)
    )
    console.note(f"loading {options.name_or_path}")
    load = partial(_load, source, tokenizer, config)
    model = load()
    set_threads(1, model.num_parameters())
    longest = int(data.train.dataset.lengths.max())
    check_fits(model, data.train.largest_token_id, longest)
    attention, count = str(model.config._attn_implementation), model.num_parameters()
    policy = Policy(model).to(processes.device).eval()
    choice = choose_batching(policy, "auto", longest)
    dataset, short = (
        cut_short(data.train.dataset, NUM_EXAMPLES, length) for length in (MAX_LENGTH, SHORT_LENGTH)
    )
    not_flat = why_not_flat(model, longest)
    if not_flat is None and model.config._attn_implementation != FLAT_ATTENTION:
        not_flat = "the architecture does not use transformers' attention interface"
    wake_adapters(model)
    may_freeze = config.lora.active or bool(options.freeze)
    subject = Subject(policy, short, processes, attention, not_flat, config.trainer, may_freeze)
    tokens = f"{len(dataset)} examples, {int(dataset.lengths.sum())} tokens"
    console.note(f"checking  {tokens}, dropout off; training would be {choice.reason}")
    dtypes = [torch.float32]
    if count < FLOAT64_PARAMETERS and processes.device.type == "cpu":
        dtypes.append(torch.float64)
    experts = model.config._experts_implementation
    for dtype in dtypes:
        model.to(dtype)  # type: ignore[arg-type]  # its decorators hide its type
        if dtype == torch.float64:  # which the kernel for all experts at once does not know
            model.set_experts_implementation("eager")
        check = partial(
            _check_gradients, replace(subject, dataset=dataset), subject, dtype,
            compiled=config.trainer.compile and dtype == torch.float32,
            selective=config.trainer.gradient_checkpointing == "selective",
        )  # fmt: skip
        yield from guarded(f"gradients, {DTYPE_NAMES[dtype]}", check)
    model.to(torch.float32)  # type: ignore[arg-type]
    model.set_experts_implementation(experts)
    yield from guarded("log-probs and files", lambda: _check_files(
        subject, tokenizer, load, options.trust_remote_code))  # fmt: skip
    if has_choices(config):  # in a model of its own: the adapters of this one are merged by now
        other = Policy(load()).to(processes.device).eval()
        other.head = None if policy.head is None else other.head
        wake_adapters(other.model)
        moved = replace(subject, policy=other)
        yield from guarded("optimizer", lambda: iter([check_optimizer(moved, load, config)]))


def _load(
    source: ModelSource, tokenizer: PreTrainedTokenizerBase, config: Config, other: bool = False
) -> PreTrainedModel:
    """Load the model as training does, but with all weights in float32; `other`: all that a
    checkpoint holds is drawn from another seed.
    """
    options, lora, seed = config.model, config.lora, config.seed + other
    drawn = options.random_init or (other and not lora.active)
    model = load_model(source, random_init=drawn, seed=seed)
    base = base_of(source, model) if lora.active else None
    choose_trained(model, tokenizer, options, lora, base, seed=seed)
    return model


def _check_gradients(
    long: Subject, short: Subject, dtype: torch.dtype, *, compiled: bool, selective: bool
) -> Iterator[Finding]:
    """Compare the step, laid out and cut in every way, in one dtype, by way of plain transformers'
    and of padded rows.
    """
    many, label = len(long.dataset), DTYPE_NAMES[dtype]
    plain = short.plain()
    yield _compare(f"padded {PLAIN}, {label}", short.step(1, "padded"), plain, short, dtype)
    padded = long.step(1, "padded")
    name, not_flat = f"flat against padded, {label}", long.not_flat
    if not_flat is None:
        try:
            flat_step = long.step(1, "flat")
        except (RuntimeError, ValueError, TypeError, IndexError) as failure:
            not_flat = f"the model does not take flat rows ({failure})"
        else:
            yield _compare(name, flat_step, padded, long, dtype)
            del flat_step  # a copy of the model
            yield _check_prefix(long, short, padded, dtype)
    if not_flat is not None:
        yield Finding(name, None, None, None, f"training pads: {not_flat}")
    batching: Batching = "padded" if not_flat is not None else "flat_shared_prefix"
    one = "microbatches against one"
    yield _compare(f"{many} {one}, {label}", long.step(many, batching), padded, long, dtype)
    del padded
    if dtype == torch.float32:
        yield _check_parameters(short, plain, batching)
        yield _check_checkpointing(short, plain, batching, selective)
    if compiled:
        yield _check_compiled(short, plain, batching)
    del plain
    got, want = short.step(many, batching, "sequence"), short.plain("sequence")
    yield _compare(f"{many} {one}, loss by sequence, {label}", got, want, short, dtype)
    yield from _check_objective(short, dtype, batching, f"{many} {one}")


def _check_objective(
    subject: Subject, dtype: torch.dtype, batching: Batching, cut: str
) -> Iterator[Finding]:
    """Compare the objective that the config asks for with its formula, and the noise of one cut
    with that of another.
    """
    many, label = len(subject.dataset), DTYPE_NAMES[dtype]
    quiet = replace(subject, chosen=replace(subject.chosen, neftune_alpha=None))
    if objective_of(subject.chosen) is not None:
        got, want = quiet.step(many, batching, chosen=True), quiet.plain(chosen=True)
        yield _compare(f"{cut}, the objective, {label}", got, want, quiet, dtype)
    if subject.chosen.neftune_alpha is not None:
        alone: Batching = "padded" if batching == "padded" else "flat"  # no prefix is shared
        got, want = subject.step(many, alone, chosen=True), subject.step(1, "padded", chosen=True)
        yield _compare(f"{cut}, noise on embeddings, {label}", got, want, subject, dtype)


def _compare(
    name: str, got: Gradient, want: Gradient, subject: Subject, dtype: torch.dtype
) -> Finding:
    gradient, worst, share = relative_difference(got.tensors, want.tensors)
    loss = abs(got.nll - want.nll) / want.nll
    text = f"loss {loss:.0e}, gradient {gradient:.0e}, most in {worst} {share:.0e}"
    apart, bound = float(torch.tensor([gradient, loss]).max()), BOUNDS[dtype]  # max() loses a NaN
    if bound < apart <= LAXEST:
        # Some models compute parts in float32 whatever their dtype, or amplify rounding: how much
        # is measured on plain transformers, by padding, order and the scale of the loss alone.
        alone, other = subject.plain(), subject.plain(together=True, scale=3.0)
        own = relative_difference(other.tensors, alone.tensors)[0]
        bound = min(max(bound, SENSITIVITY * own), LAXEST)
        text += f"; rounding alone changes plain transformers by {own:.0e}"
    return Finding(name, apart, bound, apart <= bound, text)


def _check_prefix(long: Subject, short: Subject, padded: Gradient, dtype: torch.dtype) -> Finding:
    """Compute the prefix that the examples begin with once; if there is none, put one there."""
    subject = long
    if not shared_prefix([long.dataset[i] for i in range(len(long.dataset))]):
        shorter = cut_short(short.dataset, NUM_EXAMPLES, SHORT_LENGTH - MIN_SHARED_TOKENS)
        subject = replace(short, dataset=begin_alike(shorter, MIN_SHARED_TOKENS))
        padded = subject.step(1, "padded")
    got = subject.step(1, "flat_shared_prefix")
    name = f"shared prefix against padded, {DTYPE_NAMES[dtype]}"
    return _compare(name, got, padded, subject, dtype)


def _check_parameters(subject: Subject, want: Gradient, batching: Batching) -> Finding:
    """Every parameter must get a gradient that gets one from the model itself."""
    model, got = subject.policy.model, subject.step(1, batching)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    rest = [n for n, p in model.named_parameters() if p.requires_grad and has_nothing(got, n)]
    lost = [n for n in rest if not has_nothing(want, n)]
    unused = [n for n in rest if has_nothing(want, n)]
    kinds = {"frozen": frozen, "none for": lost, "not used by the model itself": unused}
    text = "; ".join(f"{kind}: {first_few(names)}" for kind, names in kinds.items() if names)
    passed = not lost and (subject.may_freeze or not frozen)
    return Finding("every parameter has a gradient", None, None, passed, text)


def _check_checkpointing(
    subject: Subject, want: Gradient, batching: Batching, selective: bool
) -> Finding:
    kind, model = "selective" if selective else "gradient", subject.policy.model
    name = f"{kind} checkpointing, fp32"
    if not model.supports_gradient_checkpointing:
        return Finding(name, None, None, None, "the model does not support it")
    enable_checkpointing(model, selective)
    try:
        layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
        with in_training(layers) as calls:
            got = subject.step(1, batching)
    finally:
        disable_checkpointing(model)
    if len(calls) < 2:
        return Finding(name, None, None, None, "it was asked for, and nothing was recomputed")
    return _compare(name, got, want, subject, torch.float32)


def _check_compiled(subject: Subject, want: Gradient, batching: Batching) -> Finding:
    model = subject.policy.model
    compile_layers(model)
    try:
        got = subject.step(1, batching)
    finally:
        for module in model.modules():
            module._compiled_call_impl = None
    return _compare("compiled layers, fp32", got, want, subject, torch.float32)


def _log_probs(policy: Policy, subject: Subject) -> Tensor:
    """Compute the log-probs of all trained tokens as training does, (R,)."""
    examples = [subject.dataset[i] for i in range(len(subject.dataset))]
    batching: Batching = "padded" if subject.not_flat is not None else "flat_shared_prefix"
    batch = collate(examples, batching=batching).to(subject.processes.device)
    with torch.no_grad():
        return policy(batch)[0]


def _check_files(
    subject: Subject, tokenizer: PreTrainedTokenizerBase, load: Callable[..., PreTrainedModel],
    trusted: bool,
) -> Iterator[Finding]:  # fmt: skip
    """Compare the log-probs with transformers', then with those of what is written and read."""
    policy, device = subject.policy, subject.processes.device
    model, own = policy.model, _log_probs(subject.policy, subject)
    with subject.untouched():
        plain = plain_log_probs(model, subject.dataset, device)
    apart = apart_by(own, plain)
    yield Finding(f"log-probs {PLAIN}", apart, 1e-5, apart <= 1e-5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield from guarded("checkpoint written and read", lambda: iter([_check_checkpoint(
            subject, tokenizer, load, folder, own)]))  # fmt: skip
        if is_adapted(model):
            merge_adapter(model)
        export_model(folder / "model", model, tokenizer, "")
        loaded = AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float32, trust_remote_code=trusted
        )
        loaded.to(device).eval()  # type: ignore[arg-type]
        got = plain_log_probs(loaded, subject.dataset, device)
        apart, differs = apart_by(got, plain), differing(loaded, model)
        passed = apart <= 1e-5 and not differs
        yield Finding("export read by plain transformers", apart, 1e-5, passed, differs)


def _check_checkpoint(
    subject: Subject, tokenizer: PreTrainedTokenizerBase, load: Callable[..., PreTrainedModel],
    folder: Path, want: Tensor,
) -> Finding:  # fmt: skip
    policy, device = subject.policy, subject.processes.device
    saved = save_checkpoint(
        folder, Snapshot.of(TrainState(1), policy.model, torch.optim.AdamW(policy.parameters())),
        extra={},
        keep=1, save_sidecars=lambda path: save_sidecars(path, policy.model, tokenizer),
    )  # fmt: skip
    model = load(other=True)
    fresh = Policy(model).to(device).eval()
    fresh.head = None if policy.head is None else fresh.head
    restore(saved, model, torch.optim.AdamW(fresh.parameters()))
    apart, differs = apart_by(_log_probs(fresh, subject), want), differing(model, policy.model)
    passed = apart == 0 and not differs
    return Finding("checkpoint written and read", apart, 0.0, passed, differs)


def _show(findings: list[Finding], console: Console) -> None:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.1e}"

    rows = [[f.name, number(f.difference), number(f.bound), f.verdict] for f in findings]
    console.table("largest relative differences", ["check", "difference", "bound", "result"], rows)
    for finding in findings:
        if finding.text and finding.passed is not True:
            console.note(f"{finding.name}: {finding.text}")
