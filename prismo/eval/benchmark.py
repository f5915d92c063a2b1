"""What an evaluation asks of a benchmark, and the table of them: another one is a module, and a line here.

Everything else in this package is the same for all. The simulator itself decides what success is (`StepResult`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from prismo.embodiment import Embodiment
from prismo.eval.config import EvalConfig
from prismo.sim.interface import Task
from prismo.sim.worker import SimWorker
from prismo.util.text import did_you_mean

# --benchmark: the module that has it as BENCHMARK
BENCHMARKS = {"libero": "prismo.benchmarks.libero"}
_OPTIONAL = ("initial_states_path", "env_img_res", "libero_assets", "download_assets")


class Benchmark(Protocol):
    """Tasks, robot and simulator.

    Attributes:
        robot: that policies drive, with its `Observation`: the first of its cameras is filmed.
        flags: that mean something here, of those that not all benchmarks have.
    """

    robot: Embodiment
    flags: tuple[str, ...]

    def validate(self, cfg: EvalConfig) -> None:
        """Refuse flags, with a ValueError that names one, what it was and what it may be. Fast."""

    def tasks(self, cfg: EvalConfig) -> Sequence[Task]:
        """All tasks of `--task_suite_name`; `--task_ids` chooses among them."""

    def trials(self, cfg: EvalConfig, task: Task) -> Mapping[int, np.ndarray | None]:
        """By trial: the initial state of its episode, None for the benchmark's own of that number.

        Raises:
            ValueError: a file of initial states does not fit the task.
        """

    def max_steps(self, cfg: EvalConfig) -> int:
        """Policy steps before an episode counts as failed, without `--max_steps`."""

    def settings(self, cfg: EvalConfig) -> dict[str, Any]:
        """What else changes an episode, as JSON values: a run with others is never continued."""

    def open(self, cfg: EvalConfig, cuda_device: int | None) -> SimWorker:
        """A simulator that draws on the GPU of this machine-wide CUDA ordinal."""

    def warnings(self, versions: Mapping[str, Any]) -> list[str]:
        """One sentence per version (by package) that makes results incomparable."""


def benchmark_of(cfg: EvalConfig) -> Benchmark:
    """The benchmark that flags ask for; settles everything that can be seen without a checkpoint.

    Raises:
        ValueError: naming the flag, what it was and what it may be.
    """
    cfg.validate()
    if cfg.benchmark not in BENCHMARKS:
        raise ValueError(did_you_mean("benchmark", cfg.benchmark, BENCHMARKS))
    benchmark: Benchmark = import_module(BENCHMARKS[cfg.benchmark]).BENCHMARK
    for name in _OPTIONAL:
        if name not in benchmark.flags and getattr(cfg, name) != getattr(EvalConfig, name):
            raise ValueError(f"--{name} means nothing with --benchmark {cfg.benchmark}: leave it out")
    benchmark.validate(cfg)
    return benchmark
