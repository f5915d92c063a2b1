"""Skips are counted by reason, and fail the suite where they are unexpected."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[1]
SUITE = """
import pytest

def test_nothing():
    pass

def test_allowed():
    pytest.skip("needs a CUDA device")
"""

BODY = """
def test_other():
    """


def run(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "CI"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-p", "tests.skips", "-p", "no:cacheprovider", *options, str(folder)]
    return subprocess.run(command, cwd=folder, env=environment | variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("where", ["a test", "a test of another process", "a module"])
def test_an_unexpected_reason_fails_the_suite(where: str, tmp_path: Path) -> None:
    options = ("-n", "1") if "process" in where else ()
    (tmp_path / "test_some.py").write_text(SUITE)
    allowed = run(tmp_path, "--strict-skips", *options)
    assert allowed.returncode == 0, allowed.stdout + allowed.stderr
    assert "   1  needs a CUDA device" in allowed.stdout

    skip = "pytest.skip('no fig tree', allow_module_level=True)"
    (tmp_path / "test_other.py").write_text("import pytest\n" + (skip if where == "a module" else BODY + skip))
    assert run(tmp_path, *options).returncode == 0
    for strict in (run(tmp_path, "--strict-skips", *options), run(tmp_path, *options, CI="true")):
        assert strict.returncode == 1
        assert "FAILED: skipped for a reason that tests/skips.py does not expect: no fig tree" in strict.stdout
