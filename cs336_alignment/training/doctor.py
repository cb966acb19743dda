"""`cs336-sft doctor`: the promises, proven on the user's own model, tokenizer and data."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.config import Config
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.data.splits import prepare_run
from cs336_alignment.errors import ExitStatus
from cs336_alignment.model.attention import FLAT_ATTENTION, why_not_flat
from cs336_alignment.model.loading import (
    ModelSource,
    check_fits,
    enable_checkpointing,
    load_model,
    load_tokenizer,
    resolve_model,
)
from cs336_alignment.model.policy import Policy
from cs336_alignment.tracking.console import Console
from cs336_alignment.training.checkpoint import TrainState, restore, save_checkpoint
from cs336_alignment.training.export import export_model, save_sidecars
from cs336_alignment.training.invariances import (
    Gradient,
    cut_short,
    log_probs,
    plain_gradient,
    plain_log_probs,
    relative_difference,
    step_gradient,
    without_dropout,
)
from cs336_alignment.training.parallel import Processes, set_threads, start_processes

NUM_EXAMPLES = 4
MAX_LENGTH = 256
SHORT_LENGTH = 64  # for what does not depend on length
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}
SENSITIVITY = 20  # a bound is never tighter than this times what padding alone does to the model
LAXEST = 1e-3
FLOAT64_PARAMETERS = 50_000_000  # larger models are checked in float32 alone: time and memory
DTYPE_NAMES = {torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        name: what was compared.
        difference: the largest relative difference; None where nothing is measured.
        bound: what it may be.
        passed: None if the check does not apply.
        text: what a person should know about it.
    """

    name: str
    difference: float | None
    bound: float | None
    passed: bool | None
    text: str = ""

    @property
    def verdict(self) -> str:
        """The outcome in a word."""
        return {True: "pass", False: "FAIL", None: "does not apply"}[self.passed]


def doctor(config: Config) -> ExitStatus:
    """Check the invariances on the first examples of the training data, and print a table.

    Returns:
        DONE, or INTERNAL if a check fails.

    Raises:
        UserError: model or data cannot be loaded, as in training.
    """
    start = time.perf_counter()
    console = Console()
    processes = Processes(start_processes(config.parallel))
    model_config = config.model
    source = resolve_model(
        model_config.name_or_path, model_config.revision, model_config.trust_remote_code
    )
    tokenizer = load_tokenizer(source)
    data = prepare_run(
        config.data, tokenizer, seed=config.seed, progress=console.progress, note=console.note
    )
    for line in data.warnings:
        console.warn(line)
    dataset = cut_short(data.train.dataset, NUM_EXAMPLES, MAX_LENGTH)
    short = cut_short(data.train.dataset, NUM_EXAMPLES, SHORT_LENGTH)
    console.note(f"loading {model_config.name_or_path}")
    model = load_model(source, random_init=model_config.random_init, seed=config.seed)
    set_threads(1, model.num_parameters())
    check_fits(model, data.train.largest_token_id, int(dataset.lengths.max()))
    model.to(processes.device)  # type: ignore[arg-type]  # its decorators hide its type
    tokens = f"{len(dataset)} examples, {int(dataset.lengths.sum())} tokens"
    console.note(f"checking  {tokens}, dropout off")
    findings = []
    for finding in run_checks(model, tokenizer, dataset, short, processes, source):
        console.note(f"  {finding.name}: {finding.verdict}")
        findings.append(finding)
    _show(findings, console)
    failed = [finding.name for finding in findings if finding.passed is False]
    seconds = time.perf_counter() - start
    verdict = f"failed: {', '.join(failed)}" if failed else "all that applies holds"
    console.note(f"{verdict} ({seconds:.0f} s)")
    return ExitStatus.INTERNAL if failed else ExitStatus.DONE


def run_checks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: TokenizedDataset,
    short: TokenizedDataset,
    processes: Processes,
    source: ModelSource,
) -> Iterator[Finding]:
    """Yield the outcome of every check as it comes.

    Args:
        model: as loaded, in float32; its dtype and attention are changed.
        tokenizer: of the model.
        dataset: a few examples.
        short: the same, cut shorter.
        processes: this one alone.
        source: of the model, to load it again.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    dtypes = [torch.float32]
    if count < FLOAT64_PARAMETERS and next(model.parameters()).device.type == "cpu":
        dtypes.append(torch.float64)
    reason = why_not_flat(model, max_length=MAX_LENGTH)
    plain = plain_log_probs(model.eval(), short)
    own_attention = str(model.config._attn_implementation)
    for dtype in dtypes:
        model.to(dtype)  # type: ignore[arg-type]
        model.set_attn_implementation(own_attention)
        yield from _check_gradients(model, dataset, short, processes, dtype, reason)
    model.to(torch.float32)  # type: ignore[arg-type]
    policy = Policy(model).eval()
    flat = reason is None and model.config._attn_implementation == FLAT_ATTENTION
    own = log_probs(policy, short, flat=flat)
    apart = float((own - plain).abs().max() / plain.abs().max())
    yield Finding("log-probs against a float64 softmax", apart, 1e-5, apart <= 1e-5)
    yield from _check_files(policy, tokenizer, short, source, own, plain, flat=flat)
    yield _check_tokens(tokenizer, dataset)


def _check_gradients(
    model: PreTrainedModel,
    dataset: TokenizedDataset,
    short: TokenizedDataset,
    processes: Processes,
    dtype: torch.dtype,
    reason: str | None,
) -> Iterator[Finding]:
    label, many = DTYPE_NAMES[dtype], len(dataset)
    with without_dropout(model):
        plain = plain_gradient(model, short, together=True)
        own, _ = relative_difference(plain_gradient(model, short, together=False), plain)
        bound = min(max(BOUNDS[dtype], SENSITIVITY * own), LAXEST)
        policy = Policy(model)

        def compare(name: str, got: Gradient, want: Gradient) -> Finding:
            apart, worst = relative_difference(got, want)
            why = f"padding alone changes transformers' own by {own:.0e}"
            text = "" if apart <= BOUNDS[dtype] else why if apart <= bound else f"most in {worst}"
            return Finding(f"{name}, {label}", apart, bound, apart <= bound, text)

        def gradient(data: TokenizedDataset, cut: int, flat: bool, loss: str = "token") -> Gradient:
            return step_gradient(
                policy, data, processes, microbatches=cut, flat=flat, normalization=loss
            )

        yield compare("padded against plain transformers", gradient(short, 1, False), plain)
        padded, is_flat = gradient(dataset, 1, False), False
        if reason is None and model.config._attn_implementation != FLAT_ATTENTION:
            reason = "the architecture does not use transformers' attention interface"
        if reason is None:
            try:
                yield compare("flat against padded", gradient(dataset, 1, True), padded)
                is_flat = True
            except (RuntimeError, ValueError, TypeError, IndexError) as failure:
                reason = f"it does not take flat rows ({failure})"
        if reason is not None:
            text = f"trains padded: {reason}"
            yield Finding(f"flat against padded, {label}", None, None, None, text)
        yield compare(f"{many} microbatches against one", gradient(dataset, many, is_flat), padded)
        one = gradient(short, 1, is_flat, "sequence")
        name = f"{many} microbatches against one, loss by sequence"
        yield compare(name, gradient(short, many, is_flat, "sequence"), one)
        if dtype == torch.float32:
            yield _check_checkpointing(
                model, lambda name: compare(name, gradient(short, 1, is_flat), plain)
            )
            frozen = [n for n, _ in model.named_parameters() if n not in padded]
            text = f"none for {', '.join(frozen[:3])}" if frozen else ""
            yield Finding("every parameter has a gradient", None, None, not frozen, text)


def _check_checkpointing(model: PreTrainedModel, compare: Callable[[str], Finding]) -> Finding:
    """Compare with gradient checkpointing on; `compare` computes the gradient."""
    name = "gradient checkpointing against none"
    if not model.supports_gradient_checkpointing:
        return Finding(f"{name}, fp32", None, None, None, "the model does not support it")
    enable_checkpointing(model)
    try:
        return compare(name)
    finally:
        for off in ("activation_checkpointing_disable", "gradient_checkpointing_disable"):
            if hasattr(model, off):
                getattr(model, off)()
                break


def _check_files(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    dataset: TokenizedDataset,
    source: ModelSource,
    own: torch.Tensor,
    plain: torch.Tensor,
    *,
    flat: bool,
) -> Iterator[Finding]:
    """Write a checkpoint and an export, and compare what comes back."""
    device = next(policy.parameters()).device
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        optimizer = torch.optim.AdamW(policy.model.parameters())
        saved = save_checkpoint(
            folder, TrainState(1), policy.model, optimizer, extra={}, keep=1,
            save_sidecars=lambda path: save_sidecars(path, policy.model, tokenizer),
        )  # fmt: skip
        fresh = load_model(source, random_init=True, seed=1)
        fresh.to(device)  # type: ignore[arg-type]
        restore(saved, fresh, torch.optim.AdamW(fresh.parameters()), device)
        again = log_probs(Policy(fresh).eval(), dataset, flat=flat)
        apart = float((again - own).abs().max())
        yield Finding("checkpoint written and read", apart, 0.0, apart == 0.0)
        del fresh
        export_model(folder / "model", policy.model, tokenizer, "")
        loaded = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        loaded.to(device).eval()  # type: ignore[arg-type]
        got = plain_log_probs(loaded, dataset)
        apart = float((got - plain).abs().max() / plain.abs().max())
        yield Finding("export read by plain transformers", apart, 1e-5, apart <= 1e-5)


def _check_tokens(tokenizer: PreTrainedTokenizerBase, dataset: TokenizedDataset) -> Finding:
    """Decode every example and encode it again."""
    lost = 0
    for number in range(len(dataset)):
        text = str(tokenizer.decode(dataset[number].input_ids, clean_up_tokenization_spaces=False))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        lost += str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) != text
    name = "text through tokens and back"
    if lost:
        text = f"the tokenizer changes the text of {lost} of {len(dataset)} examples"
        return Finding(name, lost / len(dataset), None, None, text)
    return Finding(name, 0.0, 0.0, True)


def _show(findings: list[Finding], console: Console) -> None:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.1e}"

    rows = [[f.name, number(f.difference), number(f.bound), f.verdict] for f in findings]
    console.table("largest relative differences", ["check", "difference", "bound", "result"], rows)
    for finding in findings:
        if finding.text:
            console.note(f"{finding.name}: {finding.text}")
