"""LIBERO demonstrations in HDF5 as RLDS episodes, for `prismo data build`.

The files are those of `prismo data regenerate` (or LIBERO's own at 256 pixels): one per task,
`{task}_demo.hdf5`, with `data/demo_i/{actions, obs/{ee_states, gripper_states, joint_states, agentview_rgb,
eye_in_hand_rgb}}` and pictures upside down as the simulator renders them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prismo.data.images import encode_jpeg
from prismo.data.rlds_writer import EpisodeEntries, libero_episode
from prismo.util.extras import need
from prismo.util.text import instruction_of

_VECTORS = {"actions": 7, "obs/ee_states": 6, "obs/gripper_states": 2, "obs/joint_states": 7}
_CAMERAS = ("obs/agentview_rgb", "obs/eye_in_hand_rgb")


@dataclass(frozen=True)
class Demonstration:
    """One demonstration: its file and its group there ("data/demo_3")."""

    file: Path
    group: str

    @property
    def instruction(self) -> str:
        """The task in words: "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5" gives "turn on the stove"."""
        return instruction_of(self.file.stem.removesuffix("_demo"))


def find_demonstrations(folder: Path) -> list[Demonstration]:
    """All demonstrations of the HDF5 files in a folder, in a shuffled order that is always the same.

    Tasks are mixed over the shards, so that readers that shuffle only a part at a time still mix them.

    Raises:
        FileNotFoundError: no HDF5 files.
        ValueError: a file is no HDF5 file or holds no demonstration.
    """
    files = sorted(folder.glob("*.hdf5"))
    if not files:
        raise FileNotFoundError(f"no *.hdf5 files in {folder}; expected the output of `prismo data regenerate`")
    found = []
    for path in files:
        with _opened(path) as file:
            data = file.get("data")
            groups = [f"data/{name}" for name in data] if _is_group(data) else []
        if not groups:
            raise ValueError(f"{path} holds no demonstrations (groups data/demo_0, ...)")
        found += [Demonstration(path, group) for group in groups]
    return sorted(found, key=lambda demo: hashlib.sha256(f"{demo.file.name}/{demo.group}".encode()).digest())


def image_size(demonstration: Demonstration) -> tuple[int, int]:
    """(height, width) of the pictures."""
    with _opened(demonstration.file) as file:
        height, width = _dataset(file, demonstration, _CAMERAS[0], None, None, 3).shape[1:3]
    return height, width


def convert_episodes(demonstrations: list[Demonstration]) -> Iterator[EpisodeEntries]:
    """RLDS episodes; pictures are turned upright (by 180 degrees) and encoded as JPEG (quality 95).

    Raises:
        ValueError: a file is damaged; a dataset is missing, of another type or shape (all pictures must have the size
            of the first) or holds a number that is not finite. The message names file, demonstration and step.
    """
    size = image_size(demonstrations[0])
    for demo in demonstrations:
        yield _read(demo, size)


def _read(demo: Demonstration, size: tuple[int, int]) -> EpisodeEntries:
    with _opened(demo.file) as file:
        stored = {name: _dataset(file, demo, name, width) for name, width in _VECTORS.items()}
        stored |= {name: _dataset(file, demo, name, *size, 3) for name in _CAMERAS}
        steps = {name: len(dataset) for name, dataset in stored.items()}
        if len(set(steps.values())) > 1:
            found = ", ".join(f"{name} {count}" for name, count in steps.items())
            raise _UnfitError(f"{demo.file}: {demo.group} has different numbers of steps: {found}")
        vectors = {name: _finite(demo, name, stored[name][:]) for name in _VECTORS}
        views = [[encode_jpeg(image[::-1, ::-1]) for image in stored[name]] for name in _CAMERAS]
    return libero_episode(
        *views,
        state=np.concatenate([vectors["obs/ee_states"], vectors["obs/gripper_states"]], axis=1),
        joint_state=vectors["obs/joint_states"],
        action=vectors["actions"],
        instruction=demo.instruction,
        file_path=demo.file.name,
    )


class _UnfitError(ValueError):
    """The file is whole, but not what is expected."""


@contextmanager
def _opened(path: Path) -> Generator[Any]:
    """An open HDF5 file. Damage, for which h5py has many exceptions, becomes one ValueError."""
    h5py = need("h5py", "data")
    try:
        with h5py.File(path) as file:
            yield file
    except _UnfitError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:
        raise ValueError(f"{path} is not a readable HDF5 file ({error}); make or fetch it again") from error


def _is_group(found: Any) -> bool:
    return isinstance(found, need("h5py", "data").Group)


def _refuse_links_elsewhere(file: Any, path: str) -> None:
    """An HDF5 file can name any other file of the machine in the place of a part of its own."""
    external, parts = need("h5py", "data").ExternalLink, path.split("/")
    for count in range(1, len(parts) + 1):
        place = "/".join(parts[:count])
        if place in file and isinstance(file.get(place, getlink=True), external):
            raise _UnfitError(f"{file.filename}: {place} is a link to another file; expected data")


def _dataset(file: Any, demo: Demonstration, name: str, *shape: int | None) -> Any:
    """The dataset of one demonstration with T > 0 entries of `shape`, where None is any length; pictures have three."""
    path = f"{demo.group}/{name}"
    _refuse_links_elsewhere(file, path)
    if not _is_group(file.get(demo.group)) or path not in file:
        raise _UnfitError(f"{demo.file} has no {path}; run `prismo data regenerate` on LIBERO's demonstrations first")
    found = file[path]
    if _is_group(found):
        raise _UnfitError(f"{demo.file}: {path} is a group, expected a dataset")
    pictures = len(shape) == 3
    fits = found.dtype == np.uint8 if pictures else found.dtype.kind in "fiu"
    wanted = tuple(found.shape[i] if n is None and i < found.ndim else n for i, n in enumerate(shape, 1))
    if not fits or found.shape[1:] != wanted:
        expected = ", ".join("*" if n is None else str(n) for n in shape)
        raise _UnfitError(
            f"{demo.file}: {path} is {found.dtype} {list(found.shape)}, expected "
            f"{'pictures uint8' if pictures else 'numbers'} [T, {expected}]"
        )
    if not found.size:
        raise _UnfitError(f"{demo.file}: {path} has no steps")
    return found


def _finite(demo: Demonstration, name: str, values: np.ndarray) -> np.ndarray:
    """The values as float32, as RLDS stores them."""
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    for step, dim in np.argwhere(~np.isfinite(values)):
        raise _UnfitError(
            f"{demo.file}: {demo.group}/{name}: number {dim} of step {step} is {values[step, dim]}; mend or delete "
            "this demonstration"
        )
    return values
