"""What a policy is to the rest of the project: observations in, action chunks out, any batch size.

Evaluation (`prismo.eval`) and serving talk to policies only through this file, so a new model family needs one more
file here and nothing elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from prismo.embodiment import Embodiment


@dataclass(frozen=True)
class PolicyInput:
    """One observation as a policy takes it.

    Attributes:
        images: camera frames uint8 [H, W, 3], upright, of any size: the third-person view first, then wrist views.
        state: proprioceptive state in physical units (LIBERO: float64 [8]); None for policies without one.
        instruction: the task in words.
    """

    images: tuple[np.ndarray, ...]
    state: np.ndarray | None
    instruction: str


class Policy(Protocol):
    """Observations in, action chunks out.

    A slot is a place in which one episode runs at a time (a simulator, a client of the server). Everything that a
    policy remembers between two calls belongs to a slot, so episodes never mix, whatever the batches look like.
    """

    @property
    def robot(self) -> Embodiment:
        """Sizes of action, state and chunk, rate and gripper convention."""

    @property
    def num_images(self) -> int:
        """Camera frames per observation."""

    def start_episode(self, slot: int, seed: int) -> None:
        """Forget what the slot's last episode left; draw whatever is random in the new one from `seed`."""

    def predict(self, inputs: Sequence[PolicyInput], slots: Sequence[int]) -> np.ndarray:
        """Predict action chunks.

        Args:
            inputs: B observations.
            slots: the slot of each.

        Returns:
            float64 [B, K, A] in physical units as in the training data (gripper: 1 = open, 0 = close); K is at most
            `robot.chunk`. What the environment takes: `environment_actions`.

        Raises:
            ValueError: an observation lacks an image or the state.
        """

    def describe(self) -> dict[str, Any]:
        """Every setting that changes the actions, as JSON values, for result files."""


class LoadedPolicy:
    """What the policies of all families have in common.

    Args:
        model: in eval mode on its device.
        family, source: of the checkpoint, for `describe` and errors.
        settings: resolved; a dataclass with `chunk` and `num_images`.
        robot: sizes and conventions of the robot.
    """

    def __init__(self, model: Any, family: str, source: str, settings: Any, robot: Embodiment) -> None:
        self._model, self._family, self._source, self._settings = model, family, source, settings
        self._robot = replace(robot, chunk=settings.chunk)

    @property
    def robot(self) -> Embodiment:
        return self._robot

    @property
    def num_images(self) -> int:
        return self._settings.num_images

    def describe(self) -> dict[str, Any]:
        """See `Policy`."""
        return {
            "family": self._family,
            **asdict(self._settings),
            "robot": self._robot.name,
            "device": str(self._model.device),
            "dtype": str(self._model.dtype).removeprefix("torch."),
        }

    def _finite(self, actions: np.ndarray) -> np.ndarray:
        """`actions` as they are; ValueError where one is NaN or infinite, which no robot should be sent."""
        if not np.isfinite(actions).all():
            raise ValueError(
                f"{self._source} predicts actions that are not finite: its weights are damaged, copy it again"
            )
        return actions


@dataclass(frozen=True)
class PolicyFamily:
    """How policies of a model family are run.

    Attributes:
        settings: (flags, checkpoint, robot, default unnorm_key) -> resolved settings, a frozen dataclass; raises
            ValueError for flags that cannot be or contradict the checkpoint.
        load: (checkpoint, settings, robot, *, device, dtype) -> the policy.
    """

    settings: Callable[[Any, Any, Embodiment, str | None], Any]
    load: Callable[..., Policy]


def environment_actions(actions: np.ndarray, robot: Embodiment) -> np.ndarray:
    """Predicted actions [..., A] as the robot's controller takes them: the gripper becomes -1 or +1.

    1 = open, 0 = close is turned into the sign of `2 g - 1` (0 stays 0), times the robot's own sign: LIBERO opens at
    -1. Other dimensions stay as they are. The argument is not changed.
    """
    commands = np.array(actions, dtype=np.float64)
    gripper = list(robot.gripper_dims)
    commands[..., gripper] = robot.gripper_env_sign * np.sign(2 * commands[..., gripper] - 1)
    return commands
