"""What crosses the border to a simulator process: observations, step results, errors.

Imported by both sides (`prismo.sim.worker` in the owner, `prismo.sim.server` in the simulator's process); needs numpy
only, because a simulator may live in another environment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

# Which steps of a chunk are drawn: only the one that the policy will look at, every one by the first camera (videos;
# "all_views": by all of them), or none.
Render = Literal["last", "all", "all_views", "none"]

# Steps without motion after a reset, while objects fall to rest.
SETTLE_STEPS = 10
# Assets with which a run is a smoke run, whose rates compare with nothing.
STAND_INS = "stand-ins"


class SimulatorError(RuntimeError):
    """A simulator could not do what was asked; the message holds the cause (and its traceback from the child)."""


class SimulatorCrashed(SimulatorError):
    """The simulator process died. Call `reset` again: it starts a new one."""


class SimulatorTimeout(SimulatorError):
    """The simulator did not answer in time and was killed. Call `reset` again: it starts a new one."""


@dataclass(frozen=True)
class Task:
    """One task of a benchmark.

    Attributes:
        suite: group of tasks, e.g. "libero_object".
        index: position in the suite.
        name: as in the names of the benchmark's files.
        language: the instruction.
    """

    suite: str
    index: int
    name: str
    language: str


@dataclass(frozen=True)
class Observation:
    """What a robot perceives at one instant.

    Attributes:
        images: uint8 [H, W, 3] by camera, upright as in the training data; only of the cameras that were drawn.
        states: float64 [n] by name: poses, joints, fingers, in m and rad.
        instruction: the task in words, e.g. "pick up the milk and place it in the basket".
    """

    images: Mapping[str, np.ndarray]
    states: Mapping[str, np.ndarray]
    instruction: str

    def __post_init__(self) -> None:
        for camera, image in self.images.items():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"camera {camera!r} gave {image.dtype} {image.shape}; expected uint8 [H, W, 3]")
        for name, state in self.states.items():
            if state.dtype != np.float64 or state.ndim != 1:
                raise ValueError(f"state {name!r} is {state.dtype} {state.shape}; expected float64 [n]")

    def pictures(self, cameras: Sequence[str]) -> tuple[np.ndarray, ...]:
        """The images of these cameras.

        Raises:
            ValueError: there is no such camera, or it was not drawn.
        """
        return tuple(_named(self.images, cameras, "image"))

    def state(self, names: Sequence[str]) -> np.ndarray:
        """The states of these names one behind the other, float64 [sum of n].

        Raises:
            ValueError: there is no such state.
        """
        return np.concatenate(_named(self.states, names, "state"))


@dataclass(frozen=True)
class StepResult:
    """Outcome of a chunk of actions.

    Attributes:
        observation: after the last executed action.
        success: the task's goal holds; the rest of the chunk was not executed.
        steps: actions executed.
        frames: uint8 [steps, H, W, 3], the first camera after every action, with `render="all"`; all cameras side by
            side with "all_views"; else None.
    """

    observation: Observation
    success: bool
    steps: int
    frames: np.ndarray | None = None


@dataclass(frozen=True)
class SimInfo:
    """What a result depends on besides policy and seed; goes into every result file.

    Attributes:
        assets: where meshes and textures come from; "stand-ins" makes it a smoke run.
        gl: the backend in words, or "none" for a simulator without cameras.
        versions: of the packages that make physics and pixels, by name.
        renderer: the backend without the number of its device: what pixels depend on.
    """

    assets: str
    gl: str
    versions: dict[str, str] = field(default_factory=dict)
    renderer: str = "none"


def _named(arrays: Mapping[str, np.ndarray], names: Sequence[str], what: str) -> list[np.ndarray]:
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(f"no {what} {', '.join(missing)}; the simulator gave {', '.join(arrays) or 'none'}")
    return [arrays[name] for name in names]
