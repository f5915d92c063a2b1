"""Datasets that all data tests share: one written by tensorflow-datasets, one by our writer, one from HDF5."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismo.data.dataset import WindowDataset, open_dataset
from prismo.data.images import decode_image, encode_jpeg
from prismo.data.rlds import EpisodeIndex, byte_strings, numbers
from prismo.data.rlds_writer import libero_episode, libero_features, write_rlds
from prismo.data.specs import Feature
from prismo.data.synthetic import write_synthetic_libero
from prismo.data.tfrecord import crc32c, parse_example

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tensorflow" in getattr(item, "fixturenames", ()):
            item.add_marker("processes")  # it runs in one of its own


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data root with a small LIBERO dataset of 64 pixels in several shards; read-only."""
    root = tmp_path_factory.mktemp("synthetic")
    write_synthetic_libero(root, episodes=6, steps=20, image_size=64, shard_bytes=100_000)
    return root


@pytest.fixture(scope="session")
def small(synthetic: Path) -> WindowDataset:
    """The windows of `synthetic`."""
    return open_dataset(synthetic, "libero_spatial_no_noops")


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HDF5 demonstrations as the regeneration script writes them (32 pixels): two tasks with gaps in the numbering."""
    h5py = pytest.importorskip("h5py", reason="h5py (extra data) is not installed")
    folder = tmp_path_factory.mktemp("hdf5")
    tasks = {"pick_up_the_bowl": (0, 2), "KITCHEN_SCENE3_turn_on_the_stove": (1, 10, 3)}
    for task, chosen in tasks.items():
        with h5py.File(folder / f"{task}_demo.hdf5", "w") as file:
            for number in chosen:
                rng = np.random.default_rng([len(task), number])
                steps = int(rng.integers(4, 15))
                demo = file.create_group(f"data/demo_{number}")
                demo["actions"] = np.column_stack([rng.normal(size=(steps, 6)), rng.choice([-1.0, 1.0], steps)])
                demo["states"] = rng.normal(size=(steps, 20))
                for name, width in {"ee_states": 6, "gripper_states": 2, "joint_states": 7}.items():
                    demo[f"obs/{name}"] = rng.normal(size=(steps, width))
                for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                    demo[f"obs/{camera}"] = rng.integers(0, 256, (steps, 32, 32, 3), dtype=np.uint8)
    return folder


@pytest.fixture(scope="session")
def rebuilt(demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data root that `scripts/build_rlds_dataset.py` made of `demonstrations`."""
    root = tmp_path_factory.mktemp("rebuilt")
    run_script("build_rlds_dataset.py", "--hdf5_dir", demonstrations, "--dataset_name", "libero_90_no_noops",
               "--data_root_dir", root)  # fmt: skip
    return root


@pytest.fixture(scope="session")
def tensorflow(rebuilt: Path, synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with everything that `tensorflow_side.py` writes; its inputs are `rebuilt` and `synthetic`."""
    pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets: make setup-compare")
    out = tmp_path_factory.mktemp("tensorflow")
    folders = [rebuilt / "libero_90_no_noops" / "1.0.0", synthetic / "libero_spatial_no_noops" / "1.0.0"]
    command = [sys.executable, str(HERE / "tensorflow_side.py"), str(out), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def made_up_episode(number: int, steps: int = 12) -> dict[str, Any]:
    """Entries of a LIBERO episode of 16 pixels, to be changed and written with `write_episodes`."""
    rng = np.random.default_rng(number)
    images = [encode_jpeg(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(steps)]
    action, state, joints = (rng.normal(size=(steps, width)) for width in (7, 8, 7))
    return dict(libero_episode(images, images[::-1], state, joints, action, "lift the lid", f"demo_{number}.hdf5"))


def write_episodes(root: Path, episodes: list[dict[str, Any]], shard_bytes: int = 1 << 20) -> Path:
    """Write them as libero_spatial_no_noops below `root`; returns the version folder."""
    folder = root / "libero_spatial_no_noops" / "1.0.0"
    write_rlds(folder, "libero_spatial_no_noops", libero_features(16, 16), episodes, shard_bytes=shard_bytes)
    return folder


def read_episode(store: EpisodeIndex, number: int) -> dict[str, Any]:
    """Everything stored of one episode: numbers [T, ...], images uint8 [T, H, W, 3], texts as lists of str.

    Keys are the entry names ("steps/action", "episode_metadata/file_path"); values of the whole episode come without
    the first dimension.
    """
    entry = store.episodes[number]
    data = store.shard(number).read_bytes()[entry["offset"] :][: entry["length"]]
    assert crc32c(data) == entry["crc"]
    entries, values = parse_example(data), {}
    for name, feature in store.info.features.items():
        if name in entries:
            steps = _decode(name, feature, data, entries[name])
            values[name] = steps if name.startswith("steps/") else steps[0]
    return values


def _decode(name: str, feature: Feature, data: bytes, entry: Any) -> np.ndarray | list[Any]:
    """All values of one entry, one per step."""
    if feature.kind == "tensor":
        return numbers(name, feature, data, entry)
    if feature.kind == "text":
        return [data[a:b].decode() for a, b in byte_strings(name, entry)]
    images = [decode_image(data[a:b]) for a, b in byte_strings(name, entry)]
    return np.stack(images) if len({image.shape for image in images}) == 1 else images


def run_script(name: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run one of the repository's scripts as a user does."""
    command = [sys.executable, str(REPOSITORY / "scripts" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet_environment())
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def quiet_environment() -> dict[str, str]:
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
