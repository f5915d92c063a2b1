"""LIBERO: five suites of tasks for a Panda arm, 50 initial states per task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prismo.embodiment import LIBERO
from prismo.eval.benchmark import Benchmark
from prismo.eval.config import DEFAULT_STATES, EvalConfig
from prismo.sim.assets import resolve_assets
from prismo.sim.interface import Task
from prismo.sim.libero_worker import LiberoWorker
from prismo.sim.suites import MAX_STEPS, SUITES, check_task_ids, load_init_states, load_tasks, read_custom_init_states
from prismo.util.text import did_you_mean

_STATES = 50  # initial states per task that LIBERO ships
# MuJoCo 3.3.3 darkens the floors of LIBERO-Object, 3.4.0 changes how the bowls of LIBERO-Spatial come to rest. Either
# costs success without an error, so everything that was not checked counts as wrong.
TESTED_MUJOCO = ("2.3.7", "3.3.2")
TESTED_ROBOSUITE = ("1.4.1", "1.4.0")


class LiberoBenchmark:
    """See `prismo.eval.benchmark.Benchmark`."""

    robot = LIBERO
    flags: tuple[str, ...] = ("initial_states_path", "env_img_res", "libero_assets", "download_assets")

    def validate(self, cfg: EvalConfig) -> None:
        if cfg.task_suite_name not in SUITES:
            raise ValueError(did_you_mean("task_suite_name", cfg.task_suite_name, SUITES))
        if cfg.initial_states_path == DEFAULT_STATES and cfg.num_trials_per_task > _STATES:
            raise ValueError(
                f"--num_trials_per_task is {cfg.num_trials_per_task}, but LIBERO has {_STATES} initial states per "
                "task; for more give your own with --initial_states_path"
            )
        check_task_ids(cfg.task_suite_name, cfg.task_ids)

    def tasks(self, cfg: EvalConfig) -> Sequence[Task]:
        return load_tasks(cfg.task_suite_name)

    def trials(self, cfg: EvalConfig, task: Task) -> Mapping[int, np.ndarray | None]:
        """A file's failed demonstrations are gaps, as in the original protocol."""
        if cfg.initial_states_path == DEFAULT_STATES:
            available = len(load_init_states(task.suite, task.index))
            if cfg.num_trials_per_task > available:
                raise ValueError(
                    f"--num_trials_per_task is {cfg.num_trials_per_task}, but {task.name} has {available} initial "
                    "states"
                )
            return dict.fromkeys(range(cfg.num_trials_per_task))
        states = read_custom_init_states(cfg.initial_states_path, task)
        chosen = {trial: state for trial, state in states.items() if trial < cfg.num_trials_per_task}
        if not chosen:
            first = min(states)
            raise ValueError(
                f"{cfg.initial_states_path}: {task.name} would have no episode, because its first success is "
                f"demo_{first}; give at least --num_trials_per_task {first + 1}, or leave the task out with --task_ids"
            )
        return chosen

    def max_steps(self, cfg: EvalConfig) -> int:
        return MAX_STEPS[cfg.task_suite_name]

    def settings(self, cfg: EvalConfig) -> dict[str, Any]:
        states = cfg.initial_states_path
        if states != DEFAULT_STATES:
            states = hashlib.sha256(Path(states).read_bytes()).hexdigest()
        return {"initial_states": states, "env_img_res": cfg.env_img_res}

    def open(self, cfg: EvalConfig, cuda_device: int | None) -> LiberoWorker:
        assets = resolve_assets(cfg.libero_assets, download=cfg.download_assets)
        return LiberoWorker(assets, image_size=cfg.env_img_res, cuda_device=cuda_device)

    def warnings(self, versions: Mapping[str, Any]) -> list[str]:
        return [
            f"{package} is {versions.get(package)}, outside of {', '.join(tested)}: physics or pixels differ from "
            f"those of the training data. Type: pip install {package}=={tested[-1]}"
            for package, tested in (("mujoco", TESTED_MUJOCO), ("robosuite", TESTED_ROBOSUITE))
            if versions.get(package) not in tested
        ]


BENCHMARK: Benchmark = LiberoBenchmark()
