"""Replaying a demonstration's actions: proves that data and simulator belong together, and filters no-ops.

The filter and the success test are those with which OpenVLA made its `libero_*_no_noops` data; used by
`prismo data regenerate` through the simulator process.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from prismo.sim.demos import Demo, Recorder
from prismo.sim.libero import LiberoEnv

_NOOP_NORM = 1e-4


@dataclass(frozen=True)
class Replay:
    """A demonstration executed again.

    Attributes:
        demo: what this simulator saw; None if every action was a no-op.
        success: the goal holds after the last executed action.
        noops: actions that were left out.
    """

    demo: Demo | None
    success: bool
    noops: int


def is_noop(action: np.ndarray, previous: np.ndarray | None) -> bool:
    """The arm is told to stay (norm of the six deltas below 1e-4) and the gripper to do what it already does.

    Args:
        action: float [7].
        previous: the last action that was kept, None for the first.
    """
    still = bool(np.linalg.norm(action[:6]) < _NOOP_NORM)
    return still if previous is None else still and bool(action[6] == previous[6])


def replay(env: LiberoEnv, demo: Demo, *, seed: int, drop_noops: bool) -> Replay:
    """Set the demonstration's first state, let the objects come to rest, execute its actions.

    The first state and robot state are copied from `demo`, as in the original regeneration (they are from before the
    objects came to rest).
    """
    env.reset(demo.states[0], seed=seed)
    recorder = Recorder(env, demo.states[0], seed)
    previous: np.ndarray | None = None
    success, noops = False, 0
    for action in demo.actions:
        if drop_noops and is_noop(action, previous):
            noops += 1
            continue
        recorder.add(action)
        success = env.step(action)
        previous = action
    if previous is None:
        return Replay(None, False, noops)
    recorded = recorder.demo()
    robot_states = np.concatenate([demo.robot_states[:1], recorded.robot_states[1:]])
    return Replay(dataclasses.replace(recorded, robot_states=robot_states), success, noops)
