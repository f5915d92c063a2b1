"""Counter-based random numbers: pure functions of integers, the same on every machine, rank and worker.

The sample order and the augmentation draw from here instead of from a generator, so that nothing has to be stored to
resume a run, and no draw depends on who made the one before it.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def mix(*values: Any) -> np.ndarray:
    """One well-mixed uint64 per element of the (broadcast) integers `values`."""
    result = np.zeros(1, np.uint64)
    for value in values:
        result = _splitmix(result ^ _splitmix(np.atleast_1d(np.asarray(value)).astype(np.uint64)))
    return result


def uniform(keys: np.ndarray) -> np.ndarray:
    """float32 in [0, 1) per key, from its 24 highest bits."""
    return (keys >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Images int64 of `positions` under a pseudo-random permutation of range(size) that `key` selects.

    A Feistel network on the smallest even number of bits that holds `size`; results outside are encrypted again until
    they fall inside (cycle walking; Black and Rogaway 2002). It needs no memory, unlike a shuffled list, which for
    DROID's 27 million frames would take 200 MB in every rank.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    result = np.asarray(positions, np.uint64).copy()
    outside = np.arange(len(result))
    while len(outside):
        result[outside] = _feistel(result[outside], np.uint64(half), key)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _feistel(values: np.ndarray, half: np.uint64, key: int) -> np.ndarray:
    low_bits = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & low_bits
    for turn in range(6):
        left, right = right, left ^ (mix(key, turn, right) & low_bits)
    return left << half | right


def _splitmix(z: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
