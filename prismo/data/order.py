"""The order of training samples as a pure function of (seed, epoch, rank), and the position in it as two integers.

`loader.py` walks through it. All epochs form one endless stream of samples; rank r of W takes every W-th of them, so
ranks never overlap, never run out at different times, and a run may resume with another number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from prismo.data.hashing import mix, permute

_BLOCK = 512  # samples whose order is computed at once


@dataclass(frozen=True)
class Position:
    """A place in the stream: samples of all ranks that were taken so far in `epoch`."""

    epoch: int = 0
    sample: int = 0


@dataclass(frozen=True)
class EpochOrder:
    """Which window comes where in an epoch.

    Attributes:
        counts: windows of every dataset.
        weights: how often each window of a dataset is seen per epoch. With 0.5 an epoch holds half of them, and two
            epochs hold each once; with 2 each comes twice.
        shuffle: False gives the stored order.
    """

    counts: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int = 0
    shuffle: bool = True

    @property
    def shares(self) -> tuple[int, ...]:
        """Samples per epoch of every dataset."""
        return tuple(max(1, round(n * w)) for n, w in zip(self.counts, self.weights, strict=True))

    @property
    def size(self) -> int:
        """Samples per epoch."""
        return sum(self.shares)

    def windows(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Global window index int64 of every position (0 .. size - 1) of an epoch."""
        slots = permute(positions, self.size, int(mix(self.seed, epoch)[0])) if self.shuffle else np.asarray(positions)
        result = np.empty(len(slots), np.int64)
        ends = np.cumsum(self.shares)
        owners = np.searchsorted(ends, slots, side="right")
        for dataset in np.unique(owners):
            mine = owners == dataset
            share, count = self.shares[dataset], self.counts[dataset]
            # The epochs of one dataset read on through an endless row of permutations of its windows.
            turns = epoch * share + slots[mine] - (ends[dataset] - share)
            result[mine] = sum(self.counts[:dataset]) + self._shuffled(turns, count, int(dataset))
        return result

    def _shuffled(self, turns: np.ndarray, count: int, dataset: int) -> np.ndarray:
        windows = turns % count
        if not self.shuffle or self.shares[dataset] == count:  # the epoch's own permutation already shuffles these
            return windows
        for number in np.unique(turns // count):
            mine = turns // count == number
            windows[mine] = permute(windows[mine], count, int(mix(self.seed, dataset, number)[0]))
        return windows

    def after(self, start: Position, samples: int) -> Position:
        """The position `samples` (of all ranks) behind `start`."""
        epoch, sample = divmod(start.epoch * self.size + start.sample + samples, self.size)
        return Position(epoch, sample)


@dataclass(frozen=True)
class RankSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, global window index) for one rank, from `start` on; endless, or up to the end of `epochs`."""

    order: EpochOrder
    batch_size: int
    rank: int = 0
    world_size: int = 1
    start: Position = Position()
    epochs: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not below the world size {self.world_size}")

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.order.size
        at = self.start.epoch * size + self.start.sample
        end = None if self.epochs is None else self.epochs * size
        batches = max(1, _BLOCK // self.batch_size)
        while end is None or at < end:
            stop = at + batches * self.batch_size * self.world_size
            block = np.arange(at + self.rank, stop if end is None else min(stop, end), self.world_size)
            epochs = block // size
            keys: list[tuple[int, int]] = []
            for epoch in np.unique(epochs).tolist():
                windows = self.order.windows(epoch, block[epochs == epoch] - epoch * size)
                keys += [(epoch, window) for window in windows.tolist()]
            for first in range(0, len(keys), self.batch_size):
                yield keys[first : first + self.batch_size]
            at = stop
