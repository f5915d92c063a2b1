"""Robot constants as one typed object, resolved from a dataset name or a checkpoint, never from `sys.argv`.

The original chose them at import by looking for "libero", "aloha" or "bridge" in the command line, so that the name of
an output folder could silently change the action size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from prismo.util.text import did_you_mean

Normalization = Literal["bounds_q99", "bounds", "normal"]
# Bounds for files that describe a robot (`prismo.util.schema`); the upper ones only keep out what cannot be meant.
Count = Annotated[int, Ge(1), Le(10_000)]
Rate = Annotated[float, Gt(0), Le(10_000)]
Sign = Literal[-1, 1]
Camera = Literal["checkpoint", "libero"]  # whose intrinsics SpatialVLA takes: those stored with it, or LIBERO's


@dataclass(frozen=True)
class Embodiment:
    """What a policy must know of the robot whose data it sees.

    Attributes:
        name: key of this embodiment, e.g. "libero".
        action_dim: numbers in one action (LIBERO: 6 end-effector deltas and the gripper).
        proprio_dim: numbers in one proprioceptive state (LIBERO: xyz in m, axis-angle in rad, two fingers in m).
        chunk: actions predicted at once.
        normalization: how actions and proprio are scaled (see `prismo.data.normalize`).
        control_hz: rate at which actions are executed.
        gripper_dims: action indices that are gripper commands. Datasets store 1 = open, 0 = close; they are not scaled.
        gripper_env_sign: factor from "+1 open / -1 close" to the environment's own convention (LIBERO: -1 opens).
        cameras: of an observation, in the order in which a policy takes their views; empty = not known.
        states: vectors of an observation that make up proprio, in this order; empty = not known.
    """

    name: str
    action_dim: Count
    proprio_dim: Count
    chunk: Count
    normalization: Normalization
    control_hz: Rate
    gripper_dims: tuple[int, ...] = (-1,)
    gripper_env_sign: Sign = -1
    cameras: tuple[str, ...] = ()
    states: tuple[str, ...] = ()

    @property
    def action_tokens(self) -> int:
        """Tokens of one chunk in an OpenVLA sequence (LIBERO: 8 * 7 = 56)."""
        return self.chunk * self.action_dim


LIBERO = Embodiment(
    *("libero", 7, 8, 8, "bounds_q99", 20.0),
    cameras=("agentview", "robot0_eye_in_hand"),
    states=("eef_pos", "eef_axis_angle", "gripper_qpos"),
)
BRIDGE = Embodiment("bridge", 7, 7, 5, "bounds_q99", 5.0, gripper_env_sign=1)
FRACTAL = Embodiment("fractal", 7, 8, 8, "bounds_q99", 3.0, gripper_env_sign=1)
FRANKA = Embodiment("franka", 7, 8, 8, "bounds_q99", 15.0)
# OpenVLA-OFT's ALOHA checkpoints use chunks of 25; Spatial-Forcing's code says 30.
ALOHA = Embodiment("aloha", 14, 14, 25, "bounds", 25.0, gripper_dims=(6, 13), gripper_env_sign=1)

EMBODIMENTS = {e.name: e for e in (LIBERO, BRIDGE, FRACTAL, FRANKA, ALOHA)}
_DATASET_PREFIXES = {
    "libero": LIBERO,
    "bridge": BRIDGE,
    "fractal": FRACTAL,
    "droid": FRANKA,
    "franka": FRANKA,
    "aloha": ALOHA,
}


def embodiment_for(dataset: str) -> Embodiment:
    """The embodiment of a dataset name or unnorm_key such as `libero_spatial_no_noops` or `droid/1.0.0`.

    Raises:
        ValueError: no known prefix; the message lists the embodiments.
    """
    for prefix, embodiment in _DATASET_PREFIXES.items():
        if dataset.lower().startswith(prefix):
            return embodiment
    raise ValueError(
        did_you_mean("robot of dataset", dataset, _DATASET_PREFIXES)
        + ". For your own robot describe the dataset in a YAML file (data/README.md, 'Your own data')."
    )
