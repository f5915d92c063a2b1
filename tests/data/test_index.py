"""The index: damage is noticed and mended, nothing is read as other data, several builders do not hurt each other."""

from __future__ import annotations

import json
import logging
import pickle
import random
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prismo.data import index as index_module
from prismo.data.dataset import open_dataset
from prismo.data.index import open_store
from prismo.data.resolve import resolve
from prismo.data.rlds import EpisodeIndex, PositionedFiles
from prismo.data.statistics import dataset_statistics
from prismo.embodiment import ALOHA
from prismo.util.files import atomic_folder
from tests.data.conftest import made_up_episode, write_episodes

NAME = "libero_spatial_no_noops"


def index_of(root: Path) -> EpisodeIndex:
    entry = resolve(root, NAME)[0]
    return open_store(entry.folder, entry.spec)


def content(index: EpisodeIndex) -> tuple[bytes, bytes, list[str]]:
    rows = [index.rows(number, 0, 10**6).tobytes() for number in range(len(index.episodes))]
    return index.episodes.tobytes(), b"".join(rows), index.instructions


@pytest.fixture
def indexed(synthetic: Path, tmp_path: Path) -> tuple[Path, EpisodeIndex]:
    """Data root with an own copy of the synthetic dataset, and its fresh index."""
    root = tmp_path / "root"
    shutil.copytree(synthetic, root, ignore=shutil.ignore_patterns(".prismo_index"))
    return root, index_of(root)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 4
    elif how == "cut":
        del data[-100:]
    elif how == "swap":  # of equal length: the halves change places
        data = data[len(data) // 2 :] + data[: len(data) // 2]
    elif how == "empty":
        data.clear()
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["flip", "cut", "swap", "empty", "missing"])
@pytest.mark.parametrize("name", ["rows.bin", "rows.crc", "episodes.bin", "index.json"])
def test_a_damaged_index_is_built_again(
    indexed: tuple[Path, EpisodeIndex], name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    root, fresh = indexed
    before = content(fresh)
    if how == "missing":
        (fresh.cache / name).unlink()
    else:
        damage(fresh.cache / name, how)
    caplog.clear()
    assert content(index_of(root)) == before
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert name in caplog.text
    caplog.clear()
    assert content(index_of(root)) == before
    assert not caplog.records, "mended for good"


def test_every_flipped_bit_of_the_text_file_is_noticed(indexed: tuple[Path, EpisodeIndex]) -> None:
    """Also one that changes a letter of an instruction or a digit of a checksum."""
    _, index = indexed
    path = index.cache / "index.json"
    original = path.read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        data = bytearray(original)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(7)
        path.write_bytes(data)
        found = index_module._load(index.info, index.spec, index.cache)
        assert found is None or found.instructions == index.instructions, bytes(data)


def test_damage_while_reading_is_an_error(indexed: tuple[Path, EpisodeIndex]) -> None:
    """A large index is not read through when it is opened; no row is used unchecked."""
    _, index = indexed
    before = content(index)
    damage(index.cache / "rows.bin", "flip")
    with pytest.raises(ValueError, match=r"rows.bin is damaged at byte \d+.*delete the folder"):
        content(index)
    with pytest.raises(ValueError, match="delete the folder"):
        index.column("action")
    damage(index.cache / "rows.bin", "flip")
    assert content(index) == before


def test_a_large_index_opens_without_reading_its_rows(
    indexed: tuple[Path, EpisodeIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, index = indexed
    monkeypatch.setattr(index_module, "_CHECKED_AT_OPEN", 1000)
    damage(index.cache / "rows.bin", "flip")
    opened = index_of(root)
    with pytest.raises(ValueError, match=r"rows\.bin is damaged"):
        opened.column("proprio")
    damage(index.cache / "rows.bin", "cut")
    assert content(index_of(root)) == content(index_of(root)), "its size is checked"


def test_damaged_statistics_are_computed_again(
    indexed: tuple[Path, EpisodeIndex], caplog: pytest.LogCaptureFixture
) -> None:
    _, index = indexed
    before = dataset_statistics(index)
    path = index.cache / "statistics.json"
    original = path.read_text()
    digit = original.index("0.") + 3
    for damaged in (original[:50], original[:digit] + "77" + original[digit + 2 :], "{}", "[1]", ""):
        path.write_text(damaged)
        caplog.clear()
        again = dataset_statistics(index)
        np.testing.assert_array_equal(again.action.q99, before.action.q99)
        np.testing.assert_array_equal(again.proprio.mean, before.proprio.mean)
        assert "statistics.json" in caplog.text
        assert path.read_text() == original


def test_the_first_builder_wins(indexed: tuple[Path, EpisodeIndex], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without file locks two nodes build at once; the second must not take the files from under the first's readers."""
    root, index = indexed
    opened = index.rows(0, 0, 8)
    inode = (index.cache / "rows.bin").stat().st_ino
    aside = index.cache.with_name("aside")
    index.cache.rename(aside)
    build = index_module._build

    def slow_build(info: object, spec: object, folder: Path) -> None:
        build(info, spec, folder)  # type: ignore[arg-type]
        aside.rename(index.cache)  # the other node is done first

    monkeypatch.setattr(index_module, "_build", slow_build)
    second = index_of(root)
    assert (second.cache / "rows.bin").stat().st_ino == inode, "the other node's index stays"
    np.testing.assert_array_equal(second.rows(0, 0, 8), opened)
    assert len([p for p in index.cache.parent.iterdir() if p.is_dir()]) == 1, "nothing is left behind"


def test_a_folder_may_be_written_only_once(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "x", keep_existing=True) as temporary:
            (temporary / "file").write_text(text)
    assert (tmp_path / "x" / "file").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_an_index_that_cannot_be_replaced_is_named(
    indexed: tuple[Path, EpisodeIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, index = indexed
    damage(index.cache / "rows.bin", "flip")

    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(OSError, match=f"{index.cache.name} is damaged and cannot be replaced.*delete it"):
        index_of(root)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("entry", "dim", "name"),
    [("steps/action", 2, "action"), ("steps/action", 6, "action"), ("steps/observation/state", 7, "proprio")],
)
def test_a_number_that_is_not_finite_is_named(tmp_path: Path, entry: str, dim: int, name: str, value: float) -> None:
    """It ended in statistics without quantiles, and training stopped at its first update and blamed another sample."""
    episodes = [made_up_episode(number) for number in range(3)]
    episodes[1][entry][5, dim] = value
    write_episodes(tmp_path, episodes)
    found = rf"00000-of-00001: episode 1 \(at byte \d+\): step 5: {name} number {dim} is {value}; mend or leave"
    with pytest.raises(ValueError, match=found):
        index_of(tmp_path)
    assert not list(tmp_path.rglob("index.json"))


def test_numbers_that_nobody_uses_may_be_anything(tmp_path: Path) -> None:
    episode = made_up_episode(0)
    episode["steps/observation/joint_state"][:] = np.nan
    write_episodes(tmp_path, [episode])
    assert index_of(tmp_path).num_rows == 12


def test_a_shard_that_is_the_copy_of_another_is_named(tmp_path: Path) -> None:
    """Of the same number of episodes and with right checksums: some episodes twice, others not at all."""
    folder = write_episodes(tmp_path, [made_up_episode(number) for number in range(3)], shard_bytes=1)
    first, _, third = sorted(folder.glob("*.tfrecord*"))
    shutil.copy(first, third)
    with pytest.raises(ValueError, match=f"{third.name} holds the very episodes of .*{first.name}.*fetch both again"):
        index_of(tmp_path)


def test_another_robot_gets_another_index(synthetic: Path) -> None:
    """Sizes are part of the identity: a cached index of another layout was read as this one's."""
    entry = resolve(synthetic, NAME)[0]
    first = open_store(entry.folder, entry.spec)
    chunked = replace(entry.spec, embodiment=replace(entry.spec.embodiment, chunk=4))
    assert open_store(entry.folder, chunked).cache == first.cache
    with pytest.raises(ValueError, match=r"action \(action\) has 7 numbers, aloha has 14"):
        open_dataset(synthetic, NAME, ALOHA)


def test_files_are_read_from_many_threads(tmp_path: Path) -> None:
    """More files than are kept open: no thread gets another file's bytes or a closed file."""
    paths = []
    for number in range(150):
        paths.append(tmp_path / f"{number}")
        paths[-1].write_bytes(bytes([number]) * 64)
    files = PositionedFiles()
    wrong: list[object] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(4000):
            number = rng.randrange(len(paths))
            try:
                if files.read(paths[number], 8, 16) != bytes([number]) * 16:
                    wrong.append(number)
            except (OSError, ValueError) as error:
                wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pickle.loads(pickle.dumps(files)).read(paths[3], 0, 1) == b"\x03"


def test_the_text_file_says_what_it_describes(indexed: tuple[Path, EpisodeIndex]) -> None:
    stored = json.loads((indexed[1].cache / "index.json").read_text())
    assert stored["content"]["dataset"] == NAME
    assert stored["content"]["spec"]["action_dim"] == 7
