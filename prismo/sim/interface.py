"""What crosses the border between a simulator process and the rest: observations, step results, errors.

Imported by both sides (`prismo.sim.worker` in the parent, `prismo.sim.server` in the child) and by policies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge

# Which steps of a chunk are drawn: only the one that the policy will look at, every one (videos; "all_views": by the
# wrist camera, too), or none.
Render = Literal["last", "all", "all_views", "none"]

AGENT_CAMERA = "agentview"
WRIST_CAMERA = "robot0_eye_in_hand"
CAMERAS = (AGENT_CAMERA, WRIST_CAMERA)

# Gripper command of an action: LIBERO's -1 opens, +1 closes.
GRIPPER_OPEN = -1.0
GRIPPER_CLOSE = 1.0
# Sent while the objects fall to rest after a reset: no motion, gripper open.
SETTLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, GRIPPER_OPEN)
SETTLE_STEPS = 10


class SimulatorError(RuntimeError):
    """A simulator could not do what was asked; the message holds the cause (and its traceback from the child)."""


class SimulatorCrashed(SimulatorError):
    """The simulator process died. Call `reset` again: it starts a new one."""


class SimulatorTimeout(SimulatorError):
    """The simulator did not answer in time and was killed. Call `reset` again: it starts a new one."""


@dataclass(frozen=True)
class Observation:
    """What a policy sees at one instant, as OpenVLA-OFT's LIBERO checkpoints expect it.

    Attributes:
        full_image: uint8 [H, W, 3], the agentview camera, turned by 180 degrees; None if it was not drawn.
        wrist_image: uint8 [H, W, 3], the wrist camera, turned by 180 degrees; None if it was not drawn.
        state: float64 [8]: end-effector position (m), its orientation as axis-angle (rad), two finger positions (m).
        instruction: the task in words, e.g. "pick up the milk and place it in the basket".
    """

    full_image: np.ndarray | None
    wrist_image: np.ndarray | None
    state: np.ndarray
    instruction: str

    def pictures(self, count: int = 1) -> tuple[np.ndarray, ...]:
        """The first `count` of (agentview, wrist).

        Raises:
            ValueError: there are fewer, or one of them was not drawn.
        """
        drawn = tuple(picture for picture in (self.full_image, self.wrist_image)[:count] if picture is not None)
        if len(drawn) < count:
            raise ValueError(f"expected {count} camera images, found {len(drawn)} that the simulator has drawn")
        return drawn


@dataclass(frozen=True)
class StepResult:
    """Outcome of a chunk of actions.

    Attributes:
        observation: after the last executed action.
        success: the task's goal holds; the rest of the chunk was not executed.
        steps: actions executed.
        frames: uint8 [steps, H, W, 3], the turned agentview after every action, with `render="all"`; [steps, H, 2W, 3]
            with "all_views", the wrist view at its right; else None.
    """

    observation: Observation
    success: bool
    steps: int
    frames: np.ndarray | None = None


@dataclass(frozen=True)
class EpisodeOutcome:
    """Of an episode that ran inside the simulator process (expert, replay).

    Attributes:
        success: the goal held at its end.
        steps: actions executed.
        noops: actions of a replay that were left out.
    """

    success: bool
    steps: Annotated[int, Ge(0)]
    noops: Annotated[int, Ge(0)] = 0


@dataclass(frozen=True)
class SimInfo:
    """What a result depends on besides policy and seed; goes into every result file.

    Attributes:
        assets: "stand-ins" (a smoke run: not comparable with anything) or where LIBERO's own assets come from.
        gl: the backend in words, or "none" for a simulator without cameras.
        versions: of mujoco, robosuite, bddl and hf-libero.
        renderer: the backend without the number of its device: what pixels depend on.
    """

    assets: str
    gl: str
    versions: dict[str, str] = field(default_factory=dict)
    renderer: str = "none"


def quat_to_axis_angle(quat: np.ndarray) -> np.ndarray:
    """(x, y, z, w) to axis times angle (rad, 0 to 2 pi), as the training data has it: no sign is made canonical."""
    w = np.clip(quat[3], -1.0, 1.0)
    norm = np.sqrt(1.0 - w * w)
    if norm == 0.0:
        return np.zeros(3)
    return quat[:3] * 2.0 * np.arccos(w) / norm
