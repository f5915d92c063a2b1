"""Damaged or unusual HDF5 demonstrations: one sentence that names file, demonstration and step, and no dataset."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from prismo.data.hdf5 import convert_episodes, find_demonstrations, image_size
from prismo.data.rlds_writer import libero_features, write_rlds

h5py = pytest.importorskip("h5py", reason="h5py (extra data) is not installed")

FILE = "pick_up_the_bowl_demo.hdf5"
DEMO = "data/demo_2"
CAMERA = f"{DEMO}/obs/agentview_rgb"


@pytest.fixture
def copy(demonstrations: Path, tmp_path: Path) -> Path:
    """An own copy of one file of `demonstrations`."""
    folder = tmp_path / "demos"
    folder.mkdir()
    shutil.copy(demonstrations / FILE, folder)
    return folder


def build(folder: Path) -> None:
    found = find_demonstrations(folder)
    write_rlds(folder.parent / "out" / "1.0.0", "x", libero_features(*image_size(found[0])), convert_episodes(found))


def edit(folder: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(folder / FILE, "a") as file:
        change(file)


def replaced(name: str, value: Callable[[int], object]) -> Callable[[h5py.File], None]:
    """Replace a dataset by what `value` makes of the demonstration's number of steps; None leaves an empty group."""

    def change(file: h5py.File) -> None:
        steps = len(file[DEMO]["actions"])
        del file[name]
        new = value(steps)
        if new is None:
            file.create_group(name)
        else:
            file[name] = new

    return change


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{DEMO}/actions", lambda t: None, r"data/demo_2/actions is a group, expected a dataset"),
        (f"{DEMO}/actions", lambda t: 3.0, r"data/demo_2/actions is float64 \[\], expected numbers \[T, 7\]"),
        (f"{DEMO}/actions", lambda t: np.array([b"a"] * t), r"expected numbers \[T, 7\]"),
        (f"{DEMO}/actions", lambda t: np.zeros((t, 8)), r"is float64 \[\d+, 8\], expected numbers \[T, 7\]"),
        (f"{DEMO}/actions", lambda t: np.full((t, 7), np.nan), r"actions: number 0 of step 0 is nan"),
        (f"{DEMO}/obs/ee_states", lambda t: np.full((t, 6), 1e300), r"ee_states: number 0 of step 0 is inf"),
        (
            f"{DEMO}/obs/ee_states",
            lambda t: np.zeros((t + 1, 6)),
            r"different numbers of steps: actions \d+",
        ),
        (f"{DEMO}/actions", lambda t: np.zeros((0, 7)), r"data/demo_2/actions has no steps"),
        (
            CAMERA,
            lambda t: np.zeros((t, 32, 32, 3)),
            r"agentview_rgb is float64 .*expected pictures uint8",
        ),
        (CAMERA, lambda t: np.zeros((t, 32, 32, 3), np.uint16), r"agentview_rgb is uint16"),
        (CAMERA, lambda t: np.zeros((t, 32, 32), np.uint8), r"agentview_rgb is uint8 \[\d+, 32, 32\], expected"),
        (CAMERA, lambda t: None, r"agentview_rgb is a group"),
        (DEMO, lambda t: np.zeros(3), r"has no data/demo_2/"),
        ("data", lambda t: np.zeros((3, 3)), r"holds no demonstrations"),
    ],
)
def test_a_demonstration_of_another_kind_is_named(
    copy: Path, name: str, value: Callable[[int], object], message: str
) -> None:
    edit(copy, replaced(name, value))
    with pytest.raises(ValueError, match=rf"{FILE}.*{message}"):
        build(copy)
    assert not (copy.parent / "out" / "1.0.0").exists()


def test_a_link_to_another_file_is_not_followed(copy: Path) -> None:
    """It could name any HDF5 file of the machine."""
    elsewhere = shutil.copy(copy / FILE, copy.parent / "elsewhere.h5")

    def change(file: h5py.File) -> None:
        del file[f"{DEMO}/actions"]
        file[f"{DEMO}/actions"] = h5py.ExternalLink(str(elsewhere), f"{DEMO}/actions")

    edit(copy, change)
    with pytest.raises(ValueError, match=rf"{FILE}.*actions is a link to another file"):
        build(copy)


def test_pictures_of_different_sizes_are_refused(copy: Path) -> None:
    """The features promise one size; readers would fail in the middle of training."""
    edit(copy, replaced(f"{DEMO}/obs/eye_in_hand_rgb", lambda t: np.zeros((t, 16, 16, 3), np.uint8)))
    with pytest.raises(ValueError, match=r"eye_in_hand_rgb is uint8 \[\d+, 16, 16, 3\], expected pictures uint8"):
        build(copy)


def test_damage_anywhere_is_one_sentence(copy: Path) -> None:
    """Flipped bytes in the metadata: h5py answers with half a dozen kinds of exceptions."""
    original = (copy / FILE).read_bytes()
    rng = random.Random(0)
    refused = []
    for _ in range(60):
        data = bytearray(original)
        for _ in range(10):
            data[rng.randrange(rng.choice([2500, len(data)]))] = rng.randrange(256)
        (copy / FILE).write_bytes(data)
        shutil.rmtree(copy.parent / "out", ignore_errors=True)
        try:
            build(copy)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 15
    assert all(FILE in message for message in refused)
