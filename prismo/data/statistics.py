"""Statistics of a dataset's actions and proprio, computed once from its store (`dataset.py`)."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prismo.data.index_files import read_sealed, write_sealed
from prismo.data.normalize import DatasetStats, FieldStats, parse_statistics, statistics_to_json
from prismo.data.store import EpisodeStore
from prismo.util.locks import exclusive
from prismo.util.schema import JsonObject

logger = logging.getLogger(__name__)

_BYTES_AT_ONCE = 256 << 20


def dataset_statistics(store: EpisodeStore) -> DatasetStats:
    """Statistics over every step of every episode of all splits, in physical units and the spec's convention.

    Kept as `statistics.json` in its cache folder, with a checksum; of several processes one computes them.
    """
    path = store.cache / "statistics.json"
    if (found := _stored(path)) is not None:
        return found
    if not os.access(store.cache, os.W_OK):
        return compute_statistics(store)
    with exclusive(store.cache / "statistics.lock"):
        if (found := _stored(path)) is not None:
            return found
        computed = compute_statistics(store)
        write_sealed(path, statistics_to_json({store.spec.name: computed}))
    return computed


def _stored(path: Path) -> DatasetStats | None:
    """Statistics that were kept; None, with a warning, if they are damaged, and if there are none."""
    if not path.exists():
        return None
    try:
        return next(iter(parse_statistics(read_sealed(path, JsonObject)).values()))
    except (ValueError, OSError) as error:
        logger.warning("the kept statistics are damaged and are computed again: %s", error)
        return None


def compute_statistics(store: EpisodeStore) -> DatasetStats:
    """Mean, population deviation, extremes and linear 1 % / 99 % quantiles of every dimension."""
    robot = store.spec.embodiment
    with tqdm(total=robot.action_dim + robot.proprio_dim, unit="dim", desc=f"statistics {store.spec.name}") as bar:
        action = _field(store, "action", robot.action_dim, store.spec.action_mask(), bar)
        proprio = _field(store, "proprio", robot.proprio_dim, None, bar)
    return DatasetStats(action, proprio, _frames(store), len(store.episodes))


def _frames(store: EpisodeStore) -> int:
    return int(store.episodes["steps"].sum())


def _field(store: EpisodeStore, name: str, dims: int, mask: np.ndarray | None, bar: tqdm) -> FieldStats:
    # Quantiles need whole columns; a few at a time keep DROID's 27 million rows from filling the memory.
    width = max(1, _BYTES_AT_ONCE // max(1, 8 * _frames(store)))
    parts = []
    for first in range(0, dims, width):
        column = store.column(name, slice(first, min(first + width, dims)))
        low, high = np.quantile(column, (0.01, 0.99), axis=0)
        parts.append((column.mean(0), column.std(0), column.min(0), column.max(0), low, high))
        bar.update(column.shape[1])
    mean, std, smallest, largest, low, high = (np.concatenate(values) for values in zip(*parts, strict=True))
    return FieldStats(mean, std, smallest, largest, low, high, mask)
