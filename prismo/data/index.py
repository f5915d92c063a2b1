"""Builds, caches and opens the index of an RLDS folder (`open_index`, called by `dataset.py`).

The index lies in `.prismo_index/` inside the dataset's version folder, or in the user's cache where that folder cannot
be written. Its name is a digest of the shards' identity and of the spec, so a changed dataset or description gets
another one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from prismo.data.features import DatasetInfo
from prismo.data.rlds import EPISODE, EpisodeIndex, numbers, row_type
from prismo.data.specs import DatasetSpec, find_feature, split_slice, standardize
from prismo.data.tfrecord import FOOTER, HEADER, Record, crc32c, parse_example, read_records
from prismo.util.files import atomic_folder, write_json
from prismo.util.locks import exclusive
from prismo.util.schema import JsonObject, read_json

logger = logging.getLogger(__name__)

_FORMAT = 1  # raise it whenever the content of an index changes


def open_index(info: DatasetInfo, spec: DatasetSpec) -> EpisodeIndex:
    """The index of a dataset, built by one scan of all shards if it is not there yet.

    Any number of processes may call this at once: one builds, the others wait for it.

    Raises:
        ValueError: a shard is damaged, or a record lacks a feature; the message names the file.
    """
    digest = _digest(info, spec)
    for root in _roots(info):
        if (root / digest / "index.json").is_file():
            return _load(info, spec, root / digest)
    root = _writable_root(info)
    with exclusive(root / f"{digest}.lock"):
        if not (root / digest / "index.json").is_file():
            with atomic_folder(root / digest) as temporary:
                _build(info, spec, temporary)
    return _load(info, spec, root / digest)


def _load(info: DatasetInfo, spec: DatasetSpec, path: Path) -> EpisodeIndex:
    instructions = read_json(path / "index.json", JsonObject)["instructions"]
    return EpisodeIndex(info, spec, path, np.fromfile(path / "episodes.bin", EPISODE), instructions)


def _digest(info: DatasetInfo, spec: DatasetSpec) -> str:
    """Hash of the spec and of every shard's name, size, first and last bytes (which hold checksums of its records)."""
    digest = hashlib.sha256(json.dumps([_FORMAT, spec.identity], sort_keys=True).encode())
    for split in info.splits:
        for file in split.files:
            size = file.stat().st_size
            with file.open("rb") as opened:
                head = opened.read(HEADER)
                opened.seek(max(0, size - FOOTER))
                digest.update(f"{split.name}/{file.name}:{size}:".encode() + head + opened.read(FOOTER))
    return digest.hexdigest()[:24]


def _roots(info: DatasetInfo) -> tuple[Path, Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return info.path / ".prismo_index", cache / "prismo" / "index"


def _writable_root(info: DatasetInfo) -> Path:
    """The first place for an index that can be written."""
    for root in _roots(info):
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(root, os.W_OK):
            return root
    places = " nor ".join(map(str, _roots(info)))
    raise OSError(f"neither {places} can be written; set XDG_CACHE_HOME to a folder that can")


# --- the scan ---------------------------------------------------------------------------------------------------------


def _build(info: DatasetInfo, spec: DatasetSpec, folder: Path) -> None:
    """Scan every shard and write rows, episodes and texts into `folder`."""
    texts: dict[str, int] = {}
    episodes = []
    total = sum(file.stat().st_size for split in info.splits for file in split.files)
    with (
        (folder / "rows.bin").open("wb") as out,
        tqdm(total=total, unit="B", unit_scale=True, desc=f"index {spec.name}") as bar,
    ):
        first_row = 0
        for split, shard, file, record in _records(info):
            rows, named = _index_episode(info, spec, file, record, texts)
            out.write(rows.tobytes())
            size = len(record.data)
            episodes.append((split, shard, record.offset, size, record.crc, first_row, len(rows), named))
            first_row += len(rows)
            bar.update(HEADER + size + FOOTER)
    np.array(episodes, EPISODE).tofile(folder / "episodes.bin")
    write_json(folder / "index.json", {"dataset": spec.name, "spec": spec.identity, "instructions": list(texts)})


def _records(info: DatasetInfo) -> Iterator[tuple[int, int, Path, Record]]:
    """(split, shard, file, record) of every episode; the count of each shard is checked."""
    for number, split in enumerate(info.splits):
        for shard, (file, expected) in enumerate(zip(split.files, split.episodes, strict=True)):
            found = 0
            for record in read_records(file):
                found += 1
                yield number, shard, file, record
            if found != expected:
                raise ValueError(
                    f"{file} holds {found} episodes, dataset_info.json says {expected}: the file is cut off or belongs "
                    "to another version; fetch it again"
                )


def _index_episode(
    info: DatasetInfo, spec: DatasetSpec, file: Path, record: Record, texts: dict[str, int]
) -> tuple[np.ndarray, bool]:
    """Rows of one episode, and whether any of its steps has an instruction. New texts are added to `texts`."""
    try:
        entries = parse_example(record.data)
        action, proprio = (_vectors(names, info, record, entries) for names in (spec.action, spec.proprio))
        images = [_find(camera, "image", info, entries) for camera in spec.cameras]
        phrases = [record.data[a:b].decode() for a, b in _find(spec.instruction, "text", info, entries)]
        phrases = phrases * len(action) if len(phrases) == 1 else phrases  # one text for the whole episode
        lengths = {len(proprio), len(action), len(phrases), *map(len, images)}
        if len(lengths) > 1:
            raise ValueError(f"its features have different numbers of steps: {sorted(lengths)}")
    except ValueError as error:
        raise ValueError(f"{file}: the episode at byte {record.offset}: {error}") from error
    trajectory = standardize(spec, action, proprio)
    steps = slice(trajectory.start, trajectory.start + len(trajectory.action))
    rows = np.zeros(len(trajectory.action), row_type(spec))
    rows["action"], rows["proprio"] = trajectory.action, trajectory.proprio
    rows["instruction"] = [texts.setdefault(phrase, len(texts)) for phrase in phrases[steps]]
    for camera, ranges in enumerate(images):
        start, stop = np.array(ranges[steps], np.int64).reshape(-1, 2).T
        rows["offset"][:, camera], rows["length"][:, camera] = record.offset + start, stop - start
        rows["crc"][:, camera] = [crc32c(record.data[a:b]) for a, b in ranges[steps]]
    return rows, any(phrases[steps])


def _find(name: str, kind: str, info: DatasetInfo, entries: Mapping[str, Any]) -> Any:
    """Entry of the feature `name` in a record."""
    key, _ = find_feature(name, kind, info)
    if key not in entries:
        raise ValueError(f"it has no {key!r}, which features.json promises")
    return entries[key]


def _vectors(names: tuple[str, ...], info: DatasetInfo, record: Record, entries: Mapping[str, Any]) -> np.ndarray:
    """Concatenated vectors float32 [T, D] of a spec's action or proprio."""
    columns = []
    for name in names:
        key, part = split_slice(name)
        entry = _find(key, "tensor", info, entries)
        vectors = numbers(key, find_feature(key, "tensor", info)[1], record.data, entry)
        columns.append(vectors.reshape(len(vectors), -1)[:, part].astype(np.float32))
    return np.concatenate(columns, axis=1)
