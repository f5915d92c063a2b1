"""LIBERO demonstrations in HDF5 as RLDS episodes, for `scripts/build_rlds_dataset.py`.

The files are those of `scripts/regenerate_libero_dataset.py` (or LIBERO's own at 256 pixels): one per task,
`{task}_demo.hdf5`, with `data/demo_i/{actions, obs/{ee_states, gripper_states, joint_states, agentview_rgb,
eye_in_hand_rgb}}` and pictures upside down as the simulator renders them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from prismo.data.images import encode_jpeg
from prismo.data.writer import Episode, libero_episode

_VECTORS = {"actions": 7, "obs/ee_states": 6, "obs/gripper_states": 2, "obs/joint_states": 7}
_CAMERAS = ("obs/agentview_rgb", "obs/eye_in_hand_rgb")


@dataclass(frozen=True)
class Demonstration:
    """One demonstration: its file and its group there ("data/demo_3")."""

    file: Path
    group: str

    @property
    def instruction(self) -> str:
        """The task in words: the file name without the scene that LIBERO-90 and LIBERO-10 put in front.

        "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5" gives "turn on the stove".
        """
        task = self.file.stem.removesuffix("_demo")
        return re.sub(r"^[A-Z_]+_SCENE\d+_", "", task).replace("_", " ")


def find_demonstrations(folder: Path) -> list[Demonstration]:
    """All demonstrations of the HDF5 files in a folder, in a shuffled order that is always the same.

    Tasks are mixed over the shards, so that readers that shuffle only a part at a time still mix them.

    Raises:
        FileNotFoundError: no HDF5 files.
        ValueError: a file is no HDF5 file or holds no demonstration.
    """
    files = sorted(folder.glob("*.hdf5"))
    if not files:
        raise FileNotFoundError(
            f"no *.hdf5 files in {folder}; expected the output of scripts/regenerate_libero_dataset.py"
        )
    found = []
    for path in files:
        try:
            with h5py.File(path) as file:
                groups = [f"data/{name}" for name in file.get("data", ())]
        except OSError as error:
            raise ValueError(f"{path} is not a readable HDF5 file ({error}); make or fetch it again") from error
        if not groups:
            raise ValueError(f"{path} holds no demonstrations (groups data/demo_0, ...)")
        found += [Demonstration(path, group) for group in groups]
    return sorted(found, key=lambda demo: hashlib.sha256(f"{demo.file.name}/{demo.group}".encode()).digest())


def image_size(demonstration: Demonstration) -> tuple[int, int]:
    """(height, width) of the pictures."""
    with h5py.File(demonstration.file) as file:
        height, width = _dataset(file, demonstration, _CAMERAS[0]).shape[1:3]
    return height, width


def read_episodes(demonstrations: list[Demonstration]) -> Iterator[Episode]:
    """RLDS episodes; pictures are turned upright (by 180 degrees) and encoded as JPEG (quality 95).

    Raises:
        ValueError: a dataset is missing or has another width; the message names the file.
    """
    for demo in demonstrations:
        with h5py.File(demo.file) as file:
            vectors = {name: _dataset(file, demo, name)[:].astype(np.float32) for name in _VECTORS}
            for name, width in _VECTORS.items():
                if vectors[name].shape[1:] != (width,):
                    raise ValueError(
                        f"{demo.file}: {demo.group}/{name} is {vectors[name].shape}, expected [T, {width}]"
                    )
            views = [[encode_jpeg(image[::-1, ::-1]) for image in _dataset(file, demo, name)] for name in _CAMERAS]
        yield libero_episode(
            *views,
            state=np.concatenate([vectors["obs/ee_states"], vectors["obs/gripper_states"]], axis=1),
            joint_state=vectors["obs/joint_states"],
            action=vectors["actions"],
            instruction=demo.instruction,
            file_path=demo.file.name,
        )


def _dataset(file: h5py.File, demo: Demonstration, name: str) -> h5py.Dataset:
    path = f"{demo.group}/{name}"
    if path not in file:
        raise ValueError(
            f"{demo.file} has no {path}; run scripts/regenerate_libero_dataset.py on LIBERO's demonstrations first"
        )
    return file[path]
