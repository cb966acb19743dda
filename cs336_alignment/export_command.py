"""`cs336-sft export`: a run's model or rows in a form that others take, and the way to the hub."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cs336_alignment.config import Config, ExportConfig
from cs336_alignment.data.batching import StepPlan
from cs336_alignment.data.splits import RunData, prepare_run
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.evaluation.verify import verifying
from cs336_alignment.files import sha256_of
from cs336_alignment.model.loading import open_model
from cs336_alignment.sharing.chat_template import ALONE
from cs336_alignment.sharing.export_folder import NOTE, making, read_json
from cs336_alignment.sharing.gguf import find_tools
from cs336_alignment.sharing.hub import OFFLINE, announce, push
from cs336_alignment.sharing.model_export import fill_folder
from cs336_alignment.sharing.rows import compare_with_ledger, times_trained, write_rows
from cs336_alignment.sharing.trained import TrainedRun, find_weights, open_run
from cs336_alignment.tracking.console import Console
from cs336_alignment.training.parallel import launched_processes
from cs336_alignment.training.run_folder import LEDGER, STATUS

EXPORTS = "exports"  # in the run's folder
ROWS = ("jsonl", "parquet")
SETTABLE = ("export.", "hub.", "output_root", "data.cache_dir", "data.num_workers")
ELSEWHERE = ("checkpoint", "gguf_converter", "output_dir")  # options that do not say what is made


def export(config: Config, name: str, given: Collection[str]) -> ExitStatus:
    """Export a run. The same command again finds it done, or does it anew after a stop.

    Args:
        config: of the command; all but `export` and `hub` comes from the run.
        name: the run, as folder or name, or one of its checkpoints.
        given: keys that were typed.

    Raises:
        UserError: a key without effect, several processes (78), no such run or checkpoint (66), a
            damaged one (74), something else in the target (73), a failed check or conversion (70).
    """
    if useless := sorted(key for key in given if not key.startswith(SETTABLE)):
        raise UserError(
            "C173",
            f"{', '.join(useless)} has no effect on an export",
            expected="export.…, hub.…, output_root, data.cache_dir or data.num_workers; all else "
            "is as the run was trained",
            hint="leave it out; to train otherwise: cs336-sft train with another run_name",
        )
    if launched_processes() > 1:
        raise UserError(
            "C151",
            "an export works in one process, and the launcher started several",
            hint=f"cs336-sft export {shlex.quote(name)}",
        )
    console, options = Console(), config.export
    announce(config.hub, console.warn)
    root = Path(config.output_root).expanduser()
    run = open_run(name, root, options.checkpoint)
    if "output_root" in given and root.resolve() not in run.folder.resolve().parents:
        raise UserError(
            "C173",
            f"output_root has no effect: it says where a run is, and {run.folder} is not there",
            hint="where an export goes says export.output_dir=…",
        )
    if options.format in ROWS:
        run.config.data.cache_dir = config.data.cache_dir or run.config.data.cache_dir
        run.config.data.num_workers = config.data.num_workers
        _export_rows(run, options, console)
        return ExitStatus.DONE
    target, step = _export_model(run, options, console)
    if config.hub.push_to_hub:
        keys = [key for key in given if key.startswith(("export.", "hub.", "output_root"))]
        typed = {key: value for key, value in _values(config) if key in keys}
        words = shlex.join([name, *(f"{key}={value}" for key, value in typed.items())])
        url = push(
            target, config.hub, str(run.config.run_name), again=f"cs336-sft export {words}",
            message=f"{run.config.run_name}, step {step}", leave=[NOTE],
        )  # fmt: skip
        console.note(f"hub      {url or f'not pushed: {OFFLINE}'}")
    return ExitStatus.DONE


def _values(config: Config) -> list[tuple[str, Any]]:
    return [
        *((f"export.{key}", value) for key, value in asdict(config.export).items()),
        *((f"hub.{key}", value) for key, value in asdict(config.hub).items()),
        ("output_root", config.output_root),
    ]


def _export_model(run: TrainedRun, options: ExportConfig, console: Console) -> tuple[Path, int]:
    """Export weights; returns the folder and the step that they are of."""
    tools = None
    if options.format == "gguf":
        tools = find_tools(options.gguf_converter, options.gguf_type is not None)
    adapter = options.format == "adapter"
    source, step = find_weights(run, console.warn, adapter=adapter)
    form = (
        "adapter" if adapter else f"{options.gguf_type or options.dtype}{'-gguf' if tools else ''}"
    )
    target = _target(run, options, f"step-{step:06d}-{form}")
    console.note(f"run      {run.folder}, step {step}")
    weights = sorted(source.glob("*model*.safetensors"))
    made_of = _made_of(run, step, options, {path.name: sha256_of(path) for path in weights})
    with making(target, made_of, console) as folder:
        if folder is not None:
            made_of["reload_check"] = fill_folder(
                folder, run, source, step, options, tools, target.resolve().name, console
            )
    sizes = [path.stat().st_size for path in target.rglob("*") if path.is_file()]
    console.note(f"export   {target}: {len(sizes)} files, {sum(sizes) / 2**20:,.1f} MiB")
    if options.format == "hf":
        console.note(f"lm-eval  {lm_eval_command(target)}")
    return target, step


def lm_eval_command(model: Path) -> str:
    """Write the line that evaluates an export with lm-eval, asked as it was trained."""
    template, words = model / "chat_template.jinja", ["--tasks", "TASK"]
    if template.is_file():
        words.append("--apply_chat_template")
        if ALONE in template.read_text(encoding="utf-8"):  # examples would be turns before it
            words += ["--num_fewshot", "0"]
    return shlex.join(["lm_eval", "--model", "hf", "--model_args", f"pretrained={model}", *words])


def _export_rows(run: TrainedRun, options: ExportConfig, console: Console) -> None:
    """Export the rows that a run trained on, and those that it was evaluated on."""
    config, steps = run.config, int(read_json(run.folder / STATUS).get("step", 0))
    target = _target(run, options, f"rows-{options.format}")
    console.note(f"run      {run.folder}, {steps} steps")
    hashes = {key: run.manifest.get(key) for key in ("data_sha256", "eval_data_sha256")}
    made_of = _made_of(run, steps, options, hashes)
    with making(target, made_of, console) as folder:
        if folder is not None:
            _, tokenizer = open_model(config.model)
            with verifying(config.evaluation) as verify:
                data = prepare_run(
                    config.data, tokenizer, seed=config.seed, progress=console.progress,
                    note=console.note, verify=verify,
                )  # fmt: skip
            _refuse_other_data(data, hashes)
            train, held_out = data.train, data.held_out
            plan = StepPlan(
                len(train.dataset), config.trainer.global_batch_size, config.seed,
                config.data.shuffle, train.mixture,
            )  # fmt: skip
            total = len(train.dataset) + (0 if held_out is None else len(held_out.dataset))
            with console.progress("rows", total) as advance:
                made_of["counts"] = write_rows(
                    folder, data, tokenizer, kind=options.format, times=times_trained(plan, steps),
                    steps=steps, run=str(config.run_name), advance=advance,
                )  # fmt: skip
            splits_off = config.data.eval_path is None and held_out is not None
            compare_with_ledger(made_of["counts"], run.ledger, splits_off=splits_off)
            console.note(f"check    as many examples and tokens as {LEDGER} counts")
    console.note(f"rows     {target}")
    console.note(f"load     datasets.load_dataset({str(target)!r})")


def _target(run: TrainedRun, options: ExportConfig, name: str) -> Path:
    given = options.output_dir
    return run.folder / EXPORTS / name if given is None else Path(given).expanduser()


def _made_of(
    run: TrainedRun, step: int, options: ExportConfig, hashes: Mapping[str, Any]
) -> dict[str, Any]:
    what = {key: value for key, value in asdict(options).items() if key not in ELSEWHERE}
    return {"run": run.config.run_name, "step": step, "options": what, "sha256": dict(hashes)}


def _refuse_other_data(data: RunData, hashes: Mapping[str, Any]) -> None:
    held_out = None if data.held_out is None else data.held_out.fingerprint
    found = {"data_sha256": data.train.fingerprint, "eval_data_sha256": held_out}
    if other := [key for key in found if found[key] != hashes[key]]:
        raise UserError(
            "R382",
            "the data are not those that the run was trained and evaluated on",
            expected=", ".join(f"{key} {str(hashes[key])[:16]}" for key in other),
            got=", ".join(str(found[key])[:16] for key in other),
            hint="restore the files of data.train_path and data.eval_path, and the release that "
            "prepared them",
        )
