"""The data step: sources → rows → tokens in a cache on disk, with every row accounted for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.constants import HF_HOME
from transformers import PreTrainedTokenizerBase

from cs336_alignment.config import DataConfig, SourceConfig
from cs336_alignment.data.chat_date import FIXED_DATE, writes_date
from cs336_alignment.data.encode import Encoded, Encoder
from cs336_alignment.data.encode_processes import encode_all
from cs336_alignment.data.layout import ASKING, Layout, detect_layout
from cs336_alignment.data.ledger import LedgerEntry
from cs336_alignment.data.lint import Findings, find_repeated
from cs336_alignment.data.sources import Source, open_source
from cs336_alignment.data.store import Store, StoreWriter, check_store, locked
from cs336_alignment.data.templates import PromptTemplate, load_template
from cs336_alignment.data.tokenize import tokenizer_fingerprint
from cs336_alignment.errors import MAX_SHOWN, UserError, UserErrors
from cs336_alignment.files import replacing_folder, telling

LEFT_OUT = {  # why rows are not trained on, and what to do
    "overlong": "raise data.max_length (now {}), or set data.overlong=truncate or split",
    "prompt_fills_max_length": "raise data.max_length (now {}): the prompts alone fill it",
    "no_trained_token": "give the rows a response or an assistant turn that is trained",
    "weight_is_zero": "give some row a weight above 0",
    "bad_row": "mend the bad rows",
}
Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class PreparedSource:
    """One source, tokenized.

    Attributes:
        store: the examples.
        ledger: what became of the rows.
        findings: of the linter.
        template: what shaped the prompts of rows that have no prompt of their own; None: the
            tokenizer's chat template.
        fingerprint: sha256 over tokens, trained stretches and weights.
        revision: the hub's revision, if one was named.
    """

    store: Store
    ledger: LedgerEntry
    findings: Findings
    template: PromptTemplate | None
    fingerprint: str
    revision: str | None


def prepare_source(
    source: SourceConfig,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    split: str,
    limit: int | None,
    progress: Progress,
    note: Callable[[str], None],
) -> PreparedSource:
    """Tokenize one source, or open what an earlier command tokenized.

    The cache is addressed by the content of data, tokenizer and template, by every option that
    matters and by this package's own code, so it cannot serve what would come out otherwise now.
    Several processes may call this at once: one works, the others wait for it.

    Args:
        source: its path, format and columns.
        config: the data section.
        tokenizer: of the model.
        seed: of built-in data.
        split: `train` or `test`, for sources that have splits and name none.
        limit: only the first so many rows; None: all.
        progress: shows a bar.
        note: prints a line.

    Raises:
        UserErrors: bad rows: the first 20, and how many (65).
        UserError: nothing to read (66) or nothing left (65); a template that does not exist (78).
    """
    note(f"reading {source.path}")
    source = with_defaults(source, config)
    template = load_template(config.prompt_template)
    if config.append_eos and tokenizer.eos_token_id is None:
        raise UserError(
            "M104",
            "the tokenizer has no EOS token, so no response could learn to stop",
            hint="choose a tokenizer with one, or set data.append_eos=false",
        )
    opened = open_source(source.path, seed=seed, default_split=split)
    for line in opened.notes:
        note(line)
    options = _options(source, config, template, limit)
    key = _key(opened, tokenizer, options)
    folder = cache_folder(config) / key
    lock = ExitStack()
    with _telling_unwritable(folder):
        waiting = "  another command is preparing the same data; waiting for it"
        lock.enter_context(locked(folder, lambda: note(waiting)))
    with lock:
        if (damage := check_store(folder)) is not None:
            if damage:
                note(f"  prepared data of an earlier command are damaged ({damage}); anew")
            _prepare(opened, source, config, tokenizer, template, folder, limit, progress)
    store = Store(folder)
    written = store.note
    ledger = LedgerEntry(**written["ledger"])
    note(f"  format {ledger.format}")
    if ledger.format.startswith(("messages", "sharegpt")) and writes_date(tokenizer):
        note(f"  the chat template writes the date, here always {FIXED_DATE:%d %b %Y}: runs repeat")
    if unused := _unused(ledger.format, template, config):
        note(f"  without effect on these rows: {', '.join(unused)}")
    return PreparedSource(
        store, ledger, Findings(**written["findings"]), template, written["fingerprint"],
        opened.revision,
    )  # fmt: skip


def with_defaults(source: SourceConfig, config: DataConfig) -> SourceConfig:
    """Fill in what a source does not say of its format and columns and `data` says of all."""
    own = {role: name for role, name in asdict(source.columns).items() if name is not None}
    wanted = config.format if source.format == "auto" else source.format
    return replace(source, columns=replace(config.columns, **own), format=wanted)


def _unused(format: str, template: PromptTemplate | None, config: DataConfig) -> list[str]:
    """Name the options that were set and say nothing for rows of this kind."""
    kind = format.partition(" ")[0]
    asks = kind in ASKING
    is_chat = kind in ("messages", "sharegpt") or (asks and template is None)
    names = [] if asks else ["prompt_template"]
    names += ["append_eos", "add_special_tokens"] if is_chat or kind == "tokens" else []
    default, set_ = DataConfig(), {name: getattr(config, name) for name in names}
    return [
        f"data.{name}={value}" for name, value in set_.items() if value != getattr(default, name)
    ]


def cache_folder(config: DataConfig) -> Path:
    """Give the folder of prepared data: the config's, or one in the Hugging Face cache."""
    return Path(config.cache_dir or Path(HF_HOME) / "cs336-sft" / "prepared").expanduser()


def _options(
    source: SourceConfig, config: DataConfig, template: PromptTemplate | None, limit: int | None
) -> dict[str, Any]:
    """Everything of the config that changes what comes out of the data step."""
    names = (
        "train_on", "max_length", "overlong", "add_special_tokens", "append_eos", "on_bad_row",
        "max_bad_fraction",
    )  # fmt: skip
    return {
        "format": source.format, "columns": asdict(source.columns), "limit": limit,
        "template": None if template is None else asdict(template),
        **{name: getattr(config, name) for name in names},
    }  # fmt: skip


def _key(source: Source, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> str:
    parts = [
        source.path, source.fingerprint, tokenizer_fingerprint(tokenizer),
        json.dumps(options, sort_keys=True), _code_version(),
    ]  # fmt: skip
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _code_version() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    for package in ("tokenizers", "transformers"):  # the chat template is rendered by the latter
        digest.update(metadata.version(package).encode())
    return digest.hexdigest()


def _prepare(
    opened: Source,
    source: SourceConfig,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate | None,
    folder: Path,
    limit: int | None,
    progress: Progress,
) -> None:
    """Read, tokenize and write a source."""
    layout, rows = detect_layout(islice(opened.rows(), limit), source, opened.path)
    if layout.columns:  # or the rows say what is wrong
        _check_train_on(layout, config.train_on)
    ledger, findings = LedgerEntry(opened.path, str(layout)), Findings()
    errors: list[UserError] = []
    digest = hashlib.sha256()
    encoder = Encoder(config, tokenizer, layout, template)
    with ExitStack() as stack:
        with _telling_unwritable(folder):
            writer = StoreWriter(stack.enter_context(replacing_folder(folder)))
        with progress(f"tokenizing {Path(opened.path).name}", None) as advance:
            for done in encode_all(encoder, rows, config.num_workers):
                ledger.merge(done.ledger)
                findings.merge(done.findings)
                errors += done.errors[: MAX_SHOWN - len(errors)]
                if not (errors and config.on_bad_row == "error"):  # it will come to nothing
                    writer.write(done)
                    _update(digest, done)
                advance(done.ledger.rows_read)
        _refuse_bad_rows(ledger, errors, config)
        if not ledger.kept:
            raise _nothing_left(ledger, config)
        store = writer.close()
        ledger.measure(store.lengths)
        findings.add_found("duplicate_rows", find_repeated(store.hashes("row_hash")), store.place)
        writer.finish({
            "fingerprint": digest.hexdigest(),
            "ledger": asdict(ledger),
            "findings": asdict(findings),
        })  # fmt: skip


def _update(digest: Any, done: Encoded) -> None:
    for row in done.rows:
        digest.update(len(row.input_ids).to_bytes(8, "little"))
        for part in (row.input_ids, row.spans, row.span_weights, np.float32(row.example_weight)):
            digest.update(part.tobytes())


def _refuse_bad_rows(ledger: LedgerEntry, errors: Sequence[UserError], config: DataConfig) -> None:
    if not errors:
        return
    share = ledger.bad_rows / ledger.rows_read
    if config.on_bad_row == "drop" and share <= config.max_bad_fraction:
        ledger.drop("bad_row", ledger.bad_rows)
        ledger.bad_places = [f"{error.place} ({error.code})" for error in errors]
        return
    if config.on_bad_row == "drop":
        too_many = UserError(
            "D303",
            f"{ledger.bad_rows:,} of {ledger.rows_read:,} rows are bad",
            expected=f"at most {config.max_bad_fraction:.1%} (data.max_bad_fraction)",
            got=f"{share:.1%}",
        )
        raise UserErrors([*errors[:3], too_many])
    last = errors[-1]
    last.hint = last.hint or "mend it, or set data.on_bad_row=drop (drops are counted)"
    raise UserErrors(errors, ledger.bad_rows)


def _nothing_left(ledger: LedgerEntry, config: DataConfig) -> UserError:
    return UserError(
        "D301",
        f"no example of {ledger.source} is left",
        got=f"{ledger.rows_read:,} rows read; dropped: "
        + (", ".join(f"{count:,} {name}" for name, count in ledger.dropped.items()) or "none"),
        hint=", ".join(
            hint.format(config.max_length)
            for name, hint in LEFT_OUT.items()
            if name in ledger.dropped
        ),
    )


def _check_train_on(layout: Layout, train_on: str) -> None:
    """Refuse a `data.train_on` that says nothing for a format."""
    if layout.format == "text" and train_on != "all":
        raise UserError(
            "C122",
            f"the rows are text alone, and data.train_on={train_on} asks for a part of it",
            hint="data.train_on=all trains the whole text",
        )
    if layout.format == "tokens" and train_on in ("last_turn", "all"):
        raise UserError(
            "C122",
            f"the rows say themselves what is trained, and data.train_on={train_on} says otherwise",
            hint="data.train_on=response takes the labels or the mask as they are",
        )


def _telling_unwritable(folder: Path) -> AbstractContextManager[None]:
    hint = "choose another folder: data.cache_dir=…"
    return telling("D310", f"cannot write prepared data to {folder.parent}", hint)
