"""The page in a browser, from a file: it works, and it asks the network for nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cs336_alignment.tracking.report import write_report
from cs336_alignment.tracking.run_record import read_run
from tests.runs import make_generation, make_run

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
HOSTILE = "</script><img src=x onerror=document.title='broken'><b>bold</b> \u202egnp.exe"

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip(
        "playwright.sync_api", reason="the package playwright is not installed"
    )
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"there is no {', '.join(NAMES)} on the path")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Write the page of some runs and open it; at the end nothing may have gone wrong in it."""
    troubles: list[str] = []
    contexts = []

    def open_(*runs: Path, **options: Any) -> Any:
        path = tmp_path / "page.html"
        write_report(path, [read_run(run) for run in runs])
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda r: None if r.url == path.as_uri() else troubles.append(r.url))
        page.goto(path.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert troubles == []


def wait_until(page: Any, expression: str) -> None:
    """Wait for an expression; Playwright's own way is `eval`, which the page's policy refuses."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never came true: {expression}")


def texts(page: Any, selector: str) -> list[str]:
    return [text.strip() for text in page.locator(selector).all_text_contents()]


def test_a_run_can_be_looked_at(open_page: Open, tmp_path: Path) -> None:
    page = open_page(make_run(tmp_path / "mine"))
    assert texts(page, "h1") == ["mine"] and texts(page, ".state") == ["Completed"]
    assert "60 of 60" in page.locator(".facts").inner_text()
    tiles = dict(zip(texts(page, ".tile dt"), texts(page, ".tile dd:not(.from)"), strict=True))
    assert (tiles["Held-out loss"], tiles["Answer reward"]) == ("1.7500", "25.0 %")
    titles = texts(page, "figure h4")
    assert titles[:2] == ["Loss", "Held-out loss by source"] and "Rewards" in titles
    page.locator("figure", has_text="Throughput").scroll_into_view_if_needed()
    wait_until(page, "charts.filter(c => c.plot).length === charts.length")
    assert page.evaluate("charts.every(c => c.host.querySelector('canvas').width > 100)")
    loss = page.locator("figure").first
    assert "1 value not finite" in page.locator("figure", has_text="Gradient norm").inner_text()
    # Under the cursor, the values of its step, in all charts.
    loss.scroll_into_view_if_needed()
    box = loss.locator(".u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    assert "step 30" in loss.inner_text()
    assert "step 30" in page.locator("figure", has_text="Learning rate").inner_text()
    # By keyboard.
    loss.locator(".plot").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert "step 1" in loss.inner_text().split("\n")
    assert page.locator("#live").inner_text().startswith("step 1: training 1.91")
    # A drag zooms into all charts, Escape goes back.
    page.mouse.move(box["x"] + 50, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 20, steps=4)
    page.mouse.up()
    scales = page.evaluate("charts.map(c => [c.plot.scales.x.min, c.plot.scales.x.max])")
    assert len({tuple(scale) for scale in scales}) == 1 and 0 < scales[0][0] < scales[0][1] < 60
    page.locator("#unzoom").click()
    assert page.evaluate("charts[2].plot.scales.x.max") == 60
    # A curve is hidden and shown.
    first = loss.locator(".legend button").first
    first.click()
    assert first.get_attribute("aria-pressed") == "false"
    assert page.evaluate("charts[0].plot.series[1].show") is False
    page.locator("#smooth").evaluate("n => { n.value = .9; n.dispatchEvent(new Event('input')) }")
    assert (
        page.evaluate("charts[0].plot.series.length") == 4
    )  # raw and smooth, and the held-out one
    page.locator("#log").click()
    assert page.evaluate("charts[0].plot.scales.y.distr") == 3


def test_responses_are_searched_and_filtered(open_page: Open, tmp_path: Path) -> None:
    rows = [
        make_generation(0, "it is 1", reward=1.0),
        {**make_generation(1, "it is 7"), "reward_error": f"it raised {HOSTILE}"},
        make_generation(2, "who knows", format_reward=0.0, stopped="length"),
        make_generation(3, HOSTILE, reward=1.0, stopped="eos"),
    ]  # fmt: skip
    first = [
        make_generation(i, f"first {i}", format_reward=0.0, stopped="length") for i in range(4)
    ]
    page = open_page(make_run(tmp_path / "r", generations={0: first, 60: rows}))
    count, cards = page.locator("#generations .count"), page.locator(".sample")
    step, verdict, ending = (
        page.locator(f"select[aria-label='{name}']") for name in ("Step", "Verdict", "Ending")
    )
    assert count.inner_text() == "4 of 4 responses"
    badges = texts(page, ".sample .badge")
    assert badges == ["correct", "wrong", "no format", "truncated", "correct"]
    assert texts(page, ".truth") == ["1", "2", "3", "4"]
    failed = cards.nth(1).locator(".answer .line").inner_text()
    assert "the reward failed, which counts as 0: it raised <" in failed
    # A response is text, whatever it says; what would turn the reading is a sign.
    shown = cards.nth(3).locator(".answer .text")
    assert shown.inner_text() == HOSTILE.replace("\u202e", "U+202E")
    assert page.locator(".answer :is(img, b:not(.line b), script)").count() == 0
    assert page.title() == "r"
    for select, choice, wanted in ((verdict, "correct", 2), (verdict, "wrong", 1), (verdict, "no-format", 1),
                                   (ending, "cut", 1), (ending, "stopped", 0)):  # fmt: skip
        select.select_option(choice)
        assert cards.count() == wanted, choice
    verdict.select_option("")
    assert cards.count() == 3
    ending.select_option("")
    search = page.locator("#search")
    search.fill("IT IS")
    wait_until(page, "document.querySelectorAll('.sample').length === 2")
    assert texts(page, ".sample mark") == ["it is", "it is"]
    search.fill("<b>bold")
    wait_until(page, "document.querySelectorAll('.sample').length === 1")
    search.fill("(")
    wait_until(page, "document.querySelector('#generations .empty')")
    search.fill("")
    step.select_option("0")
    wait_until(page, "document.querySelectorAll('.sample').length === 4")
    assert texts(page, ".answer .text")[0] == "first 0"
    step.select_option("all")
    assert count.inner_text() == "8 of 8 responses"
    # Before and after, beside each other.
    step.select_option("60")
    page.get_by_role("button", name="Compare with another step").click()
    assert count.inner_text() == "4 of 4 prompts"
    assert texts(page, ".sample:first-child .answer .text") == ["first 0", "it is 1"]
    page.locator("select[aria-label='Verdict of after']").select_option("correct")
    assert cards.count() == 2


def test_config_and_themes(open_page: Open, tmp_path: Path) -> None:
    page = open_page(make_run(tmp_path / "r"), color_scheme="dark")
    keys = page.locator("#config tbody th")
    assert keys.count() == 5
    assert texts(page, "#config tr.differs th") == [
        "model.name_or_path",
        "optimizer.learning_rate",
        "data.train_path",
    ]
    page.locator("#config input[type=search]").fill("0.001")
    assert texts(page, "#config tbody th") == ["optimizer.learning_rate"]
    page.locator("#config input[type=search]").fill("")
    page.locator("#config input[type=checkbox]").check()
    assert keys.count() == 3
    assert "3" in texts(page, "#ledger td") and "dropped: too long" in texts(
        page, "#ledger thead th"
    )
    assert "0123abc" in texts(page, "#manifest td")

    def background() -> str:
        color: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return color

    dark = background()
    toggle = page.locator("#theme")
    assert toggle.inner_text() == "Theme: Auto"
    toggle.click()
    light = background()
    assert toggle.inner_text() == "Theme: Light" and light != dark
    toggle.click()
    assert toggle.inner_text() == "Theme: Dark" and background() == dark
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_runs_are_overlaid(open_page: Open, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", learning_rate=2e-3, steps=80)]
    page = open_page(*runs)
    assert texts(page, ".overview tbody th") == ["a", "b"]
    assert texts(page, "figure h4")[:2] == ["Loss: training", "Loss: held out"]
    assert texts(page, "figure:first-child .legend .label")[:2] == ["a", "b"]
    wait_until(page, "charts[0].plot")
    assert page.evaluate("charts[0].plot.data.length") == 3
    assert page.evaluate("charts[0].plot.data[0].length") == 80
    # Only what differs, and beside it the default.
    assert texts(page, "#config tbody th") == ["optimizer.learning_rate"]
    assert texts(page, "#config tbody td") == ["0.001", "0.002", "0.00002"]
    assert texts(page, "#metrics thead th")[1:] == ["a", "b"]
    assert page.locator("#generations .count").inner_text() == "8 of 8 prompts"
    assert texts(page, ".sample:first-child .answer .text") == ["so it is 1", "so it is 1"]
    page.locator("select[aria-label='Step of a']").select_option("0")
    assert texts(page, ".sample:first-child .answer .text") == ["nothing 0", "so it is 1"]
    page.locator("select[aria-label='Verdict of b']").select_option("correct")
    assert page.locator(".sample").count() == 2


def test_a_run_that_failed_at_once(open_page: Open, tmp_path: Path) -> None:
    run = tmp_path / "failed"
    run.mkdir()
    (run / "status.json").write_text(
        '{"state": "failed", "exit_code": 65, "error": "error[D203]: response is empty", '
        '"resume_command": "cs336-sft train x", "step": 0}'
    )
    page = open_page(run)
    assert texts(page, ".alert h3") == ["Failed, exit status 65"]
    assert "error[D203]: response is empty" in page.locator(".alert pre").inner_text()
    assert page.locator(".command code").inner_text() == "cs336-sft train x"
    assert page.locator(".empty").count() == 6
