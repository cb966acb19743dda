"""What a person sees: a live bar on a terminal, plain lines when piped, nothing off the main
process.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

PIPED_PROGRESS_SECONDS = 10.0
ETA_STEPS = 50  # the mean of so many last steps foretells the rest


class _Out(RichConsole):
    """A console that nobody need read: a closed pipe or terminal silences it, and that is all."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # Python flushes standard output once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Console:
    """Prints notes, tables and progress.

    Args:
        enabled: False on all but the main process; every method then does nothing.
        rich_console: where to print; None: standard output.
    """

    def __init__(self, enabled: bool = True, rich_console: RichConsole | None = None) -> None:
        self.enabled = enabled
        self._out = rich_console or _Out(highlight=False, soft_wrap=True)
        self._live: Progress | None = None
        self._task: int | None = None
        self._total = 0
        self._seconds: list[float] = []

    def note(self, text: str) -> None:
        """Print a line."""
        if self.enabled:
            self._out.print(Text(text))

    def warn(self, text: str) -> None:
        """Print a warning, on standard error when piped."""
        if not self.enabled:
            return
        if self._out.is_terminal:
            self._out.print(Text(f"warning: {text}", style="yellow"))
        else:
            with suppress(OSError):  # a closed pipe
                print(f"warning: {text}", file=sys.stderr, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; all columns but the first are right-aligned."""
        if not self.enabled:
            return
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._out.print(table)

    def start(self, total_steps: int, step: int) -> None:
        """Begin the training bar at a step."""
        self._total = total_steps
        self._seconds = []
        if self.enabled and self._out.is_terminal:
            live = self._open_live()
            self._task = live.add_task("training", total=total_steps, completed=step, detail="")

    def step(self, step: int, metrics: Mapping[str, float], *, show: bool) -> None:
        """Move the bar; piped, print a line if `show`."""
        if not self.enabled:
            return
        self._seconds.append(metrics["perf/step_seconds"])
        if self._live is not None and self._task is not None:
            detail = (
                f"loss {metrics['train/loss']:.4f}  {metrics['perf/tokens_per_second']:,.0f} tok/s"
            )
            self._live.update(self._task, completed=step, detail=detail)  # type: ignore[arg-type]
        elif show:
            self.note(self._line(step, metrics))

    def _line(self, step: int, metrics: Mapping[str, float]) -> str:
        recent = self._seconds[-ETA_STEPS:]
        left = sum(recent) / len(recent) * (self._total - step)
        width = len(str(self._total))
        return (
            f"step {step:>{width}}/{self._total}  loss {metrics['train/loss']:.4f}  "
            f"lr {metrics['train/learning_rate']:.2e}  grad {metrics['train/grad_norm']:.2f}  "
            f"{metrics['perf/tokens_per_second']:,.0f} tok/s  eta {_duration(left)}"
        )

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Show a bar for something besides the steps; yields a function that advances it.

        Piped, a line appears every ten seconds, and none for what is done sooner. `total` is None
        where nobody knows it beforehand.
        """
        if self.enabled and self._out.is_terminal:
            own = self._live is None
            live = self._open_live()
            task = live.add_task(description, total=total, detail="")
            try:
                yield lambda n=1: live.update(task, advance=n)  # type: ignore[misc]
            finally:
                live.remove_task(task)
                if own:
                    self._close_live()
            return
        done, last = 0, time.monotonic()

        def advance(n: int = 1) -> None:
            nonlocal done, last
            done = done + n if total is None else min(total, done + n)
            if self.enabled and time.monotonic() - last > PIPED_PROGRESS_SECONDS:
                last = time.monotonic()
                self.note(f"{description}: {done:,}" + (f"/{total:,}" if total else ""))

        yield advance

    def stop(self) -> None:
        """End the training bar, leaving its last state on the screen."""
        self._close_live()

    def _open_live(self) -> Progress:
        if self._live is None:
            self._live = Progress(
                TextColumn("{task.description:<12}"),
                BarColumn(bar_width=14),  # all columns fit a terminal of 80
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=self._out,
                refresh_per_second=4,
            )
            self._live.start()
        return self._live

    def _close_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live, self._task = None, None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
