"""The episodes of an evaluation, and each as a flow of data: a generator asks for what it needs, its player answers.

No worker, no policy and no clock here, so one generator stands for an episode wherever it runs: `prismo.eval.rollout`
answers one at a time; a player of many can put the queries of all of them into one batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from prismo.embodiment import Embodiment
from prismo.eval.benchmark import Benchmark
from prismo.eval.config import EvalConfig
from prismo.policies.base import PolicyInput, environment_actions
from prismo.sim.interface import Render, Task

Outcome = Literal["success", "failure", "error"]


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
    """Task by task, trial by trial, as a pure function of the flags: a resumed or parallel run has the same ones.

    Trial k starts from initial state k.

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


@dataclass(frozen=True)
class RolloutSettings:
    """How episodes are run.

    Attributes:
        max_steps: policy steps before an episode has failed.
        open_loop_steps: actions executed per query, the first ones of the chunk.
        settle_steps: simulator steps without motion before the first observation.
        cameras, states: of an observation, what the policy is given, in its order.
        film: the first camera, or all of them side by side, for a frame of every step; none without a video.
    """

    max_steps: int
    open_loop_steps: int
    settle_steps: int
    cameras: tuple[str, ...]
    states: tuple[str, ...]
    film: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reset:
    """Build the scene of an episode and let it come to rest; the answer is an `Observation`."""

    episode: Episode
    settle_steps: int


@dataclass(frozen=True)
class Query:
    """Ask the policy; the answer is its chunk, float64 [K, A] as `Policy.predict` gives it."""

    input: PolicyInput


@dataclass(frozen=True)
class Step:
    """Execute actions, float64 [n, A] as the robot's controller takes them; the answer is a `StepResult`."""

    actions: np.ndarray
    render: Render


Request = Reset | Query | Step


@dataclass(eq=False)
class Rollout:
    """What an episode gives, or has given where it breaks off.

    Attributes:
        success: the goal was reached.
        steps: policy steps executed.
        queries: predictions asked of the policy.
        digest: of the executed actions.
        frames: uint8 [H, W, 3], one before the first step and one after every step, twice as wide with the wrist view;
            empty unless they are recorded.
        attempts: 1, or more where a simulator had died.
        seconds, policy_seconds: wall time of the episode, and the policy's share.
        error: the traceback.
    """

    success: bool = False
    steps: int = 0
    queries: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    frames: list[np.ndarray] = field(default_factory=list)
    attempts: int = 1
    seconds: float = 0.0
    policy_seconds: float = 0.0
    error: str | None = None

    @property
    def outcome(self) -> Outcome:
        """An "error" is no failure of the policy to solve the task: something broke."""
        return "error" if self.error else "success" if self.success else "failure"

    @property
    def actions_sha256(self) -> str:
        """Of the executed actions, 16 digits; equal for equal episodes, so runs can be compared one by one."""
        return self.digest.hexdigest()[:16]


def play(
    episode: Episode, settings: RolloutSettings, robot: Embodiment, rollout: Rollout
) -> Generator[Request, Any, None]:
    """From reset to the goal or the last step.

    Args:
        robot: that the policy drives.
        rollout: of this episode; its success, counts, digest and frames are kept up to date for whoever plays it.
    """
    observation = yield Reset(episode, settings.settle_steps)
    if settings.film:
        rollout.frames.append(np.concatenate(observation.pictures(settings.film), axis=1))
    filmed: Render = "all_views" if len(settings.film) > 1 else "all"
    while not rollout.success and rollout.steps < settings.max_steps:
        state = observation.state(settings.states)
        chunk = yield Query(PolicyInput(observation.pictures(settings.cameras), state, observation.instruction))
        rollout.queries += 1
        # The first n. (The original's bounded queue kept the last n, i.e. executed actions meant for later.)
        left = settings.max_steps - rollout.steps
        actions = environment_actions(chunk[: min(settings.open_loop_steps, left)], robot)
        # Nobody looks at the observation behind the last step.
        render: Render = filmed if settings.film else "none" if len(actions) == left else "last"
        result = yield Step(actions, render)
        rollout.digest.update(actions[: result.steps].tobytes())
        rollout.steps += result.steps
        rollout.success = result.success
        observation = result.observation
        if result.frames is not None:
            rollout.frames.extend(result.frames)
