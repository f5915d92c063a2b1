"""Small made-up LIBERO-like datasets for tests, benchmarks and the demo (no simulator, no TensorFlow)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prismo.data.images import encode_jpeg
from prismo.data.rlds_writer import EpisodeEntries, libero_episode, libero_features, write_rlds

_OBJECTS = ("black bowl", "cream cheese", "wine bottle", "moka pot", "tomato sauce")


def write_synthetic_libero(
    path: str | Path,
    name: str = "libero_spatial_no_noops",
    episodes: int = 4,
    steps: int = 20,
    seed: int = 0,
    image_size: int = 256,
    shard_bytes: int = 128 << 20,
) -> Path:
    """Write `{path}/{name}/1.0.0` with the features of the published LIBERO datasets; returns that folder.

    A gripper moves over a textured table, and action, state and pictures agree with each other, so that a model can
    fit the data. The same arguments write the same bytes.

    Args:
        steps: mean episode length T; lengths vary by up to a quarter.
        image_size: height and width of both cameras.
    """
    folder = Path(path) / name / "1.0.0"
    generated = _episodes(episodes, steps, seed, image_size)
    write_rlds(folder, name, libero_features(image_size, image_size), generated, shard_bytes=shard_bytes)
    return folder


def _episodes(count: int, steps: int, seed: int, size: int) -> Iterator[EpisodeEntries]:
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        length = int(steps + rng.integers(-(steps // 4), steps // 4 + 1))
        thing = int(rng.integers(len(_OBJECTS)))
        goal = rng.uniform(0.2, 0.8, 2)
        action, state = _motion(rng, goal, length)
        table = _texture(rng, size)
        views = [[encode_jpeg(_draw(table, s, goal, thing, wrist)) for s in state] for wrist in (False, True)]
        joints = np.cumsum(rng.normal(0, 0.02, (length, 7)), axis=0)
        instruction = f"pick up the {_OBJECTS[thing]} and place it on the plate"
        yield libero_episode(*views, state, joints, action, instruction, f"synthetic/demo_{number}.hdf5")


def _motion(rng: np.random.Generator, goal: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Actions [T, 7] that lead a gripper from a random place to `goal` (0..1 on the table), and the states [T, 8]."""
    path = np.linspace(rng.uniform(0, 1, 2), goal, length + 1)
    height = np.linspace(1.2, 0.95, length + 1)
    closed = np.arange(length) >= length * 2 // 3
    xyz = np.column_stack([path - 0.5, height])
    noise = rng.normal(0, 0.02, (length, 6))
    action = np.column_stack([np.diff(xyz, axis=0) * 20, noise[:, 3:], np.where(closed, 1.0, -1.0)])
    action[:, :3] += noise[:, :3]
    opening = np.where(closed, 0.01, 0.04)
    rotation = np.array([3.1, 0.0, 0.0]) + np.cumsum(noise[:, 3:], axis=0) * 0.05
    return action.clip(-1, 1), np.column_stack([xyz[:-1], rotation, opening, -opening])


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A table uint8 [size, size, 3]: soft shading and grain, which compresses about as well as a rendered scene."""
    y, x = np.mgrid[0:size, 0:size] / size
    base = rng.uniform(90, 170, 3) + 30 * np.sin(6 * (x + rng.uniform() * y))[..., None]
    return (base + rng.normal(0, 3, (size, size, 1))).clip(0, 255).astype(np.uint8)


def _draw(table: np.ndarray, state: np.ndarray, goal: np.ndarray, thing: int, wrist: bool) -> np.ndarray:
    """One camera frame: the table (seen from the moving gripper for the wrist), the object and the gripper on it."""
    size = len(table)
    hand = ((state[:2] + 0.5) * (size - 1)).astype(int)
    target = (goal * (size - 1)).astype(int)
    if wrist:
        shift = size // 2 - hand
        picture = np.roll(table, shift, axis=(0, 1))
        hand, target = hand + shift, target + shift
    else:
        picture = table.copy()
    color = np.array([40 + 40 * thing, 200 - 35 * thing, 60 + 20 * thing], np.uint8)
    for (row, column), radius, paint in ((target, size // 12, color), (hand, size // 20, np.uint8(25))):
        top, left = max(row - radius, 0), max(column - radius, 0)
        picture[top : max(row + radius, 0), left : max(column + radius, 0)] = paint
    return picture
