"""The commands of this model family, run as users run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prismo.data.synthetic import write_synthetic_libero
from prismo.models.spatialvla.action_tokenizer import ActionTokenizer, load_gaussians

pytestmark = pytest.mark.processes

REPOSITORY = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(REPOSITORY / "scripts" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_fit_action_gaussians(tmp_path: Path) -> None:
    write_synthetic_libero(tmp_path, episodes=3, steps=15, image_size=32)
    output = tmp_path / "gaussians.json"
    arguments = ("--data_root_dir", str(tmp_path), "--dataset_name", "libero_spatial_no_noops")
    printed = run("fit_action_gaussians.py", *arguments, "--output", str(output))
    assert "theta" in printed
    gaussians = load_gaussians(output)
    assert list(gaussians) == ["x", "y", "z", "theta", "phi", "r", "roll", "pitch", "yaw"]
    assert ActionTokenizer.from_gaussians(gaussians, min_sigma=0.5).size == 8194


@pytest.mark.slow
def test_benchmark(tmp_path: Path) -> None:
    printed = run(
        "bench_spatialvla.py", "--tiny", "--device", "cpu", "--repeats", "1", "--batch_sizes", "1", "--train_batch", "1"
    )
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        "predict",
        "without CUDA graph",
        "nor restricted head",
        "image tokens alone",
        "of which ZoeDepth",
        "ZoeDepth as in transformers",
        "train, LoRA r32",
    ]
