"""Folders written by tensorflow-datasets read back equal; damage is found and named; the index is built once."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prismo.data.dataset import open_dataset
from prismo.data.index import open_store
from prismo.data.resolve import resolve
from prismo.data.rlds import EpisodeIndex
from prismo.data.rlds_writer import libero_features, write_rlds
from prismo.data.specs import Feature
from prismo.data.synthetic import write_synthetic_libero
from prismo.data.tfrecord import crc32c, masked
from tests.data.conftest import quiet_environment, read_episode

NAME = "libero_spatial_no_noops"


def index_of(root: Path, name: str = NAME) -> EpisodeIndex:
    entry = resolve(root, name)[0]
    return open_store(entry.folder, entry.spec)


@pytest.fixture
def copy(synthetic: Path, tmp_path: Path) -> Path:
    """Data root with an own copy of the synthetic dataset, without its index."""
    root = tmp_path / "root"
    shutil.copytree(synthetic, root, ignore=shutil.ignore_patterns(".prismo_index"))
    return root


def shard(root: Path, number: int = 1) -> Path:
    return sorted((root / NAME / "1.0.0").glob("*.tfrecord*"))[number]


# --- equality ---------------------------------------------------------------------------------------------------------


def test_episodes_equal_tfds(tensorflow: Path) -> None:
    """Every value of every step: JPEG pixels as TensorFlow decodes them, PNG, numbers of all kinds, unicode texts."""
    index = index_of(tensorflow / "data", "libero_10_no_noops")
    expected = np.load(tensorflow / "written.npz")
    assert index.info.name == "liber_o10"
    splits = [split.name for split in index.info.splits]
    compared = set()
    for number, entry in enumerate(index.episodes):
        split = splits[entry["split"]]
        first = int(np.argmax(index.episodes["split"] == entry["split"]))
        for name, value in read_episode(index, number).items():
            key = f"{split}/{number - first}/{name}"
            if key in expected:
                compared.add(key)
                assert_equal(value, expected[key])
            else:  # images of different sizes are stored one by one
                for t, image in enumerate(value):
                    compared.add(f"{key}/{t}")
                    np.testing.assert_array_equal(image, expected[f"{key}/{t}"])
    assert compared == set(expected.files)


def assert_equal(ours: object, theirs: np.ndarray) -> None:
    if isinstance(ours, str):
        assert ours == theirs.item().decode()
    elif theirs.dtype.kind in "SO":
        assert ours == [text.decode() for text in theirs.tolist()]
    else:
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_random_access_equals_the_episode(tensorflow: Path) -> None:
    index = index_of(tensorflow / "data", "libero_10_no_noops")
    assert len(index.info.splits[0].files) == 4
    for number in (0, 4, 8):
        episode = read_episode(index, number)
        rows = index.rows(number, 0, 10**6)
        assert len(rows) == index.episodes["steps"][number]
        for t in range(len(rows)):
            for camera, name in enumerate(("image", "wrist_image")):
                np.testing.assert_array_equal(
                    index.image(number, rows[t], camera), episode[f"steps/observation/{name}"][t]
                )
        np.testing.assert_array_equal(rows["proprio"], episode["steps/observation/state"])
        np.testing.assert_array_equal(rows["action"][:, :6], episode["steps/action"][:, :6])
        np.testing.assert_array_equal(rows["action"][:, 6], 1 - np.clip(episode["steps/action"][:, 6], 0, 1))
        assert [index.instructions[i] for i in rows["instruction"]] == episode["steps/language_instruction"]


def test_png_cameras_of_another_size_are_resized_only_when_they_differ(tensorflow: Path, tmp_path: Path) -> None:
    description = tmp_path / "png.yaml"
    lines = [
        "name: png", "path: libero_10_no_noops", "action: action", "proprio: [observation/state]",
        "gripper: open_low", "control_hz: 20",
    ]  # fmt: skip
    description.write_text("\n".join([*lines, "cameras: [observation/png]"]))
    stored = open_dataset(tensorflow / "data", description)
    assert stored[0].images.shape == (1, 3, 48, 80)
    expected = np.load(tensorflow / "written.npz")["train/0/steps/observation/png"][0]
    np.testing.assert_array_equal(stored[0].images[0].permute(1, 2, 0).numpy(), expected)
    description.write_text("\n".join([*lines, "cameras: [observation/png, observation/any_size, observation/image]"]))
    assert open_dataset(tensorflow / "data", description, size=32)[0].images.shape == (3, 3, 32, 32)


def test_an_empty_image_is_black(tmp_path: Path) -> None:
    """Mixed datasets store an empty string where an episode lacks a camera."""
    folder = write_synthetic_libero(tmp_path, episodes=1, steps=9, image_size=16)
    episode = read_episode(index_of(tmp_path), 0)
    values: dict[str, object] = {name: episode[name] for name in libero_features(16, 16)}
    for name, value in values.items():
        if isinstance(value, str):
            values[name] = [value.encode()]
        elif isinstance(value, list):
            values[name] = [text.encode() for text in value]
    empty = [b""] * len(episode["steps/action"])
    values |= {"steps/observation/image": empty, "steps/observation/wrist_image": empty}
    shutil.rmtree(folder)
    write_rlds(folder, NAME, libero_features(16, 16), [values])
    assert open_dataset(tmp_path, NAME)[0].images.sum() == 0


# --- the index --------------------------------------------------------------------------------------------------------


def test_the_index_is_built_once(copy: Path) -> None:
    first = index_of(copy)
    written = (first.cache / "rows.bin").stat().st_mtime_ns
    second = index_of(copy)
    assert second.cache == first.cache
    assert (second.cache / "rows.bin").stat().st_mtime_ns == written
    np.testing.assert_array_equal(second.episodes, first.episodes)
    # A folder that was copied elsewhere keeps its index.
    moved = copy.parent / "moved"
    shutil.copytree(copy, moved)
    assert index_of(moved).cache.name == first.cache.name


def test_other_shards_get_another_index(copy: Path, tmp_path: Path) -> None:
    before = index_of(copy)
    shutil.rmtree(copy / NAME)
    write_synthetic_libero(copy, episodes=6, steps=20, seed=1, image_size=64, shard_bytes=100_000)
    assert index_of(copy).cache.name != before.cache.name


IMPORTS = "import os, sys; from prismo.data.dataset import open_dataset\n"
PROGRAM = f"dataset = open_dataset(sys.argv[1], {NAME!r}); print(len(dataset), dataset.sources[0].store.cache)"


def start_opening(root: Path, **environment: str) -> subprocess.Popen[str]:
    env = quiet_environment() | environment
    return subprocess.Popen(
        [sys.executable, "-c", IMPORTS + PROGRAM, str(root)],
        env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.processes
def test_many_processes_may_start_at_once(copy: Path) -> None:
    processes = [start_opening(copy) for _ in range(4)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), answers
    assert len({out for out, _ in answers}) == 1
    assert sum("index " + NAME in err for _, err in answers) == 1, "exactly one process scans the shards"
    left = sorted(p.name for p in (copy / NAME / "1.0.0" / ".prismo_index").iterdir() if not p.name.endswith(".lock"))
    assert len(left) == 1, f"temporary folders are left: {left}"


def without_root_rights() -> None:
    """A process that root starts from here on obeys the modes of files; for others this changes nothing.

    Another user would prove the same, but could not read a checkout, or a Python, below a folder of mode 0700.
    """
    drop_from_bounding_set, override_modes, read_anything = 24, 1, 2  # linux/prctl.h, linux/capability.h
    for capability in (override_modes, read_anything):
        ctypes.CDLL(None).prctl(drop_from_bounding_set, capability, 0, 0, 0)


def test_a_read_only_dataset_is_indexed_in_the_cache(copy: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = copy / NAME / "1.0.0"
    folder.chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS + PROGRAM, str(copy)],
        env=quiet_environment() | {"XDG_CACHE_HOME": str(cache)},
        capture_output=True, text=True, check=False, preexec_fn=without_root_rights,
    )  # fmt: skip
    folder.chmod(0o755)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(cache / "prismo" / "index") in done.stdout
    assert not (folder / ".prismo_index").exists()


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_truncated_shard_is_named(copy: Path) -> None:
    path = shard(copy)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        ValueError, match=f"{path.name} ends in the middle of the record at byte .*fetch this shard again"
    ):
        index_of(copy)
    assert not list(copy.rglob("index.json")), "nothing half-built is left"


def test_a_shard_cut_between_records_is_named(copy: Path) -> None:
    path = shard(copy, 0)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{path.name} holds 0 episodes, dataset_info.json says 1"):
        index_of(copy)


@pytest.mark.parametrize("position", [3, 9, 50_000])
def test_a_flipped_byte_is_named(copy: Path, position: int) -> None:
    path = shard(copy)
    flip(path, position)
    with pytest.raises(ValueError, match=f"{path.name}: wrong checksum of the record.*byte 0.*fetch this shard again"):
        index_of(copy)


@pytest.mark.parametrize("length", [2**20, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_record_that_claims_to_be_huge_is_named(copy: Path, length: int) -> None:
    """With a right checksum of its length; reading so much ended the process for want of memory."""
    path = shard(copy)
    header = struct.pack("<Q", length)
    path.write_bytes(header + struct.pack("<I", masked(crc32c(header))) + path.read_bytes()[12:])
    with pytest.raises(ValueError, match=rf"{path.name} ends in the middle of the record at byte 0 \({length} bytes\)"):
        index_of(copy)


def test_damage_after_indexing_is_named(copy: Path) -> None:
    index = index_of(copy)
    row = index.rows(1, 3, 4)[0]
    flip(index.shard(1), int(row["offset"][0]) + 200)
    with pytest.raises(ValueError, match=f"{index.shard(1).name}: observation/image at byte .* not what was indexed"):
        index.image(1, row, 0)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_missing_shard_is_named(copy: Path) -> None:
    path = shard(copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks 1 of .* shards, the first is {path.name}"):
        index_of(copy)


def test_a_record_without_a_promised_feature_is_named(copy: Path) -> None:
    folder = copy / NAME / "1.0.0"
    features = libero_features(64, 64)
    episode = read_episode(index_of(copy), 0)
    del features["steps/observation/wrist_image"]
    values = {"steps/observation/image": [b"x"] * len(episode["steps/action"])}
    for name in features:
        value = episode[name]
        if name not in values:
            texts = [value] if isinstance(value, str) else value
            values[name] = [text.encode() for text in texts] if isinstance(texts, list) else value
    promised = (folder / "features.json").read_text()
    shutil.rmtree(folder)
    write_rlds(folder, NAME, features, [values])
    (folder / "features.json").write_text(promised)
    with pytest.raises(ValueError, match=r"episode 0 \(at byte 12\): it has no 'steps/observation/wrist_image'"):
        index_of(copy)


def test_a_folder_without_a_dataset_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is empty or missing.*--data_root_dir"):
        resolve(tmp_path, NAME)
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match="holds: other"):
        resolve(tmp_path, NAME)
    (tmp_path / NAME).mkdir()
    with pytest.raises(FileNotFoundError, match=r"is no dataset: .*holds dataset_info\.json.*prismo data build"):
        resolve(tmp_path, NAME)


def test_other_file_formats_are_refused(copy: Path) -> None:
    info = copy / NAME / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"tfrecord"', '"array_record"'))
    with pytest.raises(ValueError, match="shards are array_record; only tfrecord"):
        resolve(copy, NAME)


def test_the_dataset_folder_itself_and_other_versions_are_found(copy: Path) -> None:
    (copy / NAME / "1.0.0").rename(copy / NAME / "2.1.0")
    root = resolve(copy, NAME)[0].folder
    assert root.name == "2.1.0"
    assert resolve(copy / NAME, NAME)[0].folder == root
    assert resolve(root, NAME)[0].folder == root
    named = resolve(copy, f"{NAME}/2.1.0")[0]
    assert (named.folder, named.spec.name) == (root, f"{NAME}/2.1.0")


def test_the_writer_refuses_episodes_that_do_not_fit(tmp_path: Path) -> None:
    features = {"steps/action": Feature("tensor", (7,), "float32"), "steps/note": Feature("text")}
    with pytest.raises(ValueError, match="missing or unexpected: steps/note"):
        write_rlds(tmp_path / "1.0.0", "x", features, [{"steps/action": np.zeros((3, 7))}])
    with pytest.raises(ValueError, match="different numbers of steps"):
        write_rlds(tmp_path / "1.0.0", "x", features, [{"steps/action": np.zeros((3, 7)), "steps/note": [b"a"]}])
    with pytest.raises(ValueError, match="no episodes"):
        write_rlds(tmp_path / "1.0.0", "x", features, [])
    assert not (tmp_path / "1.0.0").exists()
