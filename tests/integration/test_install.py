"""The wheel, installed and run far from the checkout, finds its presets, templates and assets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, clean_environment


def test_the_installed_wheel_trains_from_another_folder(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    options = {"check": True, "timeout": 200, "capture_output": True, "text": True}
    # No isolation: the tests need no network, and hatchling is among the dev tools.
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)],
        **options,
    )
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], **options)
    presets = tmp_path / "presets" / "experiment"
    presets.mkdir(parents=True)
    (presets / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - quickstart\nrun_name: mine\n"
        "data:\n  max_train_examples: 40\n  max_eval_examples: 5\n"
        "trainer:\n  max_steps: 2\nevaluation:\n  generation_steps: null\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = (
        "import sys, cs336_alignment; assert cs336_alignment.__file__.startswith(sys.argv.pop(1));"
        "from cs336_alignment.cli import main; main()"
    )
    arguments = ["train", "--config-dir", str(presets.parent), "experiment=mine", "logger=none"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(site), *arguments],
        cwd=elsewhere, env={**clean_environment(), "PYTHONPATH": str(site)}, text=True,
        capture_output=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "outputs/mine/model/model.safetensors").is_file()
    assert (elsewhere / "outputs/mine/report.html").is_file()
    assert list(site.rglob("tracking/page/uPlot.LICENSE"))
