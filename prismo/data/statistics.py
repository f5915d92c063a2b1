"""Statistics of a dataset's actions and proprio, computed once from its index (`dataset.py`, compute_norm_stats.py)."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prismo.data.index_files import read_sealed, write_sealed
from prismo.data.normalize import DatasetStats, FieldStats, parse_statistics, statistics_to_json
from prismo.data.rlds import EpisodeIndex
from prismo.util.locks import exclusive
from prismo.util.schema import JsonObject

logger = logging.getLogger(__name__)

_BYTES_AT_ONCE = 256 << 20


def dataset_statistics(index: EpisodeIndex) -> DatasetStats:
    """Statistics over every step of every episode of all splits, in physical units and the spec's convention.

    Kept as `statistics.json` in the index folder, with a checksum; of several processes one computes them.
    """
    path = index.path / "statistics.json"
    if (found := _stored(path)) is not None:
        return found
    if not os.access(index.path, os.W_OK):
        return compute_statistics(index)
    with exclusive(index.path / "statistics.lock"):
        if (found := _stored(path)) is not None:
            return found
        computed = compute_statistics(index)
        write_sealed(path, statistics_to_json({index.spec.name: computed}))
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


def compute_statistics(index: EpisodeIndex) -> DatasetStats:
    """Mean, population deviation, extremes and linear 1 % / 99 % quantiles of every dimension."""
    robot = index.spec.embodiment
    with tqdm(total=robot.action_dim + robot.proprio_dim, unit="dim", desc=f"statistics {index.spec.name}") as bar:
        action = _field(index, "action", robot.action_dim, index.spec.action_mask(), bar)
        proprio = _field(index, "proprio", robot.proprio_dim, None, bar)
    return DatasetStats(action, proprio, index.num_rows, len(index.episodes))


def _field(index: EpisodeIndex, name: str, dims: int, mask: np.ndarray | None, bar: tqdm) -> FieldStats:
    # Quantiles need whole columns; a few at a time keep DROID's 27 million rows from filling the memory.
    width = max(1, _BYTES_AT_ONCE // max(1, 8 * index.num_rows))
    parts = []
    for first in range(0, dims, width):
        column = index.column(name, slice(first, min(first + width, dims)))
        low, high = np.quantile(column, (0.01, 0.99), axis=0)
        parts.append((column.mean(0), column.std(0), column.min(0), column.max(0), low, high))
        bar.update(column.shape[1])
    mean, std, smallest, largest, low, high = (np.concatenate(values) for values in zip(*parts, strict=True))
    return FieldStats(mean, std, smallest, largest, low, high, mask)
