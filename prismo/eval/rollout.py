"""The player of episodes: answers what `prismo.eval.episode` asks for with a simulator and a policy, one at a time.

`prismo.eval.run` calls `run_episode` for every episode of the plan. Time, lost simulators and errors are matters of
this file.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from prismo.eval.episode import EpisodeProgress, Query, Request, RolloutSettings, Step, play
from prismo.eval.plan import Episode
from prismo.policies.base import Policy
from prismo.sim.interface import Observation, SimulatorCrashed, SimulatorTimeout, StepResult
from prismo.sim.worker import SimWorker

_LOG = logging.getLogger(__name__)

Outcome = Literal["success", "failure", "error"]

_ATTEMPTS = 3  # of an episode whose simulator died or hung


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
        player, progress = _Player(worker, policy, slot), EpisodeProgress()
        error = None
        try:
            player.play(play(episode, settings, policy.robot, progress))
        except (SimulatorCrashed, SimulatorTimeout) as failure:
            error = traceback.format_exc()
            if attempt < _ATTEMPTS:
                _LOG.warning("episode %d is repeated: %s", episode.number, failure)
                continue
        except Exception:
            error = traceback.format_exc()
        break
    outcome: Outcome = "error" if error else "success" if progress.success else "failure"
    return Rollout(
        outcome=outcome,
        steps=progress.steps,
        queries=progress.queries,
        seconds=time.perf_counter() - start,
        policy_seconds=player.policy_seconds,
        actions_sha256=progress.digest.hexdigest()[:16],
        error=error,
        attempts=attempt,
        frames=np.stack(progress.frames) if progress.frames else None,
    )


@dataclass
class _Player:
    """Answers the requests of one episode after the other.

    Attributes:
        policy_seconds: that predictions have taken.
    """

    worker: SimWorker
    policy: Policy
    slot: int
    policy_seconds: float = 0.0

    def play(self, requests: Generator[Request, Any, None]) -> None:
        """Answer until the episode ends."""
        try:
            request = next(requests)
            while True:
                request = requests.send(self._answer(request))
        except StopIteration:
            return

    def _answer(self, request: Request) -> Observation | np.ndarray | StepResult:
        if isinstance(request, Query):
            start = time.perf_counter()
            chunk = self.policy.predict([request.input], [self.slot])[0]
            self.policy_seconds += time.perf_counter() - start
            return chunk
        if isinstance(request, Step):
            return self.worker.step_chunk(request.actions, render=request.render)
        episode = request.episode
        observation = self.worker.reset(
            episode.task.suite,
            episode.task.index,
            episode.init_state if episode.state is None else episode.state,
            seed=episode.env_seed,
            settle_steps=request.settle_steps,
        )
        self.policy.start_episode(self.slot, episode.policy_seed)
        return observation
