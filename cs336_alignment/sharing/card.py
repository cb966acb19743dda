"""The model card: what was trained on what, how well it does, and lines that use it.

It says what the run's own files say, so it can be written at the end of the run and at any time
after.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, RepoCard, try_to_load_from_cache
from yaml import YAMLError

from cs336_alignment.config import Config, flatten
from cs336_alignment.data.layout import ASKING
from cs336_alignment.data.sources import COMPRESSED, ENDINGS, ending_of
from cs336_alignment.data.templates import PLACEHOLDER, PromptTemplate
from cs336_alignment.tracking.run_record import RunRecord, read_run

CURVES = "loss.png"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
COMPARED = ("eval/loss", "eval/format_reward", "eval/answer_reward", "eval/stop_rate")
UNSHOWN = ("run_name", "output_root", "logger.", "hub.", "export.", "inspect.")  # settings
QUESTION = "What is 2 + 2?"
MOST_NEW_TOKENS = 256


@dataclass(frozen=True)
class Card:
    """What a card says that the run's files do not.

    Attributes:
        config: of the run.
        run: its folder.
        step: whose weights are exported.
        chosen: why this step; None: it is the last one.
        trained_tokens: up to this step; None: unknown.
        template: of questions; None: the tokenizer's chat template.
        name: what `from_pretrained` takes, beside the folder: its last name.
        form: how the weights are written, where that is not as they were trained.
        gguf: the name of the GGUF file beside the card; None: the weights are safetensors.
        adapter: whether they are adapters alone, which peft loads with their base model.
    """

    config: Config
    run: Path
    step: int
    chosen: str | None
    trained_tokens: int | None
    template: PromptTemplate | None
    name: str
    form: str | None = None
    gguf: str | None = None
    adapter: bool = False

    def __str__(self) -> str:
        record = read_run(self.run)
        parts = [
            *self._head(record),
            *_section("Results", self._results(record)),
            *_section("Use", self._use(record)),
            *_section("Data", _data(record.ledger)),
            *_section("Training", self._training(record)),
        ]
        return "\n".join(parts) + "\n"

    def _head(self, record: RunRecord) -> Iterator[str]:
        model, data = self.config.model, self.config.data
        base = model.name_or_path
        # Where it was trained `a/b` may have been a folder; what came from the hub has a commit.
        is_id = record.manifest.get("model_revision") is not None and HUB_ID.fullmatch(base)
        source = data.train_path.partition(":")[0].partition("@")[0]
        on_hub = HUB_ID.fullmatch(source) and not Path(source).exists()
        on_hub = on_hub and ending_of(Path(source)) not in (*ENDINGS, *COMPRESSED, ".txt")
        found: Mapping[str, Any] = {
            "base_model": base if is_id else None,
            "license": license_of(base, model.revision),
            "datasets": [source] if on_hub else None,
        }
        metadata = ModelCardData(
            library_name="gguf" if self.gguf else "peft" if self.adapter else "transformers",
            pipeline_tag="text-generation", tags=["sft", "cs336_alignment"], **found,
        )  # fmt: skip
        title = self.config.run_name or record.name
        how = "made from" if model.random_init else "a fine-tune of"
        yield f"---\n{metadata.to_yaml()}\n---\n"
        yield f"# {title}\n"
        yield (
            f"{how[0].upper()}{how[1:]} `{shorten(base)}` on `{_sources(record, self.config)}` "
            "by supervised fine-tuning with cs336_alignment.\n"
        )

    def _results(self, record: RunRecord) -> Iterator[str]:
        metric = self.config.trainer.metric_for_best_model
        results = before_and_after(record, self.step, metric)
        if results:
            yield from _table(
                ("metric, held-out data", "before", "after"),
                [(name, f"{before:.4f}", f"{after:.4f}") for name, before, after in results],
            )
        if (self.run / CURVES).is_file():
            yield f"![Loss, learning rate and gradient norm over the steps]({CURVES})\n"

    def _use(self, record: RunRecord) -> Iterator[str]:
        if self.gguf is not None:
            yield f"```\nllama-cli -m {self.gguf} -p '…'\n```\n"
        else:
            code = _snippet(
                self.name, self.template, _kind(record.ledger), self.config.data.add_special_tokens,
                min(self.config.evaluation.max_new_tokens, MOST_NEW_TOKENS), self.adapter,
            )  # fmt: skip
            yield "\n".join(("```python", *code, "```\n"))
        if _kind(record.ledger) in ASKING and self.template is not None:
            yield "It was trained on prompts of this form, and does best with them:\n"
            yield f"```\n{self.template.text}\n```\n"

    def _training(self, record: RunRecord) -> Iterator[str]:
        optimizer = self.config.optimizer
        steps = str(self.step) if self.chosen is None else f"{self.step} ({self.chosen})"
        facts = {
            "steps": steps,
            "examples a step": str(self.config.trainer.global_batch_size),
            "learning rate": f"{optimizer.learning_rate:g}, {optimizer.lr_scheduler_type}",
        }
        if self.trained_tokens is not None:
            facts["trained tokens"] = f"{self.trained_tokens:,}"
        parameters = record.manifest.get("parameters")
        if parameters is not None:
            trained = record.manifest.get("trainable_parameters", parameters)
            more = "" if trained == parameters else f", {trained:,} trained"
            facts["parameters"] = f"{parameters:,}{more}"
        if self.form is not None:
            facts["weights"] = self.form
        yield from _table(("", "value"), list(facts.items()))
        changed = _changed(record.config)
        yield "Every setting that differs from its default:\n"
        yield "\n".join(("```yaml", *changed, "```\n"))
        versions = {**record.manifest.get("versions", {})}
        if commit := record.manifest.get("git_commit"):
            versions["commit"] = commit
        if versions:
            yield "Versions: " + ", ".join(f"{n} {v}" for n, v in versions.items()) + ".\n"


def before_and_after(
    record: RunRecord, step: int, chosen_by: str | None
) -> list[tuple[str, float, float]]:
    """Compare the first evaluation of a run with that of the exported step, metric by metric; only
    those count that asked the questions of now. The metric that chose the step is among them.
    """
    since = record.manifest.get("evaluation_since_step", 0)
    rows = [row for row in record.rows if since <= row["step"] <= step]
    results = []
    for name in dict.fromkeys((*COMPARED, *filter(None, [chosen_by]))):
        found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if len(found) > 1 and found[-1][0] == step:
            results.append((name, found[0][1], found[-1][1]))
    return results


def license_of(base: str, revision: str | None) -> str | None:
    """Find the licence that the base model's own card names, on this machine; None: unknown."""
    path: Any = Path(base).expanduser() / "README.md"
    if not path.is_file():
        if not HUB_ID.fullmatch(base):
            return None
        path = try_to_load_from_cache(base, "README.md", revision=revision)
    try:
        found = RepoCard.load(Path(path), ignore_metadata_errors=True).data.get("license")
    except (OSError, TypeError, ValueError, YAMLError):
        return None
    return found if isinstance(found, str) else None


def shorten(value: Any) -> str:
    """Show a value without the folders of this machine, which are nobody's business."""
    text = str(value)
    path = Path(text)
    elsewhere = path.is_absolute() or text.startswith("~") or ".." in path.parts
    return f"…/{path.name}" if elsewhere else text


def _section(title: str, lines: Iterator[str]) -> list[str]:
    found = list(lines)
    return [f"## {title}\n", *found] if found else []


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


def _kind(ledger: Mapping[str, Any]) -> str:
    return str(ledger.get("train", {}).get("format", "")).partition(" ")[0]


def _sources(record: RunRecord, config: Config) -> str:
    sources = record.ledger.get("train", {}).get("sources", [])
    names = [shorten(source["source"]) for source in sources] or [shorten(config.data.train_path)]
    return ", ".join(names)


def _data(ledger: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for split, title in (("train", ""), ("eval", " (held out)")):
        for source in ledger.get(split, {}).get("sources", []):
            left_out = {**source.get("dropped", {}), **source.get("filtered", {})}
            gone = ", ".join(f"{count:,} {why}" for why, count in left_out.items()) or "none"
            numbers = [source.get(n, 0) for n in ("rows_read", "kept", "tokens", "response_tokens")]
            cells = [f"{number:,}" for number in numbers]
            rows.append((f"{shorten(source['source'])}{title}", *cells, gone))
    if rows:
        yield from _table(
            ("source", "rows", "examples kept", "tokens", "trained tokens", "left out"), rows
        )


def _changed(settings: Mapping[str, Any]) -> list[str]:
    defaults = dict(flatten(Config()))
    return [
        f"{key}: {json.dumps(_without_folders(value), ensure_ascii=False)}"
        for key, value in settings.items()
        if not key.startswith(UNSHOWN) and key in defaults and value != defaults[key]
    ]


def _without_folders(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    if isinstance(value, dict):
        return {name: _without_folders(each) for name, each in value.items()}
    return shorten(value) if isinstance(value, str) else value


def _snippet(
    name: str,
    template: PromptTemplate | None,
    kind: str,
    add_special_tokens: bool,
    max_new_tokens: int,
    is_adapter: bool,
) -> list[str]:
    """Write the lines that ask the model as it was trained."""
    kind_of_model = "AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM"
    lines = [
        *(["from peft import AutoPeftModelForCausalLM"] if is_adapter else []),
        f"from transformers import {'' if is_adapter else 'AutoModelForCausalLM, '}AutoTokenizer",
        "",
        f"name = {json.dumps(name)}  # this folder, or its id on the hub",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        f"model = {kind_of_model}.from_pretrained(name)",
    ]
    special = "" if add_special_tokens else ", add_special_tokens=False"
    if kind in ("messages", "sharegpt") or (kind in ASKING and template is None):
        lines += [
            f'messages = [{{"role": "user", "content": {json.dumps(QUESTION)}}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    else:
        text = QUESTION
        if kind in ASKING and template is not None:
            text = PLACEHOLDER.sub(lambda _: QUESTION, template.text)
        lines += [
            f"prompt = {text!r}",
            f'inputs = tokenizer(prompt, return_tensors="pt"{special})',
        ]
    return [
        *lines,
        f"output = model.generate(**inputs, max_new_tokens={max_new_tokens})",
        'response = output[0, inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(response, skip_special_tokens=True))",
    ]
