"""Skipped tests are counted by reason; where CI=true, or with `--strict-skips`, an unexpected reason fails the suite.

A skipped test proves nothing, and nobody reads the letter `s`: a library that is not installed, or a renamed heading in
the README, would otherwise silence a part of the suite for good.
"""

from __future__ import annotations

import os
import re
from collections import Counter

import pytest

# What continuous integration may lack, and why it may.
EXPECTED = {
    "needs a CUDA device": "runners have no GPU",
    "there is a GPU": "the opposite: what is said where there is none",
    "needs LIBERO's assets|no LIBERO assets": "2 GB that are not ours to ship; stand-ins take their place",
    "needs the sample observation": "of OpenVLA-OFT, not ours to ship",
    "needs OSMesa": "Mesa 25.1 dropped it; EGL draws",
    "compares the two software renderers": "where a GPU draws",
    "cannot mount a tmpfs|no mount command": "root in a container may not mount; a disk that is full needs one",
    "this torch can shard": "what is said with torch 2.6",
    "tensorboard is installed": "what is said where it is not",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips",
        action="store_true",
        default=os.environ.get("CI", "").lower() in ("true", "1"),
        help="fail if a test is skipped for a reason that is not in tests/skips.py (the default where CI=true)",
    )


class Skips:
    """Collects the reasons; sees those of pytest-xdist's processes, too, because it runs where they report to."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.reasons: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._add(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._add(report)

    def _add(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        self.reasons[text.removeprefix("Skipped: ")] += 1

    def unexpected(self) -> list[str]:
        return [reason for reason in self.reasons if not any(re.search(known, reason) for known in EXPECTED)]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.strict and self.unexpected() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.reasons:
            terminalreporter.section("skipped, by reason")
        for reason, count in self.reasons.most_common():
            terminalreporter.line(f"{count:4d}  {reason}")
        if self.strict and self.unexpected():
            terminalreporter.line("")
            for reason in self.unexpected():
                terminalreporter.line(f"FAILED: skipped for a reason that tests/skips.py does not expect: {reason}")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # in a process of pytest-xdist, which reports to another one
        config.pluginmanager.register(Skips(config.getoption("--strict-skips")))
