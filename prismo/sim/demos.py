"""Demonstrations in LIBERO's HDF5 schema: recording, replaying, writing and reading.

`<task>_demo.hdf5` holds `data/demo_<i>` with `actions`, `states`, `robot_states`, `rewards`, `dones` and `obs/...`, as
LIBERO publishes them and as OpenVLA's regeneration keeps them, so existing readers work on our files. Every finished
demonstration is one small file of its own until its task is complete: a killed run loses none.

Pictures are stored as the simulator makes them (first row at the bottom); the turn by 180 degrees belongs to the step
that makes RLDS data.

A replay proves that data and simulator belong together, and filters no-ops. The filter and the success test are those
with which OpenVLA made its `libero_*_no_noops` data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Ge

from prismo.sim.interface import SETTLE_STEPS, SimInfo, SimulatorError
from prismo.sim.libero import AGENT_CAMERA, WRIST_CAMERA, LiberoEnv, quat_to_axis_angle
from prismo.sim.suites import LiberoTask
from prismo.util.extras import need
from prismo.util.files import atomic_write

if TYPE_CHECKING:
    import h5py

_NOOP_NORM = 1e-4
AGENT_VIEW = "agentview_rgb"
WRIST_VIEW = "eye_in_hand_rgb"


class DemoError(ValueError):
    """A file of demonstrations is damaged or not of LIBERO's schema; the message names it and the place."""


@dataclass(frozen=True)
class Demo:
    """One episode of T actions; entry t of everything else is what was there before action t.

    Attributes:
        actions: float64 [T, 7]: six deltas in [-1, 1]; gripper -1 open, +1 close.
        states: float64 [T, 1 + nq + nv]. `states[0]` is the initial state before the objects came to rest: replay sets
            it, waits 10 steps and goes on with `actions[0]`.
        robot_states: float64 [T, 9]: two finger positions (m), end-effector position (m), quaternion (x, y, z, w).
        gripper_states: float64 [T, 2], m.
        joint_states: float64 [T, 7], rad.
        ee_states: float64 [T, 6]: position (m), axis-angle (rad).
        agentview_rgb: uint8 [T, H, W, 3], not turned; None if nothing was drawn.
        eye_in_hand_rgb: the wrist camera, likewise.
        seed: of the scene (poses of fixtures), None in files that do not say it.
    """

    actions: np.ndarray
    states: np.ndarray
    robot_states: np.ndarray
    gripper_states: np.ndarray
    joint_states: np.ndarray
    ee_states: np.ndarray
    agentview_rgb: np.ndarray | None = None
    eye_in_hand_rgb: np.ndarray | None = None
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.actions)


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


_ARRAYS = tuple(field.name for field in fields(Demo) if field.name != "seed")
_WIDTHS = {"actions": 7, "states": None, "robot_states": 9, "gripper_states": 2, "joint_states": 7, "ee_states": 6}


class Recorder:
    """Collects a `Demo` from an environment: call `add` before every action.

    Args:
        env: a `prismo.sim.libero.LiberoEnv` that was reset to `init_state`.
        init_state: becomes `states[0]`.
        seed: of that reset.
    """

    def __init__(self, env: Any, init_state: np.ndarray, seed: int) -> None:
        self._env = env
        self._init_state = init_state
        self._seed = seed
        self._rows: list[dict[str, Any]] = []  # by array name; None for a picture that was not drawn

    def add(self, action: np.ndarray) -> None:
        """Note the action about to be executed and what is there before it."""
        env = self._env
        axis_angle = quat_to_axis_angle(env.eef_quat)
        row: dict[str, Any] = {
            "actions": np.array(action, dtype=np.float64),
            "states": env.sim_state() if self._rows else np.array(self._init_state),
            "robot_states": np.concatenate([env.gripper_qpos, env.eef_pos, env.eef_quat]),
            "gripper_states": env.gripper_qpos.copy(),
            "joint_states": env.joint_pos.copy(),
            "ee_states": np.concatenate([env.eef_pos, axis_angle]),
        }
        for name, camera in ((AGENT_VIEW, AGENT_CAMERA), (WRIST_VIEW, WRIST_CAMERA)):
            image = env.image(camera)
            row[name] = None if image is None else image[::-1, ::-1]
        self._rows.append(row)

    def demo(self) -> Demo:
        """All that was added.

        Raises:
            SimulatorError: nothing was.
        """
        if not self._rows:
            raise SimulatorError("an episode without actions is no demonstration")
        columns = {name: [row[name] for row in self._rows] for name in _ARRAYS}
        arrays: dict[str, Any] = {name: None if rows[0] is None else np.stack(rows) for name, rows in columns.items()}
        return Demo(**arrays, seed=self._seed)


def is_noop(action: np.ndarray, previous: np.ndarray | None) -> bool:
    """The arm is told to stay (norm of the six deltas below 1e-4) and the gripper to do what it already does.

    Args:
        action: float [7].
        previous: the last action that was kept, None for the first.
    """
    still = bool(np.linalg.norm(action[:6]) < _NOOP_NORM)
    return still if previous is None else still and bool(action[6] == previous[6])


def replay(env: LiberoEnv, demo: Demo, *, seed: int, drop_noops: bool) -> tuple[Demo | None, EpisodeOutcome]:
    """Set the demonstration's first state, let the objects come to rest, execute its actions.

    The first state and robot state are copied from `demo`, as in the original regeneration (they are from before the
    objects came to rest).

    Returns:
        What this simulator saw, None if every action was a no-op; and whether the goal holds after the last action.
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
    outcome = EpisodeOutcome(success, len(demo) - noops, noops)
    if previous is None:
        return None, outcome
    recorded = recorder.demo()
    robot_states = np.concatenate([demo.robot_states[:1], recorded.robot_states[1:]])
    return replace(recorded, robot_states=robot_states), outcome


def demo_file_name(task: LiberoTask) -> str:
    """LIBERO's file name for a task's demonstrations; readers take the instruction from it."""
    return f"{task.name}_demo.hdf5"


def write_demo(path: Path, demo: Demo) -> None:
    """Write one demonstration to a file of its own, atomically."""
    with atomic_write(path) as temporary, need("h5py", "data").File(temporary, "w") as file:
        group = file.create_group("demo")
        group.attrs["num_samples"] = len(demo)
        group.attrs["init_state"] = demo.states[0]
        if demo.seed is not None:
            group.attrs["seed"] = demo.seed
        group.attrs["settle_steps"] = SETTLE_STEPS
        for name in ("actions", "states", "robot_states"):
            group[name] = getattr(demo, name)
        ends = np.zeros(len(demo), dtype=np.uint8)
        ends[-1] = 1
        group["rewards"], group["dones"] = ends, ends
        observations = group.create_group("obs")
        for name in ("gripper_states", "joint_states", "ee_states"):
            observations[name] = getattr(demo, name)
        observations["ee_pos"], observations["ee_ori"] = demo.ee_states[:, :3], demo.ee_states[:, 3:]
        for name in (AGENT_VIEW, WRIST_VIEW):
            images = getattr(demo, name)
            if images is not None:
                observations.create_dataset(
                    name, data=images, chunks=(1, *images.shape[1:]), compression="gzip", compression_opts=1
                )


def assemble(target: Path, parts: dict[int, Path], task: LiberoTask, info: SimInfo) -> None:
    """Join files of `write_demo` into the task's HDF5 file, atomically.

    Args:
        target: the `<task>_demo.hdf5` to write.
        parts: demonstration index -> file.
        task: goes into the attributes that LIBERO's readers look at.
        info: assets and versions, so that data made with stand-ins can be told.
    """
    with atomic_write(target) as temporary, need("h5py", "data").File(temporary, "w") as file:
        data = file.create_group("data")
        total = 0
        for index, part in sorted(parts.items()):
            with _opened(part) as source:
                source.copy("demo", data, name=f"demo_{index}")
            total += int(data[f"demo_{index}"].attrs["num_samples"])
        problem = {"domain_name": "robosuite", "language_instruction": task.language}
        data.attrs.update(
            {
                "tag": "libero-v1",
                "problem_info": json.dumps(problem),
                "bddl_file_name": f"{task.suite}/{task.bddl_file.name}",
                "env_args": json.dumps({"type": 1, "env_kwargs": {"control_freq": 20, "controller": "OSC_POSE"}}),
                "macros_image_convention": "opengl",
                "num_demos": len(parts),
                "total": total,
                "assets": info.assets,
                "versions": json.dumps(info.versions),
            }
        )


def demo_indices(path: Path) -> list[int]:
    """The demonstrations of a file, in numeric order (they may have gaps). Every one has LIBERO's schema.

    Raises:
        DemoError: something is missing or of another kind; says where.
    """
    with _opened(path) as file:
        data = file.get("data")
        if not isinstance(data, need("h5py", "data").Group) or not len(data):
            raise DemoError(f"{path} has no group data with demonstrations (demo_0, ...); expected LIBERO's schema")
        wrong = [name for name in data if not re.fullmatch(r"demo_\d+", name)]
        if wrong:
            raise DemoError(f"{path}: data holds {wrong[0]!r} where demo_<number> was expected")
        indices = sorted(int(name.removeprefix("demo_")) for name in data)
        for index in indices:
            _datasets(path, file, index)
    return indices


def read_demo(path: Path, index: int, *, images: bool = True) -> Demo:
    """Demonstration `index` of a LIBERO HDF5 file: ours, OpenVLA's regenerated ones, or LIBERO's raw ones.

    Raises:
        DemoError: the file lacks it, or something in it is missing, of another kind or no finite number.
    """
    with _opened(path) as file:
        if f"data/demo_{index}" not in file:
            raise DemoError(f"{path} has no demonstration {index}; it has {demo_indices(path)}")
        found = _datasets(path, file, index)
        wanted = {name: dataset for name, dataset in found.items() if images or name in _WIDTHS}
        arrays = {name: dataset[()] for name, dataset in wanted.items()}
        seed = file[f"data/demo_{index}"].attrs.get("seed")
    for name, array in arrays.items():
        if name in _WIDTHS and not np.isfinite(array).all():
            raise DemoError(f"{path}: data/demo_{index}/{name} holds NaN or infinity")
    if seed is not None and not isinstance(seed, (int, np.integer)):
        raise DemoError(f"{path}: data/demo_{index} has the seed {seed!r}; expected an integer")
    return Demo(**arrays, seed=None if seed is None else int(seed))


@contextmanager
def _opened(path: Path) -> Generator[h5py.File]:
    """A file for reading; what h5py throws at damaged ones (of any kind) becomes a DemoError."""
    try:
        with need("h5py", "data").File(path, "r") as file:
            yield file
    except DemoError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise DemoError(f"{path} is no readable HDF5 file ({reason}); make or fetch it again") from error


def _datasets(path: Path, file: h5py.File, index: int) -> dict[str, h5py.Dataset]:
    """The arrays of a demonstration, all of the kind and length that `Demo` says; pictures may be absent."""
    where, group = f"data/demo_{index}", need("h5py", "data").Group
    for name in (where, f"{where}/obs"):
        if not isinstance(file.get(name), group):
            raise DemoError(f"{path}: {name} is no group; expected LIBERO's schema")
    found = {}
    for name in _ARRAYS:
        at = f"{where}/{name}" if name in file[where] else f"{where}/obs/{name}"
        if at in file:
            _check_kind(f"{path}: {at}", file[at], name)
            found[name] = file[at]
        elif name in _WIDTHS:
            raise DemoError(f"{path}: {where} lacks {name!r}; expected LIBERO's schema")
    lengths = sorted({len(dataset) for dataset in found.values()})
    if len(lengths) > 1 or lengths == [0]:
        raise DemoError(f"{path}: {where} has arrays of {' and '.join(map(str, lengths))} steps")
    return found


def _check_kind(where: str, dataset: h5py.Dataset | h5py.Group, name: str) -> None:
    """Refuse what is no array of numbers [T, width] or no picture."""
    is_array = isinstance(dataset, need("h5py", "data").Dataset)
    if name in _WIDTHS:
        width = _WIDTHS[name]
        expected = f"numbers [T, {width or 'N'}]"
        right = is_array and dataset.dtype.kind in "fiu" and dataset.ndim == 2
        right = right and width in (None, dataset.shape[1])
    else:
        expected = "uint8 [T, H, W, 3]"
        right = is_array and dataset.dtype == np.uint8 and dataset.ndim == 4
        right = right and dataset.shape[3] == 3
    if not right:
        found = f"{dataset.dtype} {list(dataset.shape)}" if is_array else f"a {type(dataset).__name__.lower()}"
        raise DemoError(f"{where} is {found}; expected {expected}")
