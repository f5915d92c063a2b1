"""`dataset_info.json` and `features.json` with wrong types: one sentence that names the file and the place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismo.data.dataset import open_dataset
from prismo.data.features import read_dataset_info
from prismo.data.rlds_writer import libero_features, write_rlds
from tests.data.conftest import made_up_episode, write_episodes

NAME = "libero_spatial_no_noops"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data root with two episodes in two shards; read-only."""
    root = tmp_path_factory.mktemp("plain")
    write_episodes(root, [made_up_episode(0), made_up_episode(1)], shard_bytes=1)
    return root


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """Its version folder, to be damaged."""
    shutil.copytree(plain, tmp_path / "root")
    return tmp_path / "root" / NAME / "1.0.0"


def change(path: Path, place: str, value: Any) -> None:
    """Set the value at `place` ("splits.0.name"); Ellipsis deletes it."""
    tree = json.loads(path.read_text())
    node, keys = tree, [int(key) if key.isdecimal() else key for key in place.split(".")]
    for key in keys[:-1]:
        node = node[key]
    if value is ...:
        del node[keys[-1]]
    else:
        node[keys[-1]] = value
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("name", ..., "name is missing"),
        ("name", 5, "name should be a valid string"),
        ("splits", "train", "splits should be a valid array"),
        ("splits", [], "splits should have at least 1 item"),
        ("splits.0", 7, r"splits\[0\] should be an object"),
        ("splits.0.name", None, r"splits\[0\].name should be a valid string"),
        ("splits.0.shardLengths", 2, r"splits\[0\].shardLengths should be a valid array"),
        ("splits.0.shardLengths", ["1", "x"], r"shardLengths\[1\] should be a valid integer, found 'x'"),
        ("splits.0.shardLengths", ["1", "-1"], r"shardLengths\[1\] should be greater than or equal to 0"),
        ("splits.0.shardLengths", ["1", 1.5], r"shardLengths\[1\] should be a valid integer"),
        ("splits.0.filepathTemplate", 3, "filepathTemplate should be a valid string"),
        ("splits.0.filepathTemplate", "{DATASET", "gives one name to several shards"),
        ("splits.0.filepathTemplate", f"{NAME}-train.tfrecord-00000-of-00002", "gives one name to several shards"),
    ],
)
def test_mistakes_in_dataset_info(folder: Path, place: str, value: Any, message: str) -> None:
    change(folder / "dataset_info.json", place, value)
    with pytest.raises(ValueError, match=rf"dataset_info\.json.*{message}"):
        read_dataset_info(folder)


def test_a_split_that_is_listed_twice_is_refused(folder: Path) -> None:
    split = json.loads((folder / "dataset_info.json").read_text())["splits"][0]
    change(folder / "dataset_info.json", "splits", [split, split])
    with pytest.raises(ValueError, match="lists a split twice"):
        read_dataset_info(folder)


STEPS = "featuresDict.features.steps.sequence.feature.featuresDict.features"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("featuresDict", "x", "featuresDict should be an object"),
        (f"{STEPS}.action", None, r"action should be an object"),
        (f"{STEPS}.action.tensor", [], r"action.tensor should be an object"),
        (f"{STEPS}.action.tensor.dtype", ..., r"action.tensor.dtype is missing"),
        (f"{STEPS}.action.tensor.shape", 7, r"action.tensor.shape should be an object"),
        (f"{STEPS}.action.tensor.shape.dimensions", ["x"], r"dimensions\[0\] should be a valid integer, found 'x'"),
        (f"{STEPS}.action.tensor.shape.dimensions", [10**30], r"dimensions\[0\] should be less than or equal to"),
        (f"{STEPS}.observation.featuresDict.features.image.image", "x", "image.image should be an object"),
        ("featuresDict.features.steps.sequence", 1, "steps.sequence should be an object"),
    ],
)
def test_mistakes_in_features(folder: Path, place: str, value: Any, message: str) -> None:
    change(folder / "features.json", place, value)
    with pytest.raises(ValueError, match=rf"features\.json: .*{message}"):
        read_dataset_info(folder)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("action.tensor.dtype", "int64", "action holds float32 numbers, features.json says int64"),
        ("action.tensor.dtype", "bool", "action holds float32 numbers, features.json says bool"),
        ("action.tensor.dtype", "f4,f4", "action has the type 'f4,f4', not one of bool, float16"),
        ("action.tensor.shape.dimensions", ["-1"], "action has the open shape"),
        ("language_instruction", {"tensor": {"dtype": "string"}}, None),
        ("is_first", {"text": {}}, None),
    ],
)
def test_features_that_are_not_what_is_stored(folder: Path, place: str, value: Any, message: str | None) -> None:
    """A record that holds other numbers than promised would be read as other data."""
    change(folder / "features.json", f"{STEPS}.{place}", value)
    if message is None:
        assert len(open_dataset(folder.parent.parent, NAME)) == 10
        return
    with pytest.raises(ValueError, match=message):
        open_dataset(folder.parent.parent, NAME)


def test_an_instruction_that_is_stored_as_numbers_is_named(folder: Path, tmp_path: Path) -> None:
    change(folder / "features.json", f"{STEPS}.is_first", {"text": {}})
    description = tmp_path / "x.yaml"
    description.write_text(
        f"name: x\npath: {NAME}\ncameras: observation/image\naction: action\nproprio: observation/state\n"
        "gripper: open_low\ncontrol_hz: 20\ninstruction: is_first\n"
    )
    with pytest.raises(ValueError, match=r"episode 0 .*is_first holds numbers, features.json promises texts"):
        open_dataset(folder.parent.parent, description)


def test_image_features_without_a_size_are_read(folder: Path) -> None:
    change(folder / "features.json", f"{STEPS}.observation.featuresDict.features.image.image", {})
    assert open_dataset(folder.parent.parent, NAME, size=32)[0].images.shape == (2, 3, 32, 32)


def test_numbers_that_do_not_make_steps_are_named(tmp_path: Path) -> None:
    features = libero_features(16, 16)
    episode = made_up_episode(0)
    folder = tmp_path / NAME / "1.0.0"
    write_rlds(folder, NAME, features, [episode])
    change(folder / "features.json", f"{STEPS}.observation.featuresDict.features.state.tensor.shape.dimensions", ["7"])
    description = tmp_path / "x.yaml"
    description.write_text(
        f"name: x\npath: {NAME}\ncameras: observation/image\naction: action\nproprio: observation/state\n"
        "gripper: open_low\ncontrol_hz: 20\n"
    )
    with pytest.raises(ValueError, match=r"observation/state holds 96 numbers, which do not make steps of shape"):
        open_dataset(tmp_path, description)
    assert np.prod(episode["steps/observation/state"].shape) == 96
