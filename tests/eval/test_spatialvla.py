"""SpatialVLA in LIBERO: the original's command line, and a checkpoint of our own trainer from its folder alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prismo.commands.train import train
from prismo.data.synthetic import write_synthetic_libero
from prismo.eval.run import evaluate
from prismo.testing.tiny_spatialvla import make_tiny_spatialvla
from prismo.training.config import FinetuneConfig
from tests.eval.conftest import SUITE, lines, make_config
from tests.eval.test_run import SCRIPT

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("simulator")]  # skips where none can run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_spatialvla(tmp_path_factory.mktemp("svla") / "spatialvla-4b-224-pt")


def results_of(logs: Path) -> dict:
    (folder,) = logs.glob("EVAL-*/")
    return json.loads((folder / "results.json").read_text())


def test_zero_shot_by_the_command_line(base: Path, tmp_path: Path) -> None:
    """`--model_family svla`, the statistics of the Franka robot, center crop, the adaptive ensemble at every step."""
    flags = {
        "model_family": "svla", "pretrained_checkpoint": base, "task_suite_name": SUITE, "center_crop": True,
        "unnorm_key": "droid/1.0.0", "task_ids": "[0, 3]", "num_trials_per_task": 1, "max_steps": 5, "env_img_res": 64,
        "save_videos": "none", "local_log_dir": tmp_path / "logs", "rollout_dir": tmp_path / "rollouts",
        "libero_assets": "stand-ins",
    }  # fmt: skip
    command = [
        sys.executable,
        str(SCRIPT),
        *(part for name, value in flags.items() for part in (f"--{name}", str(value))),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    results = results_of(tmp_path / "logs")
    assert results["complete"]
    assert results["total"]["episodes"] == 2
    assert results["total"]["errors"] == 0
    policy = results["policy"]
    assert (policy["unnorm_key"], policy["center_crop"], policy["adaptive_ensemble"]) == ("droid/1.0.0", True, True)
    for line in lines(tmp_path / "logs"):
        assert (line["outcome"], line["steps"], line["queries"]) == ("failure", 5, 5)


def test_a_trained_checkpoint_rolls_out(base: Path, tmp_path: Path) -> None:
    """Train, leave unmerged, roll out: statistics of the suite, chunks of four without the ensemble."""
    data = write_synthetic_libero(tmp_path / "data", f"{SUITE}_no_noops", episodes=3, steps=12, image_size=64)
    assert data
    arguments = {
        "vla_path": base, "data_root_dir": tmp_path / "data", "dataset_name": f"{SUITE}_no_noops", "lora_rank": 4,
        "run_root_dir": tmp_path / "runs", "run_id_override": "run", "batch_size": 2, "num_workers": 0, "max_steps": 1,
        "merge_lora_during_training": False,
    }  # fmt: skip
    assert train(FinetuneConfig, [part for name, value in arguments.items() for part in (f"--{name}", str(value))]) == 0
    checkpoint = tmp_path / "runs" / "run--1_chkpt"
    evaluate(make_config(checkpoint, tmp_path, num_trials_per_task=1, adaptive_ensemble=False))
    results = results_of(tmp_path / "logs")
    assert results["complete"]
    assert results["policy"]["unnorm_key"] == f"{SUITE}_no_noops/1.0.0"
    for line in lines(tmp_path / "logs"):
        assert (line["outcome"], line["steps"], line["queries"]) == ("failure", 10, 3)
