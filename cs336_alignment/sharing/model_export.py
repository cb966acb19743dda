"""A trained model in the form that was asked for: precision, chat template, shards or GGUF, card;
loaded again before anyone sees it.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.config import ExportConfig
from cs336_alignment.data.dataset import TokenizedDataset
from cs336_alignment.data.layout import ASKING
from cs336_alignment.data.templates import PromptTemplate, load_template
from cs336_alignment.data.tokenize import TokenRow, tokenize_plain
from cs336_alignment.errors import UserError
from cs336_alignment.evaluation.chat import Conversation
from cs336_alignment.sharing.card import CURVES, Card
from cs336_alignment.sharing.chat_template import as_chat_template
from cs336_alignment.sharing.export_folder import read_json
from cs336_alignment.sharing.gguf import Tools, convert
from cs336_alignment.sharing.trained import TrainedRun, load_trained
from cs336_alignment.tracking.console import Console
from cs336_alignment.training.checkpoint_folders import STATE, folder_of
from cs336_alignment.training.export import write_model
from cs336_alignment.training.reload_check import check_export
from cs336_alignment.training.reload_child import log_probs
from cs336_alignment.training.run_folder import ADAPTER, EXPORT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONVERSATIONS = ("messages", "sharegpt")  # formats of rows
VERBATIM = PromptTemplate("verbatim", "{question}")
QUESTIONS = ("What is 2 + 2?", "Why is the sky blue?", "Name three rivers.", "Who wrote Faust?")


def fill_folder(
    folder: Path, run: TrainedRun, source: Path, step: int, options: ExportConfig,
    tools: Tools | None, name: str, console: Console,
) -> str:  # fmt: skip
    """Load a model and write it, with its card, into a folder.

    Args:
        folder: is there, and empty.
        run: the run.
        source: folder of its weights.
        step: that they are of.
        options: the form.
        tools: make GGUF of it; None: it stays a Hugging Face folder.
        name: of the folder that it will be, for the card.
        console: is told what is done.

    Returns:
        The outcome of the reload check.

    Raises:
        UserError: it does not load as it was written, or the converter fails (70).
    """
    console.note(f"loading  {source}")
    adapter = options.format == "adapter"
    model, tokenizer = load_trained(source, run.config, adapter=adapter)
    if adapter:
        _refuse_more_rows(model, run.config.model.trust_remote_code)
    template = load_template(run.config.data.prompt_template)
    if options.chat_template == "trained":
        _take_chat_template(run, tokenizer, template, console)
    probes = _probes(run, tokenizer, template)
    _round(model, probes, options.dtype, console)
    kind = options.gguf_type or options.dtype
    file = f"{run.config.run_name}-{kind}.gguf" if tools else None
    card = str(Card(
        run.config, run.folder, step, _why(run, source), _trained_tokens(run, step), template, name,
        form=kind, gguf=file, adapter=adapter,
    ))  # fmt: skip
    plain = folder / ".plain" if tools else folder
    plain.mkdir(exist_ok=True)
    pictures = [run.folder / CURVES]
    write_model(plain, model, tokenizer, card, pictures, options.max_shard_size)
    outcome = _check(plain, model, tokenizer, probes, run, options, console)
    if tools is not None and file is not None:
        console.note(f"convert  {tools.converter.name}")
        convert(tools, plain, folder / file, options.dtype, options.gguf_type, console.note)
        for path in sorted(plain.rglob("*"), reverse=True):  # what lies in a folder comes first
            if path.name in ("README.md", CURVES):
                path.rename(folder / path.name)
            elif path.is_dir():
                path.rmdir()
            else:
                path.unlink()
        plain.rmdir()
    return outcome


def _refuse_more_rows(model: PreTrainedModel, trusted: bool) -> None:
    base = vars(model)["adapter_base"]
    config = AutoConfig.from_pretrained(
        base.name, revision=base.revision, trust_remote_code=trusted
    )
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if rows > (own := config.get_text_config().vocab_size):
        raise UserError(
            "M128",
            "new tokens have grown the embedding: the adapter would not load on its base model",
            expected=f"{own} rows",
            got=f"{rows}",
            hint="export.format=hf merges it",
        )


def _take_chat_template(
    run: TrainedRun, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate | None,
    console: Console,
) -> None:  # fmt: skip
    """Make the chat template say what was trained, where it was something else."""
    data, own = run.config.data, "the tokenizer's own"
    if run.kind in CONVERSATIONS or (run.kind in ASKING and template is None):
        console.note(f"chat     {own}, as trained")
    elif run.kind not in ASKING or template is None:
        if tokenizer.chat_template:
            console.warn(f"{own} chat template stays: nothing was trained with it, the rows stood "
                         "verbatim")  # fmt: skip
    elif made := as_chat_template(
        template, tokenizer, add_special_tokens=data.add_special_tokens, append_eos=data.append_eos
    ):
        tokenizer.chat_template = made
        console.note(f"chat     a question in the template {template.name}, as trained")
    else:
        console.warn(f"no chat template makes of a question the tokens that {template.name} made "
                     f"in training: {own} stays")  # fmt: skip


def _probes(
    run: TrainedRun, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate | None
) -> TokenizedDataset:
    """Make examples in the form that was trained, without the data, which may be elsewhere."""
    shape = None if run.kind in CONVERSATIONS else template if run.kind in ASKING else VERBATIM
    special = run.config.data.add_special_tokens
    asked = Conversation(tokenizer, shape, add_special_tokens=special)
    said = tokenize_plain([f" {question} Yes." for question in QUESTIONS], tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = []
    for question, response in zip(QUESTIONS, said, strict=True):
        prompt = asked.prompt_ids(question)
        rows.append(TokenRow.of_response(prompt + response + end, len(prompt)))
    return TokenizedDataset.of(rows)


def _round(model: PreTrainedModel, probes: TokenizedDataset, name: str, console: Console) -> None:
    """Bring weights to a precision, and tell by how much that changes what they compute."""
    model.eval()
    dtype, saved = DTYPES[name], model.state_dict()
    if dtype == model.dtype:
        return
    sequences = [probes[i].input_ids.tolist() for i in range(len(probes))]
    before = chain.from_iterable(log_probs(model, sequences))
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if key in saved and tensor.is_floating_point():  # rotary frequencies are not, and stay
            tensor.data = tensor.data.to(dtype)
    after = chain.from_iterable(log_probs(model, sequences))
    gap = max(abs(mine - rounded) for mine, rounded in zip(before, after, strict=True))
    console.note(f"weights  rounded to {name}: log-probs of text move by at most {gap:.2g} nats")


def _why(run: TrainedRun, source: Path) -> str | None:
    best: dict[str, Any] = run.manifest.get("best") or {}
    if source.name not in (EXPORT, ADAPTER) or best.get("value") is None:
        return None
    return f"the best {best['metric']}: {best['value']:.4f}"


def _trained_tokens(run: TrainedRun, step: int) -> int | None:
    """Look into the step's checkpoint, if it is still there."""
    state = read_json(folder_of(run.folder / "checkpoints", step) / STATE)
    return state.get("progress", {}).get("response_tokens_seen")


def _check(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    probes: TokenizedDataset, run: TrainedRun, options: ExportConfig, console: Console,
) -> str:  # fmt: skip
    console.note("check    loading it in a fresh process")
    result = check_export(
        folder, model, tokenizer, probes, base={},
        trust_remote_code=run.config.model.trust_remote_code,
    )  # fmt: skip
    for warning in result.warnings:
        console.warn(warning)
    if result.outcome == "failed":
        raise UserError(
            "R305",
            "what was exported is not the model that was trained, and is removed",
            got="; ".join(result.reasons),
            hint="if fp16 is too narrow for these weights: export.dtype=bf16"
            if options.dtype == "fp16"
            else None,
        )
    console.note(f"check    reload check {result}")
    return str(result)
