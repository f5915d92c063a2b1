"""The player of episodes: answers what `prismo.eval.episode` asks for with a simulator and a policy, one at a time.

`prismo.eval.run` calls `run_episode` for every episode of the plan. Time, lost simulators and errors are matters of
this file.
"""

from __future__ import annotations

import logging
import time
import traceback

from prismo.eval.episode import Episode, Query, Rollout, RolloutSettings, Step, play
from prismo.policies.base import Policy
from prismo.sim.interface import Observation, SimulatorCrashed, SimulatorTimeout
from prismo.sim.worker import SimWorker

_LOG = logging.getLogger(__name__)

_ATTEMPTS = 3  # of an episode whose simulator died or hung


def run_episode(
    worker: SimWorker, policy: Policy, episode: Episode, settings: RolloutSettings, slot: int = 0
) -> Rollout:
    """Run an episode; an exception in it becomes the outcome "error".

    The episode of a simulator that died or hung is repeated from its start with a new one. KeyboardInterrupt passes.
    """
    start = time.perf_counter()
    for attempt in range(1, _ATTEMPTS + 1):
        rollout = Rollout(attempts=attempt)
        try:
            _answer(worker, policy, episode, settings, slot, rollout)
        except Exception as failure:
            rollout.error = traceback.format_exc()
            if isinstance(failure, (SimulatorCrashed, SimulatorTimeout)) and attempt < _ATTEMPTS:
                _LOG.warning("episode %d is repeated: %s", episode.number, failure)
                continue
        break
    rollout.seconds = time.perf_counter() - start
    return rollout


def _answer(
    worker: SimWorker, policy: Policy, episode: Episode, settings: RolloutSettings, slot: int, rollout: Rollout
) -> None:
    """Answer the requests of an episode until it ends."""
    requests, answer = play(episode, settings, policy.robot, rollout), None
    while True:
        try:
            request = requests.send(answer)
        except StopIteration:
            return
        if isinstance(request, Query):
            start = time.perf_counter()
            answer = policy.predict([request.input], [slot])[0]
            rollout.policy_seconds += time.perf_counter() - start
        elif isinstance(request, Step):
            answer = worker.step_chunk(request.actions, render=request.render)
        else:
            answer = reset(worker, episode, request.settle_steps)
            policy.start_episode(slot, episode.policy_seed)


def reset(worker: SimWorker, episode: Episode, settle_steps: int) -> Observation:
    """The scene of an episode."""
    start = episode.init_state if episode.state is None else episode.state
    where = (episode.task.suite, episode.task.index, start)
    return worker.reset(*where, seed=episode.env_seed, settle_steps=settle_steps)
