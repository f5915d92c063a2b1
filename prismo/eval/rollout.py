"""One episode: a simulator, a policy, and an outcome that is a success, a failure or an error.

`prismo.eval.run` calls `run_episode` for every episode of the plan. Policy and simulator meet only here.
"""

from __future__ import annotations

import hashlib
import logging
import time
import traceback
from dataclasses import dataclass
from typing import Literal

import numpy as np

from prismo.eval.plan import Episode
from prismo.policies.base import Policy, PolicyInput, environment_actions
from prismo.sim import Observation, SimulatorCrashed, SimulatorTimeout, SimWorker
from prismo.sim.interface import Render

_LOG = logging.getLogger(__name__)

Outcome = Literal["success", "failure", "error"]

_CAMERAS = 2  # third person and wrist
_ATTEMPTS = 3  # of an episode whose simulator died or hung


@dataclass(frozen=True)
class RolloutSettings:
    """How episodes are run.

    Attributes:
        max_steps: policy steps before an episode has failed.
        open_loop_steps: actions executed per query, the first ones of the chunk.
        settle_steps: simulator steps without motion before the first observation.
        record: keep a frame of every step (for a video).
        record_wrist: with the wrist view at its right, which is then drawn at every step.
    """

    max_steps: int
    open_loop_steps: int
    settle_steps: int
    record: bool
    record_wrist: bool = False


@dataclass(frozen=True)
class Rollout:
    """What an episode gave.

    Attributes:
        outcome: "error" is no failure of the policy to solve the task: something broke, see `error`.
        steps: policy steps executed.
        queries: predictions asked of the policy.
        seconds, policy_seconds: wall time of the episode, and the policy's share.
        actions_sha256: of the executed actions; equal for equal episodes, so runs can be compared one by one.
        error: the traceback.
        attempts: 1, or more where a simulator had died.
        frames: uint8 [steps + 1, H, W, 3] (shorter after an error), twice as wide with the wrist view; if recorded.
    """

    outcome: Outcome
    steps: int
    queries: int
    seconds: float
    policy_seconds: float
    actions_sha256: str
    error: str | None = None
    attempts: int = 1
    frames: np.ndarray | None = None


def run_episode(
    worker: SimWorker, policy: Policy, episode: Episode, settings: RolloutSettings, slot: int = 0
) -> Rollout:
    """Run an episode; an exception in it becomes the outcome "error".

    The episode of a simulator that died or hung is repeated from its start with a new one. KeyboardInterrupt passes.
    """
    start = time.perf_counter()
    for attempt in range(1, _ATTEMPTS + 1):
        run = _Run(worker, policy, episode, settings, slot)
        error = None
        try:
            run.play()
        except (SimulatorCrashed, SimulatorTimeout) as failure:
            error = traceback.format_exc()
            if attempt < _ATTEMPTS:
                _LOG.warning("episode %d is repeated: %s", episode.number, failure)
                continue
        except Exception:
            error = traceback.format_exc()
        break
    outcome: Outcome = "error" if error else "success" if run.success else "failure"
    return Rollout(
        outcome=outcome,
        steps=run.steps,
        queries=run.queries,
        seconds=time.perf_counter() - start,
        policy_seconds=run.policy_seconds,
        actions_sha256=run.digest.hexdigest()[:16],
        error=error,
        attempts=attempt,
        frames=np.stack(run.frames) if run.frames else None,
    )


class _Run:
    """The state of an episode while it is played."""

    def __init__(
        self, worker: SimWorker, policy: Policy, episode: Episode, settings: RolloutSettings, slot: int
    ) -> None:
        self._worker, self._policy, self._episode = worker, policy, episode
        self._settings, self._slot = settings, slot
        self.success = False
        self.steps = self.queries = 0
        self.policy_seconds = 0.0
        self.digest = hashlib.sha256()
        self.frames: list[np.ndarray] = []

    def play(self) -> None:
        """From reset to the goal or the last step."""
        episode, settings = self._episode, self._settings
        observation = self._worker.reset(
            episode.task.suite,
            episode.task.index,
            episode.init_state if episode.state is None else episode.state,
            seed=episode.env_seed,
            settle_steps=settings.settle_steps,
        )
        self._policy.start_episode(self._slot, episode.policy_seed)
        if settings.record:
            self.frames.append(np.concatenate(observation.pictures(2 if settings.record_wrist else 1), axis=1))
        filmed: Render = "all_views" if settings.record_wrist else "all"
        while not self.success and self.steps < settings.max_steps:
            actions = self._next_actions(observation)[: settings.max_steps - self.steps]
            last = self.steps + len(actions) == settings.max_steps
            # Nobody looks at the observation behind the last step.
            render: Render = filmed if settings.record else "none" if last else "last"
            result = self._worker.step_chunk(actions, render=render)
            self.digest.update(actions[: result.steps].tobytes())
            self.steps += result.steps
            self.success = result.success
            observation = result.observation
            if result.frames is not None:
                self.frames.extend(result.frames)

    def _next_actions(self, observation: Observation) -> np.ndarray:
        """The first actions of a new chunk, as the simulator takes them [n, 7]."""
        start = time.perf_counter()
        chunk = self._policy.predict([policy_input(observation, self._policy.num_images)], [self._slot])[0]
        self.policy_seconds += time.perf_counter() - start
        self.queries += 1
        # The first n. (The original's bounded queue kept the last n, i.e. executed actions meant for later.)
        return environment_actions(chunk[: self._settings.open_loop_steps], self._policy.robot)


def policy_input(observation: Observation, num_images: int) -> PolicyInput:
    """A simulator's observation as a policy takes it: third-person view, then wrist view.

    Raises:
        ValueError: the policy wants more views than LIBERO has.
    """
    if not 1 <= num_images <= _CAMERAS:
        raise ValueError(f"the policy takes {num_images} camera images; LIBERO has {_CAMERAS}")
    return PolicyInput(observation.pictures(num_images), observation.state, observation.instruction)
