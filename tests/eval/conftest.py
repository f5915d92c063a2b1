"""Tiny policies for LIBERO-Object, and one simulator process for all tests that need only one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from prismo.eval.config import EvalConfig
from prismo.sim.assets import ASSETS_VARIABLE, STAND_INS, resolve_assets
from prismo.sim.gl import GLBackend
from prismo.sim.libero_worker import LiberoWorker
from prismo.testing.tiny import make_tiny_policy

SUITE = "libero_object"
ASSETS = os.environ.get(ASSETS_VARIABLE) or STAND_INS


@pytest.fixture(scope="session")
def object_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights with the suite's statistics."""
    return make_tiny_policy(tmp_path_factory.mktemp("eval") / "policy", dataset=f"{SUITE}_no_noops")


@pytest.fixture(scope="session")
def simulator(drawing: GLBackend) -> Iterator[LiberoWorker]:
    """A simulator with the assets of PRISMO_LIBERO_ASSETS, else with the stand-ins; tests reset it."""
    try:
        worker = LiberoWorker(resolve_assets(ASSETS), image_size=64)
    except ModuleNotFoundError as error:
        pytest.skip(f"no simulator here: {error}")
    with worker:
        yield worker


@pytest.fixture
def config(object_policy: Path, tmp_path: Path) -> EvalConfig:
    """Two tasks with two short episodes each, all folders within `tmp_path`."""
    return make_config(object_policy, tmp_path)


def make_config(policy: Path, folder: Path, **flags: object) -> EvalConfig:
    values = {
        "pretrained_checkpoint": str(policy),
        "task_suite_name": SUITE,
        "task_ids": [0, 3],
        "num_trials_per_task": 2,
        "max_steps": 10,
        "env_img_res": 64,
        "save_videos": "none",
        "local_log_dir": str(folder / "logs"),
        "rollout_dir": str(folder / "rollouts"),
        "libero_assets": ASSETS,
    }
    return EvalConfig(**{**values, **flags})


def lines(log_dir: Path) -> list[dict]:
    """All episode lines of the only run in `log_dir`."""
    (file,) = log_dir.glob("EVAL-*/episodes.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def identity(line: dict) -> tuple:
    """What must be the same in two runs of an episode: everything but times and paths."""
    keys = ("episode", "suite", "task_id", "task", "init_state", "env_seed", "policy_seed")
    return tuple(line[key] for key in (*keys, "outcome", "steps", "queries", "actions_sha256"))
