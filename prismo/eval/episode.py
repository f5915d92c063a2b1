"""An episode as a flow of data: a generator asks for what it needs, whoever plays it answers.

No worker, no policy and no clock here, so one generator stands for an episode wherever it runs: `prismo.eval.rollout`
answers one at a time; a player of many can put the queries of all of them into one batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from prismo.embodiment import Embodiment
from prismo.eval.plan import Episode
from prismo.policies.base import PolicyInput, environment_actions
from prismo.sim.interface import Render


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


class EpisodeProgress:
    """How far an episode has come; holds what there is by then where it breaks off.

    Attributes:
        success: the goal was reached.
        steps, queries: actions executed, predictions asked for.
        digest: of the executed actions.
        frames: uint8 [H, W, 3], one before the first step and one after every step; empty unless they are recorded.
    """

    def __init__(self) -> None:
        self.success = False
        self.steps = self.queries = 0
        self.digest = hashlib.sha256()
        self.frames: list[np.ndarray] = []


def play(
    episode: Episode, settings: RolloutSettings, robot: Embodiment, progress: EpisodeProgress
) -> Generator[Request, Any, None]:
    """From reset to the goal or the last step.

    Args:
        robot: that the policy drives.
        progress: of this episode, kept up to date for whoever plays it.
    """
    observation = yield Reset(episode, settings.settle_steps)
    if settings.film:
        progress.frames.append(np.concatenate(observation.pictures(settings.film), axis=1))
    filmed: Render = "all_views" if len(settings.film) > 1 else "all"
    while not progress.success and progress.steps < settings.max_steps:
        state = observation.state(settings.states)
        chunk = yield Query(PolicyInput(observation.pictures(settings.cameras), state, observation.instruction))
        progress.queries += 1
        # The first n. (The original's bounded queue kept the last n, i.e. executed actions meant for later.)
        left = settings.max_steps - progress.steps
        actions = environment_actions(chunk[: min(settings.open_loop_steps, left)], robot)
        # Nobody looks at the observation behind the last step.
        render: Render = filmed if settings.film else "none" if len(actions) == left else "last"
        result = yield Step(actions, render)
        progress.digest.update(actions[: result.steps].tobytes())
        progress.steps += result.steps
        progress.success = result.success
        observation = result.observation
        if result.frames is not None:
            progress.frames.extend(result.frames)
