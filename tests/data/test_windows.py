"""Which windows a dataset has, what a sample holds, the statistics, and the split into training and validation."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prismo.data.dataset import WindowDataset, _windows, held_out, open_dataset
from prismo.data.normalize import DatasetStats, dump_statistics, normalize
from prismo.data.rlds import EPISODE, EpisodeIndex
from prismo.data.synthetic import write_synthetic_libero
from tests.data.conftest import quiet_environment, read_episode
from tests.data.tensorflow_lengths import LENGTHS, UNNAMED

NAME = "libero_spatial_no_noops"


@pytest.fixture(scope="module")
def written(tensorflow: Path) -> WindowDataset:
    """The dataset that tensorflow-datasets wrote: nine episodes, one too short for a chunk, one without a text."""
    return open_dataset(tensorflow / "data", "libero_10_no_noops")


def stored_lengths(dataset: WindowDataset) -> list[int]:
    index = dataset.sources[0].store
    return index.episodes["steps"][index.episodes["split"] == 0].tolist()


def test_every_episode_of_t_steps_gives_t_minus_7_windows(written: WindowDataset) -> None:
    assert sorted(stored_lengths(written)) == sorted(LENGTHS)
    named = [length for number, length in enumerate(LENGTHS) if number != UNNAMED]
    assert len(written) == sum(max(0, length - 7) for length in named)
    seen = [(written.locate(i)[1], written.locate(i)[2]) for i in range(len(written))]
    assert len(set(seen)) == len(seen)
    assert all(step <= written.sources[0].store.episodes["steps"][episode] - 8 for episode, step in seen)


def test_the_tail_gives_the_last_seven_frames_with_a_mask(tensorflow: Path, written: WindowDataset) -> None:
    tail = open_dataset(tensorflow / "data", "libero_10_no_noops", use_tail=True)
    assert len(tail) == sum(length for number, length in enumerate(LENGTHS) if number != UNNAMED)
    assert written[0].action_mask.all()
    for i in range(len(tail)):
        sample = tail[i]
        left = int(tail.sources[0].store.episodes["steps"][sample.episode]) - sample.step
        assert sample.action_mask.tolist() == [k < left for k in range(8)]
        assert torch.equal(sample.actions[left:], sample.actions[left - 1 :][:1].expand(max(0, 8 - left), 7))


def test_the_published_size_of_libero_spatial(small: WindowDataset) -> None:
    """432 episodes with 52,970 steps give 49,946 windows (whatever the lengths, if all have at least 8 steps)."""
    rng = np.random.default_rng(0)
    lengths = rng.multinomial(52_970 - 432 * 60, np.ones(432) / 432) + 60
    table = np.zeros(432, EPISODE)
    table["steps"], table["named"] = lengths, True
    source = small.sources[0].store
    index = EpisodeIndex(
        replace(source.info, splits=source.info.splits[:1]), source.spec, Path(), table, ["x"], np.zeros(0)
    )
    assert int(_windows(index, "train", 0.0, 8, use_tail=False)[1][-1]) == 49_946
    assert int(_windows(index, "train", 0.0, 8, use_tail=True)[1][-1]) == 52_970


def test_a_sample_holds_the_frame_and_the_next_actions(written: WindowDataset) -> None:
    index, stats = written.sources[0].store, written.sources[0].statistics
    for i in range(0, len(written), 7):
        sample = written[i]
        episode = read_episode(index, sample.episode)
        steps = slice(sample.step, sample.step + 8)
        actions = episode["steps/action"][steps].copy()
        actions[:, 6] = 1 - np.clip(actions[:, 6], 0, 1)
        np.testing.assert_array_equal(sample.actions, normalize(actions, stats.action, "bounds_q99"))
        np.testing.assert_array_equal(
            sample.proprio, normalize(episode["steps/observation/state"][sample.step], stats.proprio, "bounds_q99")
        )
        assert sample.images.shape == (2, 3, 64, 64)
        for view, name in enumerate(("image", "wrist_image")):
            np.testing.assert_array_equal(
                sample.images[view].permute(1, 2, 0), episode[f"steps/observation/{name}"][sample.step]
            )
        assert sample.instruction == episode["steps/language_instruction"][sample.step]
        assert (sample.actions.dtype, sample.proprio.dtype) == (torch.float32, torch.float32)
        assert (sample.index, sample.dataset_name) == (i, "libero_10_no_noops")


def test_one_camera_and_another_chunk(synthetic: Path) -> None:
    dataset = open_dataset(synthetic, NAME, num_images=1, chunk=4)
    assert dataset[0].images.shape == (1, 3, 64, 64)
    assert dataset[0].actions.shape == (4, 7)
    assert len(dataset) == sum(length - 3 for length in stored_lengths(dataset))
    with pytest.raises(ValueError, match=r"3 images per sample asked for, but .* has 2 cameras"):
        open_dataset(synthetic, NAME, num_images=3)
    with pytest.raises(ValueError, match=r"no episode of split 'train'.*at least 500 steps"):
        open_dataset(synthetic, NAME, chunk=500)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


# --- statistics -------------------------------------------------------------------------------------------------------


def test_statistics_equal_numpy_on_the_raw_arrays(written: WindowDataset, tensorflow: Path) -> None:
    """Over every step of all splits, also of episodes that give no window."""
    raw = np.load(tensorflow / "written.npz")
    actions = np.concatenate([raw[key] for key in raw.files if key.endswith("/steps/action")]).astype(np.float64)
    states = np.concatenate([raw[key] for key in raw.files if key.endswith("/observation/state")]).astype(np.float64)
    actions[:, 6] = 1 - np.clip(actions[:, 6], 0, 1)
    stats = written.statistics["libero_10_no_noops"]
    assert stats.num_transitions == len(actions)
    assert stats.num_trajectories == len([key for key in raw.files if key.endswith("file_path")])
    for ours, values in ((stats.action, actions), (stats.proprio, states)):
        np.testing.assert_allclose(ours.mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(ours.std, values.std(0), rtol=1e-12)
        np.testing.assert_array_equal(ours.min, values.min(0))
        np.testing.assert_array_equal(ours.max, values.max(0))
        np.testing.assert_allclose(ours.q01, np.quantile(values, 0.01, axis=0), rtol=1e-12)
        np.testing.assert_allclose(ours.q99, np.quantile(values, 0.99, axis=0), rtol=1e-12)
    assert stats.action.mask.tolist() == [True] * 6 + [False]
    assert stats.proprio.mask is None


def test_statistics_do_not_depend_on_how_much_is_read_at_once(
    small: WindowDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prismo.data import statistics  # noqa: PLC0415

    monkeypatch.setattr(statistics, "_BYTES_AT_ONCE", 1)  # one dimension at a time, as for DROID
    again = statistics.compute_statistics(small.sources[0].store)
    np.testing.assert_allclose(again.action.q01, small.sources[0].statistics.action.q01, rtol=1e-12)
    np.testing.assert_allclose(again.proprio.std, small.sources[0].statistics.proprio.std, rtol=1e-12)


def test_published_statistics_replace_computed_ones(synthetic: Path, small: WindowDataset, tmp_path: Path) -> None:
    stats = small.sources[0].statistics
    wide = replace(stats.action, q01=stats.action.q01 - 1, q99=stats.action.q99 + 1)
    published = DatasetStats(wide, stats.proprio, 1, 1)
    path = tmp_path / "dataset_statistics.json"
    dump_statistics({"libero_spatial_no_noops": published, "other": published}, path)
    dataset = open_dataset(synthetic, NAME, statistics=path)
    assert dataset.statistics[NAME].num_transitions == 1
    assert dataset[3].actions[:, :6].abs().max() < small[3].actions[:, :6].abs().max()
    dump_statistics({NAME: DatasetStats(stats.proprio, stats.proprio, 1, 1)}, path)
    with pytest.raises(ValueError, match=r"sizes \(8, 8\), the robot 'libero' has \(7, 8\)"):
        open_dataset(synthetic, NAME, statistics=path)


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    write_synthetic_libero(root, episodes=40, steps=9, image_size=16)
    return root


def episodes_of(dataset: WindowDataset) -> set[int]:
    return {int(crc) for source in dataset.sources for crc in source.store.episodes["crc"][source.episodes]}


def test_train_and_validation_share_no_episode(many: Path) -> None:
    train = open_dataset(many, NAME, val_fraction=0.25)
    val = open_dataset(many, NAME, split="val", val_fraction=0.25)
    assert not episodes_of(train) & episodes_of(val)
    assert episodes_of(train) | episodes_of(val) == episodes_of(open_dataset(many, NAME))
    assert 4 <= len(episodes_of(val)) <= 16
    assert train.statistics[NAME].num_transitions == val.statistics[NAME].num_transitions, "over both splits"


def test_the_split_depends_on_content_only(many: Path, tmp_path: Path) -> None:
    """Another machine, process, shard size or folder keeps it."""
    write_synthetic_libero(tmp_path / "elsewhere", episodes=40, steps=9, image_size=16, shard_bytes=20_000)
    here = episodes_of(open_dataset(many, NAME, split="val", val_fraction=0.25))
    assert episodes_of(open_dataset(tmp_path / "elsewhere", NAME, split="val", val_fraction=0.25)) == here
    code = "import numpy as np; from prismo.data.dataset import held_out; print(held_out(np.arange(2**16), 0.1).sum())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=quiet_environment() | {"PYTHONHASHSEED": "5"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) == held_out(np.arange(2**16), 0.1).sum()
    assert abs(int(done.stdout) - 6553.6) < 250
    assert (held_out(np.arange(1000), 0.1) <= held_out(np.arange(1000), 0.3)).all(), "a larger share only adds episodes"


def test_an_own_val_split_is_used(tensorflow: Path, synthetic: Path) -> None:
    val = open_dataset(tensorflow / "data", "libero_10_no_noops", split="val")
    assert set(val.sources[0].store.episodes["split"][val.sources[0].episodes]) == {1}
    with pytest.raises(ValueError, match="no 'val' split; keep episodes back with a val_fraction"):
        open_dataset(synthetic, NAME, split="val")
