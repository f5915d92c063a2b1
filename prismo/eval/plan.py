"""The episodes of an evaluation, as a pure function of its flags: a resumed or parallel run has the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from prismo.eval.config import DEFAULT_STATES, EvalConfig
from prismo.sim.suites import Task, load_init_states, load_tasks, read_custom_init_states


@dataclass(frozen=True)
class Episode:
    """One roll-out.

    Attributes:
        number: 1-based place in the run; the episode's identity.
        task: suite, index and instruction.
        init_state: index of the initial state, and trial of the task.
        env_seed: for what initial states leave open (the poses of cabinets, stoves and racks).
        policy_seed: for what the policy draws at random.
        state: the initial state itself where it is not one of LIBERO's, float64 [1 + nq + nv].
    """

    number: int
    task: Task
    init_state: int
    env_seed: int
    policy_seed: int
    state: np.ndarray | None = field(default=None, compare=False)


def plan_episodes(cfg: EvalConfig) -> tuple[Episode, ...]:
    """Task by task, trial by trial. Trial k starts from initial state k.

    Raises:
        ValueError: the file of initial states does not fit the suite.
    """
    episodes: list[Episode] = []
    tasks = load_tasks(cfg.task_suite_name)
    for index in sorted(set(cfg.task_ids)) if cfg.task_ids else range(len(tasks)):
        for trial, state in _initial_states(cfg, tasks[index]).items():
            number = len(episodes) + 1
            seed = int(np.random.SeedSequence([cfg.seed, index, trial]).generate_state(1)[0])
            episodes.append(Episode(number, tasks[index], trial, env_seed=trial, policy_seed=seed, state=state))
    return tuple(episodes)


def _initial_states(cfg: EvalConfig, task: Task) -> Mapping[int, np.ndarray | None]:
    """By trial; None = LIBERO's own. A file's failed demonstrations are gaps, as in the original protocol."""
    if cfg.initial_states_path == DEFAULT_STATES:
        available = len(load_init_states(task.suite, task.index))
        if cfg.num_trials_per_task > available:
            raise ValueError(
                f"--num_trials_per_task is {cfg.num_trials_per_task}, but {task.name} has {available} initial states"
            )
        return dict.fromkeys(range(cfg.num_trials_per_task))
    states = read_custom_init_states(cfg.initial_states_path, task)
    chosen = {trial: state for trial, state in states.items() if trial < cfg.num_trials_per_task}
    if not chosen:
        first = min(states)
        raise ValueError(
            f"{cfg.initial_states_path}: {task.name} would have no episode, because its first success is demo_{first}; "
            f"give at least --num_trials_per_task {first + 1}, or leave the task out with --task_ids"
        )
    return chosen
