"""Which features of a dataset are the cameras, the action, the proprio and the instruction, and what they mean.

`resolve.py` finds the spec of a name, a store applies it (`standardize`). A new public dataset is one entry of `SPECS`;
own data need only a YAML file (data/README.md).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from prismo.embodiment import BRIDGE, FRACTAL, FRANKA, LIBERO, Embodiment
from prismo.util.text import did_you_mean

Gripper = Literal["open_low", "open_high", "binarize", "relative", "as_stored"]
_NUMBERS = (
    "bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"
)  # fmt: skip
_MOVEMENT = 6  # numbers of an action that `actions_from_state` derives


@dataclass(frozen=True)
class Feature:
    """One feature of a dataset.

    Attributes:
        kind: "image" (encoded bytes), "text" (UTF-8 bytes) or "tensor" (numbers).
        shape: of one step (images: height, width, channels); -1 where it is not fixed.
        dtype: numpy name of the numbers, e.g. "float32".
        encoding: "jpeg" or "png" for images, "none", "bytes" or "zlib" for tensors, "" where the file does not say.
    """

    kind: Literal["image", "text", "tensor"]
    shape: tuple[int, ...] = ()
    dtype: str = ""
    encoding: str = ""


@dataclass(frozen=True)
class DatasetSpec:
    """How one dataset becomes training samples.

    Features are named as in the dataset, RLDS's without `steps/`; `name[a:b]` takes a part of a vector.

    Attributes:
        name: key in dataset_statistics.json, and the unnorm_key at evaluation.
        embodiment: robot constants; their sizes must be those of the concatenated features.
        cameras: image features in view order: primary, wrist, others.
        action, proprio: vector features, concatenated.
        instruction: text feature.
        gripper: convention of the stored gripper command. It always becomes 1 = open, 0 = closed.
            "open_low": small is open (LIBERO: -1 open, +1 closed; 0 open, 1 closed), 1 - clip(x, 0, 1).
            "open_high": large is open, clip(x, 0, 1).
            "binarize": large is open; values between 0.05 and 0.95 take the next clear value of the episode.
            "relative": +1 begins to close, -1 to open, 0 keeps (fractal).
            "as_stored": no change, and normalised like every other dimension.
        actions_from_state: derive the first six action dimensions from the states, state[t+1] - state[t]; the last step
            has no successor and is dropped (bridge).
        skip_first: steps to drop at the beginning of each episode.
    """

    name: str
    embodiment: Embodiment
    cameras: tuple[str, ...]
    action: tuple[str, ...]
    proprio: tuple[str, ...]
    instruction: str = "language_instruction"
    gripper: Gripper = "open_high"
    actions_from_state: bool = False
    skip_first: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the content of an index."""
        robot = self.embodiment
        return {key: value for key, value in asdict(self).items() if key not in ("name", "embodiment")} | {
            "gripper_dims": robot.gripper_dims,
            "action_dim": robot.action_dim,
            "proprio_dim": robot.proprio_dim,
        }

    def action_mask(self) -> np.ndarray:
        """bool [A]: which action dimensions are normalised (gripper commands in 0..1 are not)."""
        mask = np.ones(self.embodiment.action_dim, bool)
        if self.gripper != "as_stored":
            mask[list(self.embodiment.gripper_dims)] = False
        return mask


@dataclass(frozen=True)
class Trajectory:
    """One episode in the project's convention: steps `start` to `start + len(action)` of the stored one.

    Attributes:
        action: float32 [T, A], gripper 1 = open, 0 = closed.
        proprio: float32 [T, P].
    """

    start: int
    action: np.ndarray
    proprio: np.ndarray


def standardize(spec: DatasetSpec, action: np.ndarray, proprio: np.ndarray) -> Trajectory:
    """Apply the conventions of `spec` to the stored action [T, A] and proprio [T, P] of a whole episode.

    Numbers that are not finite stay so where they are used.
    """
    action, proprio = action[spec.skip_first :].copy(), proprio[spec.skip_first :]
    for dim in spec.embodiment.gripper_dims if spec.gripper != "as_stored" else ():
        command = action[:, dim]
        action[:, dim] = np.where(np.isfinite(command), _absolute_gripper(command, spec.gripper), command)
    if spec.actions_from_state and len(action):
        action[:-1, :_MOVEMENT] = proprio[1:, :_MOVEMENT] - proprio[:-1, :_MOVEMENT]
        action, proprio = action[:-1], proprio[:-1]
    return Trajectory(spec.skip_first, action.astype(np.float32), proprio.astype(np.float32))


def _absolute_gripper(command: np.ndarray, convention: Gripper) -> np.ndarray:
    """Gripper commands [T] as 1 = open, 0 = closed."""
    if convention == "open_low":
        return 1 - np.clip(command, 0, 1)
    if convention == "open_high":
        return np.clip(command, 0, 1)
    if convention == "binarize":
        # A moving gripper belongs to where it is going, so each unclear value takes the next clear one.
        clear = (command > 0.95) | (command < 0.05)
        return _fill(np.where(command > 0.95, 1.0, 0.0)[::-1], clear[::-1], start=command[-1:])[::-1]
    # "relative": before the first command the gripper is in the opposite state, and open if there is none at all.
    clear = np.abs(command) > 0.1
    first = command[clear][:1]
    return _fill(np.where(command < 0, 1.0, 0.0), clear, start=np.where(first > 0, 1.0, 0.0) if len(first) else [1.0])


def _fill(value: np.ndarray, valid: np.ndarray, start: Any) -> np.ndarray:
    """Carry the last valid value forward; `start` (one number) stands before the first valid one."""
    last = np.maximum.accumulate(np.where(valid, np.arange(1, len(value) + 1), 0))
    return np.concatenate([start, value])[last] if len(value) else value


# --- known datasets ---------------------------------------------------------------------------------------------------


SPECS = {
    spec.name: spec
    for spec in (
        *(
            DatasetSpec(
                name=f"libero_{suite}_no_noops",
                embodiment=LIBERO,
                cameras=("observation/image", "observation/wrist_image"),
                action=("action",),
                proprio=("observation/state",),
                gripper="open_low",
            )
            for suite in ("spatial", "object", "goal", "10", "90")
        ),
        DatasetSpec(
            name="bridge_orig",
            embodiment=BRIDGE,
            cameras=("observation/image_0",),
            action=("action",),
            proprio=("observation/state",),
            gripper="binarize",
            actions_from_state=True,
            skip_first=1,
        ),
        DatasetSpec(
            name="fractal20220817_data",
            embodiment=FRACTAL,
            cameras=("observation/image",),
            action=("action/world_vector", "action/rotation_delta", "action/gripper_closedness_action"),
            proprio=("observation/base_pose_tool_reached", "observation/gripper_closed"),
            instruction="observation/natural_language_instruction",
            gripper="relative",
        ),
        DatasetSpec(
            name="droid",
            embodiment=FRANKA,
            cameras=("observation/exterior_image_1_left", "observation/wrist_image_left"),
            action=("action_dict/cartesian_velocity", "action_dict/gripper_position"),
            proprio=("observation/joint_position", "observation/gripper_position"),
            gripper="open_low",
        ),
    )
}

# Weight 1 everywhere: every window of every suite once per epoch.
MIXTURES: dict[str, dict[str, float]] = {
    "libero_4_task_suites_no_noops": {f"libero_{suite}_no_noops": 1.0 for suite in ("spatial", "object", "goal", "10")},
}


# --- features of a spec -----------------------------------------------------------------------------------------------


def split_slice(name: str) -> tuple[str, slice]:
    """("observation/state", slice(0, 6)) of "observation/state[0:6]"; "[3]" is the one column 3."""
    if match := re.fullmatch(r"(.+)\[(-?\d+)\]", name):
        start = int(match[2])
        return match[1], slice(start, None if start == -1 else start + 1)
    if match := re.fullmatch(r"(.+)\[(-?\d+)?:(-?\d+)?\]", name):
        return match[1], slice(*(None if bound is None else int(bound) for bound in match.groups()[1:]))
    return name, slice(None)


def find_feature(name: str, kind: str, features: Mapping[str, Feature]) -> tuple[str, Feature]:
    """Full name and feature of `name`, which may leave out `steps/`.

    Raises:
        ValueError: absent or of another kind; the message lists those that there are.
    """
    for entry in (f"steps/{name}", name):
        if entry in features and features[entry].kind == kind:
            return entry, features[entry]
    known = [key.removeprefix("steps/") for key, feature in features.items() if feature.kind == kind]
    raise ValueError(did_you_mean(f"{kind} feature", name, known))


def number_type(name: str, feature: Feature) -> np.dtype:
    """Type of the numbers of a tensor feature; ValueError where it has none that numpy knows."""
    if feature.dtype not in _NUMBERS:
        raise ValueError(f"{name} has the type {feature.dtype!r}, not one of {', '.join(_NUMBERS)}")
    return np.dtype(feature.dtype)


def step_size(name: str, feature: Feature) -> int:
    """Numbers of a tensor feature in one step; ValueError where they vary."""
    if min(feature.shape, default=1) < 0:
        raise ValueError(f"{name} has the open shape {list(feature.shape)} and cannot be read step by step")
    return math.prod(feature.shape)


def total_width(names: Sequence[str], features: Mapping[str, Feature]) -> int:
    """Numbers per step of concatenated vector features; ValueError for a part that a vector does not have."""
    return sum(_width(name, features) for name in names)


def _width(name: str, features: Mapping[str, Feature]) -> int:
    key, part = split_slice(name)
    feature = find_feature(key, "tensor", features)[1]
    number_type(key, feature)
    count = step_size(key, feature)
    if any(not -count <= bound <= count for bound in (part.start, part.stop) if bound is not None):
        raise ValueError(f"{name!r} reaches beyond the {count} numbers of {key}")
    width = len(range(count)[part])
    if not width:
        raise ValueError(f"{name!r} takes none of the {count} numbers of {key}")
    return width


def check_features(spec: DatasetSpec, features: Mapping[str, Feature]) -> None:
    """Every feature of `spec` exists, the widths are the embodiment's and suffice; else ValueError."""
    for camera in spec.cameras:
        find_feature(camera, "image", features)
    find_feature(spec.instruction, "text", features)
    robot = spec.embodiment
    for what, names, expected in (
        ("action", spec.action, robot.action_dim),
        ("proprio", spec.proprio, robot.proprio_dim),
    ):
        if (found := total_width(names, features)) != expected:
            raise ValueError(f"{what} ({' + '.join(names)}) has {found} numbers, {robot.name} has {expected}")
    size = robot.action_dim
    if any(not -size <= dim < size for dim in robot.gripper_dims):
        raise ValueError(f"gripper_dims lie outside the {size} numbers of an action")
    if len({dim % size for dim in robot.gripper_dims}) < len(robot.gripper_dims):
        raise ValueError(f"gripper_dims name a number of the action twice: {list(robot.gripper_dims)}")
    if spec.actions_from_state and min(size, robot.proprio_dim) < _MOVEMENT:
        raise ValueError(
            f"actions_from_state needs at least {_MOVEMENT} numbers of action and proprio, found {size} and "
            f"{robot.proprio_dim}"
        )
