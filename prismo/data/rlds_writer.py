"""Writes RLDS folders (TFRecord shards, `features.json`, `dataset_info.json`) that tensorflow-datasets can load.

Called by `prismo data build` and by `synthetic.py`; needs no TensorFlow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prismo.data.features import features_to_json
from prismo.data.specs import Feature
from prismo.data.tfrecord import encode_example, frame_record
from prismo.util.files import atomic_folder, write_json

EpisodeEntries = Mapping[str, "np.ndarray | Sequence[bytes]"]


def libero_features(height: int = 256, width: int = 256) -> dict[str, Feature]:
    """Features of the published `libero_*_no_noops` datasets, by entry name."""
    image = Feature("image", (height, width, 3), "uint8", "jpeg")
    flag = Feature("tensor", (), "bool")
    return {
        "steps/observation/image": image,
        "steps/observation/wrist_image": image,
        "steps/observation/state": Feature("tensor", (8,), "float32"),
        "steps/observation/joint_state": Feature("tensor", (7,), "float32"),
        "steps/action": Feature("tensor", (7,), "float32"),
        "steps/language_instruction": Feature("text"),
        "steps/reward": Feature("tensor", (), "float32"),
        "steps/discount": Feature("tensor", (), "float32"),
        "steps/is_first": flag,
        "steps/is_last": flag,
        "steps/is_terminal": flag,
        "episode_metadata/file_path": Feature("text"),
    }


def libero_episode(
    images: Sequence[bytes],
    wrist_images: Sequence[bytes],
    state: np.ndarray,
    joint_state: np.ndarray,
    action: np.ndarray,
    instruction: str,
    file_path: str,
) -> EpisodeEntries:
    """One LIBERO demonstration as RLDS entries.

    Args:
        images, wrist_images: T upright JPEGs each.
        state: [T, 8] end-effector xyz (m), axis-angle (rad), two finger positions (m).
        joint_state: [T, 7] rad.
        action: [T, 7] as the simulator takes it (gripper -1 open, +1 close).
    """
    steps = len(action)
    last = np.arange(steps) == steps - 1
    return {
        "steps/observation/image": images,
        "steps/observation/wrist_image": wrist_images,
        "steps/observation/state": state.astype(np.float32),
        "steps/observation/joint_state": joint_state.astype(np.float32),
        "steps/action": action.astype(np.float32),
        "steps/language_instruction": [instruction.encode()] * steps,
        "steps/reward": last.astype(np.float32),
        "steps/discount": np.ones(steps, np.float32),
        "steps/is_first": np.arange(steps) == 0,
        "steps/is_last": last,
        "steps/is_terminal": last,
        "episode_metadata/file_path": [file_path.encode()],
    }


def write_rlds(
    folder: Path,
    name: str,
    features: Mapping[str, Feature],
    episodes: Iterable[EpisodeEntries],
    *,
    shard_bytes: int = 128 << 20,
) -> int:
    """Write the version folder `folder` (for example `data/my_robot/1.0.0`), atomically; returns the episode count.

    Args:
        name: builder name, of letters, digits and underscores (tensorflow-datasets reads no others); the shards are
            called `{name}-train.tfrecord-00000-of-0000N`.
        features: meaning of every entry, by name.
        episodes: entries by name: arrays [T, ...] of numbers, lists of encoded images or UTF-8 texts.
        shard_bytes: a shard is closed once it is at least this long.

    Raises:
        ValueError: an impossible name, no episodes, or one whose entries are not `features`.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise ValueError(f"a dataset cannot be called {name!r}; use letters, digits and underscores")
    with atomic_folder(folder) as temporary:
        lengths, total = _write_shards(temporary, features, episodes, shard_bytes)
        if not lengths:
            raise ValueError(f"no episodes to write into {folder}")
        for shard in range(len(lengths)):
            target = f"{name}-train.tfrecord-{shard:05d}-of-{len(lengths):05d}"
            (temporary / f"{shard}.part").rename(temporary / target)
        write_json(temporary / "features.json", features_to_json(features))
        write_json(temporary / "dataset_info.json", _dataset_info(name, folder.name, lengths, total))
    return sum(lengths)


def _write_shards(
    folder: Path, features: Mapping[str, Feature], episodes: Iterable[EpisodeEntries], shard_bytes: int
) -> tuple[list[int], int]:
    """Write `0.part`, `1.part`, ...; returns the episodes in each and the bytes in all."""
    lengths: list[int] = []
    total, file = 0, None
    try:
        for episode in episodes:
            _check_episode(features, episode)
            if file is None:
                file = (folder / f"{len(lengths)}.part").open("wb")
                lengths.append(0)
            total += file.write(frame_record(encode_example(episode)))
            lengths[-1] += 1
            if file.tell() >= shard_bytes:
                file.close()
                file = None
    finally:
        if file is not None:
            file.close()
    return lengths, total


def _check_episode(features: Mapping[str, Feature], episode: EpisodeEntries) -> None:
    if set(episode) != set(features):
        wrong = sorted(set(episode) ^ set(features))
        raise ValueError(f"the episode's entries do not match the features; missing or unexpected: {', '.join(wrong)}")
    steps = {len(value) for name, value in episode.items() if name.startswith("steps/")}
    if len(steps) != 1:
        raise ValueError(f"the episode's entries have different numbers of steps: {sorted(steps)}")
    for name, value in episode.items():
        if features[name].kind == "tensor" and (shape := np.shape(value))[1:] != features[name].shape:
            raise ValueError(f"{name} has shape {list(shape)}, expected [T, {list(features[name].shape)}]")


def _dataset_info(name: str, version: str, lengths: list[int], total: int) -> dict[str, Any]:
    split = {
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "name": "train",
        "numBytes": str(total),
        "shardLengths": [str(n) for n in lengths],
    }
    return {
        "description": f"{name}, written by prismo",
        "fileFormat": "tfrecord",
        "name": name,
        "splits": [split],
        "version": version,
    }
