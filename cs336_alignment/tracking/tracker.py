"""One place that the run reports to; it passes on to console, metrics.jsonl, wandb and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cs336_alignment.files import replacing
from cs336_alignment.tracking.console import Console
from cs336_alignment.tracking.metrics import MetricsFile, read_metrics
from cs336_alignment.tracking.plots import plot_lengths, plot_loss
from cs336_alignment.tracking.run_clock import RunClock
from cs336_alignment.tracking.wandb_logger import Logger

SHOWN_CHARACTERS = 400
SHOWN_IN_THE_LOOP = 200


class RunTracker:
    """Reports a run; without a metrics file (off the main process) it is silent.

    Args:
        console: prints.
        metrics: the run's file, or None.
        logger: wandb or nothing.
        folder: of the run.
        on_saved: called with the step of each checkpoint.

    Attributes:
        evaluations: the rows of the metrics file that are evaluations, those of earlier parts of
            the run among them.
        generations: of the last evaluation that had any.
    """

    def __init__(
        self,
        console: Console,
        metrics: MetricsFile | None,
        logger: Logger,
        folder: Path,
        on_saved: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.console = console
        self.metrics = metrics
        self.logger = logger
        self.folder = folder
        self.on_saved = on_saved
        self.generations: Sequence[Mapping[str, Any]] = ()
        rows = [] if metrics is None else read_metrics(metrics.path)
        self.evaluations = [row for row in rows if "eval/loss" in row]
        self._clock = RunClock(rows)
        self._drawn = False

    def step(self, step: int, metrics: Mapping[str, float], *, log: bool) -> None:
        """Take one step's metrics; `log`: into the files too, else only to the progress bar."""
        self.console.step(step, metrics, show=log)
        if log and self.metrics is not None:
            self.metrics.write(step, metrics)
            self.logger.log(step, metrics)

    def sync(self) -> None:
        """Bring the metrics to the disk."""
        if self.metrics is not None:
            self.metrics.sync()

    def saved(self, step: int, seconds: float) -> None:
        """Take notice of a checkpoint."""
        self.console.note(f"checkpoint of step {step} saved in {seconds:.1f} s")
        self.on_saved(step)

    def warn(self, text: str) -> None:
        """Tell people of something that is not as it should be."""
        self.console.warn(text)

    def evaluation(
        self,
        step: int,
        metrics: Mapping[str, float],
        rows: Sequence[Mapping[str, Any]],
        seconds: float = 0.0,
    ) -> None:
        """Take an evaluation's metrics and generations, and how long it took; rows go to
        `generations/step-….jsonl`.
        """
        if self.metrics is None:
            return
        if rows:  # first: an evaluation that the metrics hold is not made again
            self.generations = rows
            write_generations(self.folder / "generations" / f"step-{step:06d}.jsonl", rows)
        metrics = {**metrics, **self._clock.evaluated(seconds)}
        self.metrics.write(step, metrics)
        self.evaluations.append({"step": step, **metrics})
        self.logger.log(step, metrics)
        shown = ("eval/loss", "eval/format_reward", "eval/answer_reward", "eval/stop_rate")
        parts = [f"{name} {metrics[name]:.4f}" for name in shown if name in metrics]
        self.console.note(f"evaluation at step {step}: " + "  ".join(parts))
        if rows:
            show_examples(self.console, rows, 1, characters=SHOWN_IN_THE_LOOP)
            self._log_generations(step, rows)

    def _log_generations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.logger.log_table("eval/generations", step, rows)
        for name, key in (("lengths", "length"), ("entropies", "token_entropy")):
            values = [row[key] for row in rows if row[key] is not None]
            self.logger.log_histogram(f"eval/response_{name}", step, values)

    def has_evaluated(self, step: int) -> bool:
        """Tell whether the metrics hold an evaluation of this step."""
        return any(row["step"] == step for row in self.evaluations)

    def draw(self, title: str) -> None:
        """Draw the pictures, once, when the last metrics are there."""
        if self.metrics is None or self._drawn:
            return
        self._drawn = True
        for name, draw, source in (
            ("loss", plot_loss, self.metrics.path),
            ("lengths", plot_lengths, self.folder / "data_ledger.json"),
        ):
            picture = self.folder / f"{name}.png"
            try:
                draw(source, picture, title)
            except Exception as failure:  # a picture must not fail a run whose weights are done
                self.console.warn(f"{picture.name} could not be drawn ({failure})")
            else:
                self.logger.log_image(name, picture)

    def finish(self, exit_code: int, title: str) -> None:
        """Draw the pictures, if nobody did, and close everything."""
        self.console.stop()
        if self.metrics is None:
            return
        self.metrics.close()
        self.draw(title)
        self.logger.finish(exit_code)


def write_generations(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write generations as JSON lines; replaces an older file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def show_examples(
    console: Console,
    rows: Sequence[Mapping[str, Any]],
    count: int,
    characters: int = SHOWN_CHARACTERS,
) -> None:
    """Print some generations: the end of the prompt, the response, and how it was judged; of each
    text at most so many characters.
    """
    for row in rows[:count]:
        question = row["prompt"].rpartition("\nUser: ")[2].removesuffix("\nAssistant: <think>")
        verdict = (
            "correct"
            if row["answer_reward"] > 0
            else "wrong"
            if row["format_reward"] > 0
            else "no answer"
        )
        console.note(f"  prompt    {_shorten(question, characters)}")
        console.note(f"  response  {_shorten(row['response'], characters)}")
        console.note(f"  truth     {row['ground_truth']}  ({verdict})")
        console.note("")


def _shorten(text: str, characters: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= characters else text[:characters] + " …"
