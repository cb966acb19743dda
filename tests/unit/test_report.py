"""The page holds what the run's files hold, says what it leaves out, and stays inert."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cs336_alignment import cli
from cs336_alignment.data.token_view import VISIBLE
from cs336_alignment.tracking import plots, shown_generations
from cs336_alignment.tracking.curves import read_curves
from cs336_alignment.tracking.panels import PANELS, panels_for
from cs336_alignment.tracking.report import page_data, write_own_report, write_report
from cs336_alignment.tracking.run_record import read_run, running_seconds
from cs336_alignment.tracking.shown_generations import choose_generations
from tests.conftest import ROOT
from tests.runs import make_generation, make_run, write_rows
from tests.unit.test_token_page import HOSTILE, Page


def data_of(page: Path) -> dict[str, Any]:
    return json.loads(Page(page.read_text(encoding="utf-8")).texts["script"][0])


def test_the_page_holds_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    write_report(tmp_path / "page.html", [read_run(run)])
    (shown,) = data_of(tmp_path / "page.html")["runs"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name, curve in shown["curves"].items():
        wanted = {row["step"]: row[name] for row in rows if name in row}
        assert curve["x"] == list(wanted)
        for got, value in zip(curve["y"], wanted.values(), strict=True):
            assert got == (value if value is None else pytest.approx(value, rel=1e-5))
    assert shown["name"] == "mine" and shown["status"]["state"] == "completed"
    assert shown["config"]["optimizer.learning_rate"] == 1e-3
    assert shown["ledger"]["train"]["dropped"] == {"too_long": 3}
    assert shown["manifest"]["git_commit"] == "0123abc"
    norm = shown["metrics"]["train/grad_norm"]
    assert (norm["count"], norm["not_finite"], norm["greatest"]) == (60, 1, [1, 1.0])
    tiles = {tile["label"]: tile for tile in shown["tiles"]}
    assert (tiles["Held-out loss"]["before"], tiles["Held-out loss"]["value"]) == (2.0, 1.75)
    assert tiles["Answer reward"]["value"] == 0.25
    assert tiles["Tokens/s, median"]["value"] == np.median([1000.0 + s for s in range(1, 61)])
    assert tiles["In evaluation"]["value"] == 0.125
    assert 33.0 <= tiles["Wall time"]["value"] < 40
    written = [
        [row["response"], row["answer_reward"], row["stopped"]]
        for file in sorted(run.glob("generations/*")) for row in map(json.loads, file.open())
    ]  # fmt: skip
    fields = shown["generations"]["fields"]
    places = [fields.index(name) for name in ("response", "answer_reward", "stopped")]
    assert [[row[p] for p in places] for row in shown["generations"]["rows"]] == written
    prompts = [
        shown["generations"]["prefix"] + text for text, _, _ in shown["generations"]["prompts"]
    ]
    assert prompts == [
        json.loads(line)["prompt"] for line in (run / "generations/step-000000.jsonl").open()
    ]
    assert shown["generations"]["prefix"].endswith("answers.\n")


def test_before_and_after_compare_the_same_questions_at_the_exported_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", steps=4)
    lines = [{"step": s, "time": 1.0 + s, "eval/loss": 5.0 - s} for s in range(5)]
    write_rows(run / "metrics.jsonl", lines)
    (run / "manifest.json").write_text(json.dumps({"evaluation_since_step": 1, "export_step": 3}))
    (tile,) = [
        t for t in page_data([read_run(run)])["runs"][0]["tiles"] if t["label"] == "Held-out loss"
    ]
    assert (tile["steps"], tile["before"], tile["value"]) == ([1, 3], 4.0, 2.0)


def test_running_time_counts_all_parts() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "time": 100.0, "perf/step_seconds": 2.0}, {"step": 2, "time": 103.0},
    ]  # fmt: skip
    assert running_seconds(rows) == 5.0
    rows += [{"step": 2, "time": 900.0, "perf/run_seconds": 7.0}, {"step": 3, "time": 902.5}]
    assert running_seconds(rows) == 9.5
    assert running_seconds([]) is None


def test_long_curves_keep_their_extremes_and_their_means() -> None:
    count = 100_000
    values = np.sin(np.arange(count) / 700)
    values[43_210], values[5] = 99.0, math.nan
    rows = [
        {"step": s + 1, "time": 0.0, "a": None if math.isnan(v) else v}
        for s, v in enumerate(values)
    ]
    curve = read_curves(rows)["a"]
    points = curve.as_json(1000)
    assert points["of"] == count and len(points["x"]) <= 2000
    assert points["x"] == sorted(set(points["x"]))
    known = dict(zip(points["x"], points["y"], strict=True))
    assert known[43_211] == 99.0
    for stretch in np.array_split(np.arange(count), 1000):
        inside = values[stretch][np.isfinite(values[stretch])]
        low, high = inside.argmin(), inside.argmax()
        for place in (low, high):
            step = int(stretch[np.isfinite(values[stretch])][place]) + 1
            assert known[step] == pytest.approx(inside[place], rel=1e-5)
    stretch = np.array_split(np.arange(count), 1000)[700]
    assert points["my"][700] == pytest.approx(values[stretch].mean(), rel=1e-4)
    assert curve.describe()["not_finite"] == 1
    assert len(json.dumps(points)) < 60_000


def test_a_value_that_comes_again_counts_once() -> None:
    rows = [{"step": s, "time": 0.0, "a": float(v)} for s, v in ((2, 1), (1, 2), (2, 3))]
    assert read_curves(rows)["a"].as_json() == {"x": [1, 2], "y": [2.0, 3.0]}


def test_every_metric_has_a_panel() -> None:
    from cs336_alignment.metric_names import EVALUATED

    known = {name for panel in PANELS for name in panel.metrics}
    assert set(EVALUATED) <= known
    names = ["train/loss", "eval/loss/b", "eval/loss/a", "train/skipped_steps", "train/epoch"]
    found = {panel.name: list(panel.metrics) for panel in panels_for(names)}
    assert found == {"loss": ["train/loss"], "loss_by_source": ["eval/loss/a", "eval/loss/b"],
                     "train_skipped_steps": ["train/skipped_steps"]}  # fmt: skip


def test_generations_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    rows = [make_generation(i, "word " * 200) for i in range(100)]
    run = make_run(tmp_path / "r", generations=dict.fromkeys((0, 10, 20), rows))
    (run / "generations/step-000020.jsonl").open("ab").write(b"torn")
    shown = choose_generations(run, budget=60_000)
    first, middle, last = shown["evaluations"]
    assert [one["step"] for one in (first, middle, last)] == [0, 10, 20]
    assert (first["of"], middle["of"], last["of"]) == (100, 100, 101)
    assert 5 < first["shown"] < last["shown"] < 40
    assert len(shown["rows"]) == first["shown"] + middle["shown"] + last["shown"]
    assert len(json.dumps(shown)) < 70_000
    by_evaluation = [[row[1] for row in shown["rows"] if row[0] == place] for place in range(3)]
    assert by_evaluation[0] == by_evaluation[2][: first["shown"]]  # the same prompts
    whole = choose_generations(run)
    assert [one["shown"] for one in whole["evaluations"]] == [100, 100, 100]
    assert whole["evaluations"][2]["unreadable"] == 1


def test_of_many_evaluations_some_are_shown_with_the_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shown_generations, "MOST_EVALUATIONS", 5)
    monkeypatch.setattr(shown_generations, "MOST_CHARACTERS", 8)
    run = make_run(
        tmp_path / "r",
        generations={
            s: [{**make_generation(1, "0123456789"), "reward_error": "it died"}] for s in range(50)
        },
    )
    shown = choose_generations(run)
    assert [one["step"] for one in shown["evaluations"]] == [0, 12, 24, 37, 49]
    assert shown["left_out"] == 45
    row = dict(zip(shown["fields"], shown["rows"][0], strict=True))
    assert (row["response"], row["cut"], row["error"]) == ("01234567", 2, "it died")


def hostile_run(folder: Path, text: str) -> Path:
    name = re.sub(r"[/\x00]", "", text.encode("utf-8", "replace").decode()) or "empty"
    run = make_run(
        folder / name[:60],
        generations={
            0: [
                make_generation(0, text, prompt=text),
                {**make_generation(1, text), "reward_error": text},
            ]
        },
    )
    (run / "status.json").write_text(
        json.dumps({"state": text, "error": text, "resume_command": text})
    )
    (run / "config.yaml").write_text(
        json.dumps({"model": {"name_or_path": text.replace("\ud800", "")}})
    )
    (run / "manifest.json").write_text(
        json.dumps({text: text, "best": {"step": 1, "metric": text}})
    )
    (run / "data_ledger.json").write_text(
        json.dumps({text: {"source": text, "dropped": {text: 1}}})
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 61, "time": 1.0, text: 1.0, f"eval/loss/{text}": 1.0}) + "\n"
        )
    return run


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_in_a_run_becomes_markup(tmp_path: Path, text: str) -> None:
    write_report(tmp_path / "plain.html", [read_run(make_run(tmp_path / "plain"))])
    write_report(tmp_path / "page.html", [read_run(hostile_run(tmp_path / "h", text))])
    plain, page = (
        Page((tmp_path / name).read_text(encoding="utf-8")) for name in ("plain.html", "page.html")
    )
    assert page.tags == plain.tags
    data = page.texts["script"][0]
    assert data.isascii() and not set(data) & set("<>&")
    (run,) = json.loads(data)["runs"]
    assert run["generations"]["rows"][0][4] == text
    assert page.texts["script"][1:] == plain.texts["script"][1:]


def test_the_page_loads_nothing_and_writes_no_markup(tmp_path: Path) -> None:
    write_report(tmp_path / "page.html", [read_run(make_run(tmp_path / "r"))])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    library, own = page.texts["script"][1:]
    assert library.strip().startswith("/*! https://github.com/leeoniya/uPlot")
    for code in (library, own):
        assert not re.search(
            r"innerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|XMLHttp|import\(", code
        )
    assert "http" not in own
    for tag, attributes in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "base"}
        assert not {"src", "srcset", "style"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import", text[text.index("<style>") : text.index("</style>")])
    policy = next(
        a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.count("'sha256-") == 2 and "default-src 'none'" in policy
    found = re.search(r"const UNSEEN = /(.*)/g;", own)
    assert found is not None
    unseen = re.compile(found[1])
    assert {code for code in range(0x10000) if unseen.fullmatch(chr(code))} == set(VISIBLE)


def test_a_run_that_holds_little_is_shown(tmp_path: Path) -> None:
    failed = tmp_path / "failed"
    failed.mkdir()
    (failed / "status.json").write_text('{"state": "failed", "error": "error[D203]: …"}')
    write_report(tmp_path / "page.html", [read_run(failed)])
    (run,) = data_of(tmp_path / "page.html")["runs"]
    assert run["status"]["error"] == "error[D203]: …"
    assert (run["curves"], run["tiles"], run["generations"]["rows"]) == ({}, [], [])
    assert run["troubles"] == []
    (failed / "config.yaml").write_text("[")
    (failed / "manifest.json").write_text("{")
    assert len(read_run(failed).troubles) == 2


def test_a_page_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "r")
    warnings: list[str] = []
    write_own_report(run, warnings.append)
    assert warnings == [] and (old := (run / "report.html").read_bytes())

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    write_own_report(run, warnings.append)
    assert warnings == ["report.html could not be written (disk full)"]
    assert (run / "report.html").read_bytes() == old
    assert not (run / ".report.html").exists()
    (run / "metrics.jsonl").unlink()
    write_own_report(run, warnings.append)  # nothing to show is nothing to warn of
    assert len(warnings) == 1


def test_the_command_writes_page_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "outputs/a", steps=9)
    make_run(tmp_path / "elsewhere/b", steps=9, learning_rate=2e-3)
    assert cli.run(["report", "a"]) == 0
    assert (tmp_path / "outputs/a/report.html").is_file()
    pictures = {path.name for path in (tmp_path / "outputs/a/plots").iterdir()}
    assert {"overview.png", "overview.pdf", "rewards.png", "response_lengths.pdf"} <= pictures
    assert "outputs/a/report.html" in capsys.readouterr().out
    # Another thirty pictures take their time and show nothing new.
    monkeypatch.setattr(plots, "plot_panels", lambda paths, *_: [path.touch() for path in paths])
    with (tmp_path / "outputs/a/metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "time"')  # it is still training
    assert cli.run(["report", "outputs/a", "elsewhere/b"]) == 0
    assert len(data_of(tmp_path / "outputs/report-a-vs-b.html")["runs"]) == 2
    assert (tmp_path / "outputs/report-a-vs-b-plots/loss.png").is_file()
    assert cli.run(["report", "b", "output_root=elsewhere", "--html", "new/page.html"]) == 0
    assert data_of(tmp_path / "new/page.html")["runs"][0]["name"] == "b"
    assert (tmp_path / "new/page-plots/overview.pdf").is_file()
    assert cli.run(["report", "--help"]) == 0 and "usage" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "status", "code"), [
    ((), 2, "C153"), (("a",) * 2 + tuple("bcdefghi"), 2, "C153"), (("a", "seed=1"), 2, "C154"),
    (("a", "-m"), 2, "C154"), (("a", "--plots", "x"), 2, "C001"), (("nowhere",), 66, "R332"),
    (("a", "--html", "/proc/none/page.html"), 73, "R105"),
])  # fmt: skip
def test_what_makes_no_report(
    arguments: tuple[str, ...], status: int, code: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "outputs/a", steps=3)
    assert cli.run(["report", *arguments]) == status
    assert f"error[{code}]" in capsys.readouterr().err


def test_the_library_came_with_its_licence() -> None:
    folder = ROOT / "cs336_alignment/tracking/page"
    assert "MIT License" in (folder / "uPlot.LICENSE").read_text()
    assert "Leon Sorokin" in (folder / "uPlot.LICENSE").read_text()


def test_a_folder_of_several_runs_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "sweep/trial-000")
    (tmp_path / "sweep/config.yaml").touch()
    assert cli.run(["report", str(tmp_path / "sweep")]) == 66
    assert f"cs336-sft report {tmp_path / 'sweep/trial-000'}" in capsys.readouterr().err
    assert not (tmp_path / "sweep/report.html").exists()
