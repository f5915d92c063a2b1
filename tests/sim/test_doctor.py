"""`scripts/doctor.py` on this machine, and what it says where something is missing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]


def run_doctor(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "doctor.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


@pytest.mark.usefixtures("drawing")
def test_healthy_machine(tmp_path: Path) -> None:
    done = run_doctor("--libero_assets", "stand-ins", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"mujoco {version('mujoco')}" in done.stdout
    assert "bidirectional attention works" in done.stdout
    assert "rendering with" in done.stdout
    assert "[note] assets: built-in stand-ins" in done.stdout
    for name in ("full_image", "wrist_image"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png")).shape == (256, 256, 3)


def test_wrong_assets_folder_is_a_problem_not_a_traceback(tmp_path: Path) -> None:
    done = run_doctor("--libero_assets", tmp_path, "--output_dir", tmp_path)
    assert done.returncode == 1
    assert f"[FAIL] {tmp_path} is not LIBERO's assets folder" in done.stdout
    assert "1 problem(s)" in done.stdout
    assert "Traceback" not in done.stderr
