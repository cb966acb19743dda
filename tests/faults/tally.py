"""The table of faults: how many points were tried, how many the run survived.

A test with the marker `fault(name)` is a line of the table, or a part of one: a single point, or as
many as it counts with the fixture `tally`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PROPERTY = "fault"


class Tally:
    """Counts the points of one fault; a point that is lost does not end the test at once.

    Args:
        name: of the fault, as the table shows it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.tried = 0
        self.lost: list[str] = []

    @contextmanager
    def point(self, what: object) -> Iterator[None]:
        """Cover the checks of one point."""
        self.tried += 1
        try:
            yield
        except AssertionError as failure:
            self.lost.append(f"{what}: {failure}")


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Count this test's points under the name of its `fault` marker; fail if one is lost."""
    marker = request.node.get_closest_marker("fault")
    counted = Tally(marker.args[0])
    yield counted
    request.node.user_properties.append(
        (PROPERTY, (counted.name, counted.tried, len(counted.lost)))
    )
    assert counted.tried, "no point was tried"
    assert not counted.lost, "\n\n".join(counted.lost)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: Any
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Count a test without a tally as one point."""
    report = yield
    marker = item.get_closest_marker("fault")
    if report.when == "call" and marker and "tally" not in getattr(item, "fixturenames", ()):
        item.user_properties.append((PROPERTY, (marker.args[0], 1, int(report.failed))))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table: fault, points tried, survived, lost."""
    points: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for reports in terminalreporter.stats.values():
        for report in reports:
            # The last report of a test has what its fixtures said at their end.
            if getattr(report, "when", None) == "teardown":
                for name, value in report.user_properties:
                    if name == PROPERTY:
                        points[value[0]][0] += value[1]
                        points[value[0]][1] += value[2]
    if not points:
        return
    terminalreporter.section("faults")
    width = max(map(len, points))
    terminalreporter.write_line(f"{'fault':<{width}}  tried  survived  lost")
    for name in sorted(points, key=_order):
        tried, lost = points[name]
        terminalreporter.write_line(f"{name:<{width}}  {tried:5}  {tried - lost:8}  {lost:4}")
    tried, lost = (sum(column) for column in zip(*points.values(), strict=True))
    terminalreporter.write_line(f"{'all':<{width}}  {tried:5}  {tried - lost:8}  {lost:4}")


def _order(name: str) -> tuple[int, str]:
    number = name.split()[0].removeprefix("T")
    return (int(number) if number.isdigit() else 99), name
