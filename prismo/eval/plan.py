"""The episodes of an evaluation, as a pure function of its flags: a resumed or parallel run has the same ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from prismo.eval.benchmark import Benchmark
from prismo.eval.config import EvalConfig
from prismo.sim.interface import Task


@dataclass(frozen=True)
class Episode:
    """One roll-out.

    Attributes:
        number: 1-based place in the run; the episode's identity.
        task: suite, index and instruction.
        init_state: index of the initial state, and trial of the task.
        env_seed: for what initial states leave open (LIBERO: the poses of cabinets, stoves and racks).
        policy_seed: for what the policy draws at random.
        state: the initial state itself where it is not one of the benchmark's (LIBERO: float64 [1 + nq + nv]).
    """

    number: int
    task: Task
    init_state: int
    env_seed: int
    policy_seed: int
    state: np.ndarray | None = field(default=None, compare=False)


def plan_episodes(cfg: EvalConfig, benchmark: Benchmark) -> tuple[Episode, ...]:
    """Task by task, trial by trial. Trial k starts from initial state k.

    Raises:
        ValueError: the file of initial states does not fit a task.
    """
    episodes: list[Episode] = []
    tasks = benchmark.tasks(cfg)
    for index in sorted(set(cfg.task_ids)) if cfg.task_ids else range(len(tasks)):
        for trial, state in benchmark.trials(cfg, tasks[index]).items():
            number = len(episodes) + 1
            seed = int(np.random.SeedSequence([cfg.seed, index, trial]).generate_state(1)[0])
            episodes.append(Episode(number, tasks[index], trial, env_seed=trial, policy_seed=seed, state=state))
    return tuple(episodes)
