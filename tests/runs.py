"""A run's folder as a run leaves it, without training: for what only reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from cs336_alignment.tracking.metrics import MetricsFile

TEMPLATE = "A conversation between User and Assistant, who thinks and answers.\nUser: {}\nAssistant: <think>"


def make_generation(index: int, response: str, *, reward: float = 0.0, format_reward: float = 1.0,
                    stopped: str = "stop", prompt: str | None = None) -> dict[str, Any]:  # fmt: skip
    return {
        "index": index, "sample": 0, "prompt": prompt or TEMPLATE.format(f"What is {index} + 1?"),
        "response": response, "ground_truth": str(index + 1), "reward": reward,
        "format_reward": format_reward, "answer_reward": reward,
        "token_entropy": 0.25, "length": len(response), "stopped": stopped,
    }  # fmt: skip


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(
    folder: Path,
    *,
    steps: int = 60,
    learning_rate: float = 1e-3,
    status: dict[str, Any] | None = None,
    generations: dict[int, list[dict[str, Any]]] | None = None,
) -> Path:
    """Write a run of some steps; without generations each fourth of 8 responses is correct at the
    end, and none at the start.
    """
    folder.mkdir(parents=True)
    if generations is None:
        generations = {
            0: [
                make_generation(i, f"nothing {i}", format_reward=0.0, stopped="length")
                for i in range(8)
            ],
            steps: [
                make_generation(i, f"so it is {i + 1}", reward=float(i % 4 == 0)) for i in range(8)
            ],
        }
    file = MetricsFile(folder / "metrics.jsonl")
    for step in range(steps + 1):
        if step:
            loss = 2 * math.exp(-step / 20) + 0.01 * (step % 3)
            file.write(step, {
                "train/loss": loss, "train/grad_norm": math.inf if step == 7 else 1 / step,
                "train/learning_rate": learning_rate * (1 - step / steps), "train/token_entropy": loss,
                "perf/tokens_per_second": 1000.0 + step, "perf/step_seconds": 0.5,
                "perf/peak_memory_gib": 1.5,
            })  # fmt: skip
        if step in (0, steps):
            share = 0.25 if step else 0.0
            file.write(step, {
                "eval/loss": 2.0 - share, "eval/loss/a.jsonl": 1.0, "eval/loss/b.jsonl": 3.0,
                "eval/answer_reward": share, "eval/format_reward": 4 * share, "eval/stop_rate": 4 * share,
                "eval/response_length": 10.0, "perf/evaluation_seconds": 2.0,
                "perf/run_seconds": 3.0 + 0.5 * step, "perf/evaluation_share": 0.125,
            })  # fmt: skip
    file.close()
    for step, rows in generations.items():
        write_rows(folder / "generations" / f"step-{step:06d}.jsonl", rows)
    config = {"model": {"name_or_path": "builtin:arithmetic"}, "optimizer": {"learning_rate": learning_rate},
              "trainer": {"max_steps": None}, "data": {"train_path": "rows.jsonl"}, "seed": 42}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    entry = {"source": "rows.jsonl", "format": "prompt_response", "rows_read": 11, "kept": 8,
             "dropped": {"too_long": 3}, "tokens": 80, "response_tokens": 40, "longest": 20,
             "ends_with_stop": 8, "truncated": 0}  # fmt: skip
    (folder / "data_ledger.json").write_text(json.dumps({"train": {**entry, "sources": [entry]}}))
    manifest = {"versions": {"torch": "2.0"}, "git_commit": "0123abc", "total_steps": steps}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    ended = {"state": "completed", "step": steps, "exit_code": 0, "error": None,
             "resume_command": "cs336-sft train …", "reload_check": "passed"}  # fmt: skip
    (folder / "status.json").write_text(json.dumps(status or ended))
    return folder
