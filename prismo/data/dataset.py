"""Training windows of one or several datasets (`open_dataset`): a frame, its proprio and the next K actions.

The trainer opens a dataset, `loader.py` turns it into batches. Samples hold images as they are stored; resizing and
augmenting happen for whole batches on the training device (`images.prepare_images`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from prismo.data.hashing import mix, uniform
from prismo.data.images import resize_lanczos3
from prismo.data.normalize import DatasetStats, load_statistics, normalize, resolve_unnorm_key
from prismo.data.resolve import resolve
from prismo.data.statistics import dataset_statistics
from prismo.data.store import EpisodeStore, open_store
from prismo.embodiment import Embodiment

SplitName = Literal["train", "val"]


@dataclass(frozen=True, eq=False)
class Sample:
    """One training window. V views, K actions of the chunk, A action and P proprio numbers.

    Attributes:
        images: uint8 [V, 3, H, W], primary camera first (channels-last in memory, as decoded).
        actions: float32 [K, A], normalised; behind the episode's end the last action is repeated.
        action_mask: bool [K], False behind the episode's end.
        proprio: float32 [P], normalised.
        instruction: as stored.
        dataset_name: key of its statistics.
        index: global window index.
        episode, step: number of the stored episode in its dataset, and of the frame in the episode.
    """

    images: Tensor
    actions: Tensor
    action_mask: Tensor
    proprio: Tensor
    instruction: str
    dataset_name: str
    index: int
    episode: int
    step: int


@dataclass(frozen=True, eq=False)
class Source:
    """One dataset of a mixture.

    Attributes:
        store: its episodes.
        statistics: for normalisation.
        weight: how often each window is seen per epoch.
        episodes: int64 [E], the episodes of this split that give at least one window.
        ends: int64 [E], running count of their windows.
    """

    store: EpisodeStore
    statistics: DatasetStats
    weight: float
    episodes: np.ndarray
    ends: np.ndarray

    @property
    def name(self) -> str:
        return self.store.spec.name

    @property
    def num_windows(self) -> int:
        return int(self.ends[-1])


@dataclass(eq=False)
class WindowDataset(Dataset[Sample]):
    """Map-style dataset over the windows of all sources, in stored order; build it with `open_dataset`."""

    sources: tuple[Source, ...]
    embodiment: Embodiment
    num_images: int
    image_size: tuple[int, int]
    resize: bool

    def __post_init__(self) -> None:
        self._ends = np.cumsum([source.num_windows for source in self.sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def statistics(self) -> dict[str, DatasetStats]:
        """Statistics by dataset name: the content of dataset_statistics.json."""
        return {source.name: source.statistics for source in self.sources}

    @property
    def pixel_shape(self) -> tuple[int, int, int, int]:
        """(V, H, W, 3): the pixels of one sample as they are decoded."""
        return (self.num_images, *self.image_size, 3)

    def locate(self, index: int) -> tuple[Source, int, int]:
        """(source, episode, step) of a global window index."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        source = self.sources[number]
        local = index - (int(self._ends[number - 1]) if number else 0)
        place = int(np.searchsorted(source.ends, local, side="right"))
        return source, int(source.episodes[place]), local - (int(source.ends[place - 1]) if place else 0)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index, np.empty(self.pixel_shape, np.uint8))

    def sample(self, index: int, pixels: np.ndarray) -> Sample:
        """The window `index`, decoded into `pixels` uint8 [V, H, W, 3], of which `Sample.images` becomes a view."""
        source, episode, step = self.locate(index)
        robot, statistics = self.embodiment, source.statistics
        rows = source.store.rows(episode, step, step + robot.chunk)
        present = np.arange(robot.chunk) < len(rows)
        actions = rows["action"][np.minimum(np.arange(robot.chunk), len(rows) - 1)]
        for view in range(self.num_images):
            self._decode(source, episode, rows[0], view, pixels[view])
        return Sample(
            images=torch.from_numpy(pixels).permute(0, 3, 1, 2),
            actions=torch.from_numpy(normalize(actions, statistics.action, robot.normalization)),
            action_mask=torch.from_numpy(present),
            proprio=torch.from_numpy(normalize(rows["proprio"][0], statistics.of_proprio(), robot.normalization)),
            instruction=source.store.instructions[rows["instruction"][0]],
            dataset_name=source.name,
            index=index,
            episode=episode,
            step=step,
        )

    def _decode(self, source: Source, episode: int, row: np.void, camera: int, out: np.ndarray) -> None:
        if not self.resize:
            source.store.image(episode, row, camera, out)
            return
        stored = torch.from_numpy(source.store.image(episode, row, camera)).permute(2, 0, 1)
        out[...] = resize_lanczos3(stored, self.image_size, exact=False).permute(1, 2, 0).numpy()


def open_dataset(
    data_root: str | Path,
    name: str | Path,
    embodiment: Embodiment | None = None,
    *,
    num_images: int | None = None,
    chunk: int | None = None,
    split: SplitName = "train",
    val_fraction: float = 0.0,
    use_tail: bool = False,
    statistics: Mapping[str, DatasetStats] | str | Path | None = None,
    size: int = 224,
) -> WindowDataset:
    """Open a dataset or mixture for training. The first call builds an index and computes the statistics.

    Args:
        data_root: folder of the dataset folders, or one dataset's own folder.
        name: known dataset or mixture, or a YAML file (data/README.md).
        embodiment: replaces the robot constants of the spec.
        num_images: cameras per sample, primary first; None takes all.
        chunk: actions per window; None takes the embodiment's.
        split: "val" is the dataset's own split of that name, or the episodes that `val_fraction` sets apart.
        val_fraction: share of training episodes kept for validation. Which ones depends only on their content.
        use_tail: also give windows that start in the last K - 1 frames; their missing actions are masked. The original
            never trains on those frames: T - (K - 1) windows per episode of T steps.
        statistics: use these (or this file) instead of computing them.
        size: where cameras or datasets differ in image size, samples are resized to this in the workers, by the same
            filter as `prepare_images`; where all agree, samples keep the stored size.

    Raises:
        ValueError, FileNotFoundError: unknown name, damaged file, unfitting robots; what to do is in the message.
    """
    entries = resolve(data_root, name)
    if isinstance(statistics, (str, Path)):
        statistics = load_statistics(statistics)
    sources = []
    for entry in entries:
        spec = entry.spec if embodiment is None else replace(entry.spec, embodiment=embodiment)
        store = open_store(entry.folder, spec)
        length = chunk or spec.embodiment.chunk
        episodes, ends = _windows(store, split, val_fraction, length, use_tail)
        sources.append(Source(store, _statistics(store, statistics), entry.weight, episodes, ends))
    views = _common_views(sources, num_images)
    robot = _common_robot(sources, chunk, views)
    sizes = {source.store.image_size(camera) for source in sources for camera in range(views)}
    stored = sizes.pop() if len(sizes) == 1 else None
    return WindowDataset(tuple(sources), robot, views, stored or (size, size), resize=stored is None)


def _statistics(store: EpisodeStore, given: Mapping[str, DatasetStats] | None) -> DatasetStats:
    if given is None:
        return dataset_statistics(store)
    robot = store.spec.embodiment
    found = given[resolve_unnorm_key(given, store.spec.name, robot.normalization)]
    dims = (found.action.dim, found.proprio.dim if found.proprio else None)
    if dims != (robot.action_dim, robot.proprio_dim):
        raise ValueError(
            f"the statistics given for {store.spec.name} have (action, proprio) sizes {dims}, the robot {robot.name!r} "
            f"has {(robot.action_dim, robot.proprio_dim)}; leave them out to compute them from the data"
        )
    return found


def _windows(
    store: EpisodeStore, split: SplitName, val_fraction: float, chunk: int, use_tail: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Episodes of a split with an instruction and at least one window, and the running count of their windows."""
    table, stored = store.episodes, store.splits
    own = split if split in stored and (split == "train" or val_fraction == 0) else "train"
    if own not in stored:
        raise ValueError(f"{store.root} has no split {own!r}, only {', '.join(stored)}")
    if split == "val" and own == "train" and val_fraction <= 0:
        raise ValueError(f"{store.spec.name} has no 'val' split; keep episodes back with a val_fraction such as 0.05")
    counts = np.maximum(table["steps"].astype(np.int64) - (0 if use_tail else chunk - 1), 0)
    chosen = (table["split"] == stored.index(own)) & table["named"] & (counts > 0)
    if own == "train" and val_fraction > 0:
        chosen &= held_out(table["crc"], val_fraction) == (split == "val")
    episodes = np.flatnonzero(chosen)
    if not len(episodes):
        raise ValueError(
            f"{store.root}: no episode of split {split!r} (val_fraction {val_fraction}) has an instruction and at "
            f"least {1 if use_tail else chunk} steps"
        )
    return episodes, np.cumsum(counts[episodes])


def held_out(crc: np.ndarray, fraction: float) -> np.ndarray:
    """bool [E]: episodes kept for validation, chosen by the checksum of their content.

    So the choice is the same on every machine and survives another order or number of shards.
    """
    return uniform(mix(0x76616C, crc.astype(np.int64))) < fraction


def _common_robot(sources: Sequence[Source], chunk: int | None, views: int) -> Embodiment:
    """The first one's, without names of cameras and states that are not all the same."""
    robots = [source.store.spec.embodiment for source in sources]
    robots = robots if chunk is None else [replace(robot, chunk=chunk) for robot in robots]
    sizes = [(robot.action_dim, robot.proprio_dim, robot.chunk) for robot in robots]
    for source, found in zip(sources, sizes, strict=True):
        if found != sizes[0]:
            raise ValueError(
                f"{sources[0].name} and {source.name} cannot be mixed: (action, proprio, chunk) sizes {sizes[0]} and "
                f"{found}. A common `chunk` can be given"
            )
    names = {(robot.cameras[:views], robot.states) for robot in robots}
    cameras, states = names.pop() if len(names) == 1 else ((), ())
    return replace(robots[0], cameras=cameras, states=states)


def _common_views(sources: Sequence[Source], wanted: int | None) -> int:
    available = {source.name: len(source.store.spec.cameras) for source in sources}
    fewest = min(available, key=lambda name: available[name])
    if wanted is None:
        return available[fewest]
    if not 1 <= wanted <= available[fewest]:
        raise ValueError(f"{wanted} images per sample asked for, but {fewest} has {available[fewest]} cameras")
    return wanted
