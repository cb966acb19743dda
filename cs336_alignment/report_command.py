"""`cs336-sft report`: which runs are shown, and where the page and the plots go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cs336_alignment.config import Config
from cs336_alignment.errors import ExitStatus, UserError
from cs336_alignment.tracking.plots import save_plots
from cs336_alignment.tracking.report import REPORT, write_report
from cs336_alignment.tracking.run_record import is_run, read_run
from cs336_alignment.training.run_folder import METRICS

ROOT_KEY = "output_root="
MOST_RUNS = 8  # as many as there are colours that can be told apart
USAGE = """\
usage: cs336-sft report RUN [RUN_B …] [--html FILE] [output_root=DIR]

RUN is the folder of a run or its name under output_root; it may still be training. One run: its
own report.html, and plots/ beside it. Several: report-A-vs-B.html and report-A-vs-B-plots/ under
output_root."""


def report(words: Sequence[str], html: Path | None) -> ExitStatus:
    """Write the page and the plots of some runs.

    Args:
        words: the runs, and perhaps `output_root=DIR`.
        html: where the page goes; None: to its place by the runs' names.

    Raises:
        UserError: no run, too many, an option that has no effect here (2), a run that is not there
            (66), or the disk refuses (73).
    """
    if {"--help", "-h"} & set(words):
        print(USAGE)
        return ExitStatus.DONE
    roots = [word.removeprefix(ROOT_KEY) for word in words if word.startswith(ROOT_KEY)]
    root = Path(roots[-1] if roots else Config().output_root).expanduser()
    names = [word for word in words if not word.startswith(ROOT_KEY)]
    for word in names:
        if word.startswith("-") or ("=" in word and not Path(word).exists()):
            raise UserError(
                "C154",
                f"{word} has no effect on a report",
                expected="runs, --html FILE, output_root=DIR",
            )
    if not 1 <= len(set(names)) <= MOST_RUNS:
        raise UserError(
            "C153",
            "a report needs the folders or names of runs",
            expected=f"1 to {MOST_RUNS}",
            got=str(len(set(names))),
            hint="cs336-sft report outputs/quickstart",
        )
    runs = [read_run(find_run(name, root)) for name in dict.fromkeys(names)]
    if html is None:
        joined = "-vs-".join(run.name for run in runs)[:200]
        html = root / f"report-{joined}.html" if len(runs) > 1 else runs[0].folder / REPORT
    plots = html.with_name("plots" if html.name == REPORT else f"{html.stem}-plots")
    try:
        html.parent.mkdir(parents=True, exist_ok=True)
        write_report(html, runs)
        pictures = save_plots(plots, runs)
    except OSError as failure:
        raise UserError(
            "R105",
            f"cannot write the report to {html.parent}: {failure.strerror or failure}",
            hint="choose another place: --html FILE",
        ) from failure
    for run in runs:
        for trouble in run.troubles:
            print(f"warning: {run.folder}: {trouble}")
    print(f"report   {html}  (opens offline)")
    if pictures:
        print(f"plots    {plots}: {', '.join(pictures)}, each as PNG and PDF")
    else:
        print("plots    none: nothing was logged yet")
    return ExitStatus.DONE


def find_run(name: str, root: Path) -> Path:
    """Find the folder of a run.

    Args:
        name: a folder, or a run's name.
        root: where named runs are.

    Raises:
        UserError: there is no such run (66).
    """
    given = Path(name).expanduser()
    for folder in (given, root / name):
        if is_run(folder):
            _refuse_several(folder)
            return folder
    there = sorted(path.name for path in root.glob("*") if is_run(path))
    raise UserError(
        "R332",
        f"{name} is no run",
        expected=f"a folder with metrics.jsonl, or a name under {root}",
        hint=f"there are: {', '.join(there[:20])}" if there else "output_root=DIR says where",
    )


def _refuse_several(folder: Path) -> None:
    """Refuse the folder of a sweep or an expert iteration, whose runs lie in it."""
    inner = sorted(path.name for path in folder.glob("*") if is_run(path))
    if inner and not (folder / METRICS).exists():
        raise UserError(
            "R333",
            f"{folder} is no run: it holds some",
            hint=f"cs336-sft report {folder / inner[0]}; there are: {', '.join(inner[:20])}",
        )
