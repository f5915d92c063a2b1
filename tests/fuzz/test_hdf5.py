"""Demonstrations in HDF5, damaged as files or holding other things than they should."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from prismo.data.hdf5 import convert_episodes, find_demonstrations, image_size
from prismo.data.rlds_writer import libero_features, write_rlds
from tests.fuzz.conftest import DATASET
from tests.fuzz.harness import Fuzzer
from tests.fuzz.mutate import Draw, Mutation, damage
from tests.fuzz.test_shards import read_samples

h5py = pytest.importorskip("h5py", reason="h5py (extra data) is not installed")
FILES = ("pick_up_the_bowl_demo.hdf5", "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5")
_VECTORS = {"actions": 7, "obs/ee_states": 6, "obs/gripper_states": 2, "obs/joint_states": 7}
_CAMERAS = ("obs/agentview_rgb", "obs/eye_in_hand_rgb")
_STEPS = 9


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files with two demonstrations each, compressed as LIBERO's are not and contiguous as they are."""
    folder = tmp_path_factory.mktemp("fuzz") / "recorded"
    folder.mkdir()
    for number, name in enumerate(FILES):
        rng = np.random.default_rng(number)
        with h5py.File(folder / name, "w") as file:
            for demo in ("data/demo_0", "data/demo_1"):
                for key, width in _VECTORS.items():
                    file[f"{demo}/{key}"] = rng.uniform(-1, 1, (_STEPS, width))
                for key in _CAMERAS:
                    pixels = rng.integers(0, 256, (_STEPS, 24, 24, 3), dtype=np.uint8)
                    file.create_dataset(f"{demo}/{key}", data=pixels, compression="gzip" if number else None)
    return folder


def build(folder: Path) -> Any:
    """The RLDS dataset that scripts/build_rlds_dataset.py makes of a folder, as training sees it."""
    demonstrations = find_demonstrations(folder)
    features = libero_features(*image_size(demonstrations[0]))
    write_rlds(folder / "rlds" / DATASET / "1.0.0", DATASET, features, convert_episodes(demonstrations))
    return read_samples(folder / "rlds")


_CHANGES: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "NaN": (lambda v: np.where(np.arange(v.size).reshape(v.shape) == v.size // 2, np.nan, v), True),
    "Infinity": (lambda v: np.where(np.arange(v.size).reshape(v.shape) == 0, np.inf, v), True),
    "1e300": (lambda v: np.full(v.shape, 1e300), True),
    "shorter": (lambda v: v[:-1], True),
    "empty": (lambda v: v[:0], True),
    "one dimension less": (lambda v: v[:, 0], True),
    "one dimension more": (lambda v: v[None], True),
    "a column less": (lambda v: v[..., :-1], True),
    "a scalar": (lambda v: v.ravel()[0], True),
    "text": (lambda v: np.full(v.shape, b"x"), True),
    "complex": (lambda v: v.astype(np.complex128), True),
    "half precision": (lambda v: v.astype(np.float16), False),
    "int64": (lambda v: v.astype(np.int64), False),
    "big endian": (lambda v: v.astype(v.dtype.newbyteorder(">")), False),
    "float pictures": (lambda v: v.astype(np.float32) / 255, True),
    "uint16 pictures": (lambda v: v.astype(np.uint16) * 257, True),
    "pictures of another size": (lambda v: v[:, :16], True),
}


@st.composite
def stored(draw: Draw) -> Mutation:
    """Something else in the place of a dataset or group."""
    file, demo = draw(st.sampled_from(FILES)), draw(st.sampled_from(["data/demo_0", "data/demo_1"]))
    name = draw(st.sampled_from([*_VECTORS, *_CAMERAS]))
    kinds = {"gone", "a group", "a link to nowhere", "a link to another file", *_CHANGES}
    kinds -= {"float pictures", "uint16 pictures", "pictures of another size"} if name in _VECTORS else {"big endian"}
    kinds -= {"NaN", "Infinity", "1e300", "half precision", "int64", "complex"} if name in _CAMERAS else set()
    kind = draw(st.sampled_from(sorted(kinds)))
    place = draw(st.sampled_from([f"{demo}/{name}", f"{demo}/{name}", demo, "data"])) if kind == "gone" else None
    path = place or f"{demo}/{name}"
    must_fail = path not in (demo,) if kind == "gone" else _CHANGES.get(kind, (None, True))[1]
    return Mutation(file, kind, f"{path}: {kind}", functools.partial(_store, file, path, kind), must_fail=must_fail)


def _store(name: str, path: str, kind: str, folder: Path) -> None:
    with h5py.File(folder / name, "r+") as file:
        before = file[path][()] if kind in _CHANGES else None
        del file[path]
        if kind == "a group":
            file.create_group(path)
        elif kind == "a link to nowhere":
            file[path] = h5py.SoftLink("/data/nowhere")
        elif kind == "a link to another file":
            file[path] = h5py.ExternalLink(f"../outside/{name}", path)
        elif kind in _CHANGES:
            file[path] = _CHANGES[kind][0](before)


def other_numbers(mutation: Mutation, before: Any, after: Any) -> bool:
    """HDF5 has no checksums, the task is in the name of the file, and a demonstration less is another set of them."""
    if mutation.kind in ("gone", "half precision", "int64", "delete", "swap", "replace"):
        return True
    return mutation.kind in ("flip", "zeros", "ones", "insert") and len(before) == len(after)


def test_damaged_demonstrations(fuzz: Fuzzer, recorded: Path) -> None:
    structure = stored()
    fuzz(recorded, st.one_of(structure, structure, damage(recorded, FILES)), build, percent=9,
         legitimate=other_numbers)  # fmt: skip
