"""Which features of an RLDS dataset are the cameras, the action, the proprio and the instruction, and what they mean.

`dataset.py` resolves a dataset name, a mixture name or a YAML file to specs; `rlds.py` applies them once, while it
builds the index. A new public dataset is one entry of `SPECS`; own data need only a YAML file (data/README.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BeforeValidator

from prismo.data.features import DOWNLOAD_DATA, DatasetInfo, Feature, number_type, read_dataset_info, step_size
from prismo.embodiment import (
    BRIDGE,
    EMBODIMENTS,
    FRACTAL,
    FRANKA,
    LIBERO,
    Count,
    Embodiment,
    Normalization,
    Rate,
    Sign,
)
from prismo.util.problems import check_all
from prismo.util.schema import JsonObject, check, own_keys, read_yaml
from prismo.util.text import did_you_mean

Gripper = Literal["open_low", "open_high", "binarize", "relative", "as_stored"]
_MOVEMENT = 6  # numbers of an action that `actions_from_state` derives


@dataclass(frozen=True)
class DatasetSpec:
    """How one RLDS dataset becomes training samples.

    Features are named as in `features.json` below `steps/`; `name[a:b]` takes a part of a vector.

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


def _libero(suite: str) -> DatasetSpec:
    return DatasetSpec(
        name=f"libero_{suite}_no_noops",
        embodiment=LIBERO,
        cameras=("observation/image", "observation/wrist_image"),
        action=("action",),
        proprio=("observation/state",),
        gripper="open_low",
    )


SPECS = {
    spec.name: spec
    for spec in (
        *(_libero(suite) for suite in ("spatial", "object", "goal", "10", "90")),
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


@dataclass(frozen=True)
class MixtureEntry:
    """A dataset of a mixture: its spec, what its folder says, and how often each window is seen per epoch."""

    spec: DatasetSpec
    info: DatasetInfo
    weight: float = 1.0


def resolve(data_root: str | Path, name: str | Path) -> list[MixtureEntry]:
    """The datasets that `name` means: a known dataset or mixture, or a YAML file (one dataset or a mixture).

    `data_root / name` is the folder, with or without a version below it; a known name may carry the version
    ("bridge_orig/1.0.0"). `data_root` may also be the dataset's own folder.

    Raises:
        ValueError, FileNotFoundError: unknown name, absent folder, feature or file; one sentence on what to do.
    """
    return _resolve(Path(data_root), str(name), ())


def _resolve(data_root: Path, name: str, within: tuple[Path, ...]) -> list[MixtureEntry]:
    """As `resolve`; `within` are the mixture files around this name."""
    if name.endswith((".yaml", ".yml")):
        return _resolve_yaml(data_root, Path(name), within)
    if name in MIXTURES:
        return _resolve_mixture(data_root, MIXTURES[name], within)
    base = name.split("/", maxsplit=1)[0]
    if base not in SPECS:
        check_all(lambda: _unknown(name, within), lambda: _check_root(data_root))
    info = read_dataset_info(_folder(data_root, name))
    spec = replace(SPECS[base], name=name)
    check_features(spec, info)
    return [MixtureEntry(spec, info)]


def _unknown(name: str, within: tuple[Path, ...]) -> NoReturn:
    raise ValueError(
        (f"{within[-1]}: " if within else "")
        + did_you_mean("dataset", name, [*SPECS, *MIXTURES])
        + ". Describe your own data in a YAML file and give its path (data/README.md)"
    )


def _check_root(data_root: Path) -> None:
    if not data_root.is_dir():
        raise FileNotFoundError(f"there is no folder {data_root}. Check --data_root_dir ({DOWNLOAD_DATA})")


def _folder(data_root: Path, name: str) -> Path:
    """The dataset's folder below the root, or the root where that is the dataset's own (or its version) folder."""
    base = name.split("/", maxsplit=1)[0]
    root = data_root.absolute()
    is_dataset = (root / "dataset_info.json").is_file() or any(root.glob("*/dataset_info.json"))
    if is_dataset and not (root / name).is_dir() and base in (root.name, root.parent.name):
        return root
    return data_root / name


def _resolve_mixture(data_root: Path, weights: Mapping[str, float], within: tuple[Path, ...]) -> list[MixtureEntry]:
    """Datasets by their weights; files are named relative to the mixture file, the last of `within`."""
    entries = []
    for name, weight in weights.items():
        is_file = name.endswith((".yaml", ".yml"))
        found = _resolve(data_root, str(within[-1].parent / name) if is_file else name, within)
        entries += [replace(entry, weight=entry.weight * weight) for entry in found]
    names = [entry.spec.name for entry in entries]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the mixture holds {', '.join(repeated)} more than once; give each dataset one weight")
    return entries


def _listed(value: Any) -> Any:
    """Features of a description: one name, several, or names by role."""
    if isinstance(value, str):
        return [value]
    return list(value.values()) if isinstance(value, dict) else value


_Features = Annotated[list[str], MinLen(1), BeforeValidator(_listed)]
_Name = Annotated[str, MinLen(1)]


@own_keys
@dataclass(frozen=True)
class _Description:
    """A YAML file about own data (data/README.md); None takes the default of the robot `embodiment`."""

    name: _Name
    cameras: _Features
    action: _Features
    proprio: _Features
    gripper: Gripper
    control_hz: Rate
    path: _Name | None = None
    instruction: _Name = "language_instruction"
    embodiment: str | None = None
    chunk: Count | None = None
    normalization: Normalization | None = None
    gripper_dims: list[int] | None = None
    gripper_env_sign: Sign | None = None
    actions_from_state: bool = False
    skip_first: Annotated[int, Ge(0)] = 0


@own_keys
@dataclass(frozen=True)
class _Mixture:
    """A YAML file with datasets, by known name or file, and how often each of their windows is seen per epoch."""

    datasets: Annotated[dict[str, Annotated[float, Gt(0), Le(10_000)]], MinLen(1)]


def _resolve_yaml(data_root: Path, file: Path, within: tuple[Path, ...]) -> list[MixtureEntry]:
    if not file.is_file():
        raise FileNotFoundError(f"no dataset description {file}")
    if file.resolve() in [other.resolve() for other in within]:
        raise ValueError(f"{file} includes itself: {' -> '.join(map(str, (*within, file)))}")
    advice = "correct it (data/README.md shows a complete one)"
    content = read_yaml(file, JsonObject, advice=advice)
    if "datasets" in content:
        weights = check(content, _Mixture, str(file), advice=advice).datasets
        return _resolve_mixture(data_root, weights, (*within, file))
    description = check(content, _Description, str(file), advice=advice)
    folder = Path(description.path or description.name)
    folder = folder if folder.is_absolute() else _folder(data_root, str(folder))
    check_all(lambda: _check_robot(description, file), lambda: read_dataset_info(folder))
    info = read_dataset_info(folder)
    try:
        spec = _described(description, info)
        check_features(spec, info)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return [MixtureEntry(spec, info)]


def _check_robot(text: _Description, file: Path) -> None:
    if text.embodiment is not None and text.embodiment not in EMBODIMENTS:
        raise ValueError(f"{file}: {did_you_mean('embodiment', text.embodiment, EMBODIMENTS)}")


def _described(text: _Description, info: DatasetInfo) -> DatasetSpec:
    """The spec that a description means for a dataset."""
    base = EMBODIMENTS[text.embodiment] if text.embodiment else LIBERO
    embodiment = Embodiment(
        name=text.embodiment or text.name,
        action_dim=_total_width(text.action, info),
        proprio_dim=_total_width(text.proprio, info),
        chunk=text.chunk or base.chunk,
        normalization=text.normalization or base.normalization,
        control_hz=float(text.control_hz),
        gripper_dims=base.gripper_dims if text.gripper_dims is None else tuple(text.gripper_dims),
        gripper_env_sign=text.gripper_env_sign or base.gripper_env_sign,
    )
    return DatasetSpec(
        name=text.name,
        embodiment=embodiment,
        cameras=tuple(text.cameras),
        action=tuple(text.action),
        proprio=tuple(text.proprio),
        instruction=text.instruction,
        gripper=text.gripper,
        actions_from_state=text.actions_from_state,
        skip_first=text.skip_first,
    )


# --- features of a spec -----------------------------------------------------------------------------------------------


def split_slice(name: str) -> tuple[str, slice]:
    """("observation/state", slice(0, 6)) of "observation/state[0:6]"; "[3]" is the one column 3."""
    if match := re.fullmatch(r"(.+)\[(-?\d+)\]", name):
        start = int(match[2])
        return match[1], slice(start, None if start == -1 else start + 1)
    if match := re.fullmatch(r"(.+)\[(-?\d+)?:(-?\d+)?\]", name):
        return match[1], slice(*(None if bound is None else int(bound) for bound in match.groups()[1:]))
    return name, slice(None)


def find_feature(name: str, kind: str, info: DatasetInfo) -> tuple[str, Feature]:
    """Entry name and feature of `name`, below `steps/` or of the whole episode.

    Raises:
        ValueError: absent or of another kind; the message lists those that there are.
    """
    for entry in (f"steps/{name}", name):
        if entry in info.features and info.features[entry].kind == kind:
            return entry, info.features[entry]
    known = [key.removeprefix("steps/") for key, feature in info.features.items() if feature.kind == kind]
    raise ValueError(f"{info.path / 'features.json'}: {did_you_mean(f'{kind} feature', name, known)}")


def _total_width(names: Sequence[str], info: DatasetInfo) -> int:
    """Numbers per step of concatenated vector features; ValueError for a part that a vector does not have."""
    return sum(_width(name, info) for name in names)


def _width(name: str, info: DatasetInfo) -> int:
    key, part = split_slice(name)
    feature = find_feature(key, "tensor", info)[1]
    number_type(key, feature)
    count = step_size(key, feature)
    if any(not -count <= bound <= count for bound in (part.start, part.stop) if bound is not None):
        raise ValueError(f"{name!r} reaches beyond the {count} numbers of {key}")
    width = len(range(count)[part])
    if not width:
        raise ValueError(f"{name!r} takes none of the {count} numbers of {key}")
    return width


def check_features(spec: DatasetSpec, info: DatasetInfo) -> None:
    """Every feature of `spec` exists, the widths are the embodiment's and suffice; else ValueError."""
    for camera in spec.cameras:
        find_feature(camera, "image", info)
    find_feature(spec.instruction, "text", info)
    robot = spec.embodiment
    for what, names, expected in (
        ("action", spec.action, robot.action_dim),
        ("proprio", spec.proprio, robot.proprio_dim),
    ):
        if (found := _total_width(names, info)) != expected:
            raise ValueError(
                f"{info.path}: {what} ({' + '.join(names)}) has {found} numbers, {robot.name} has {expected}"
            )
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
