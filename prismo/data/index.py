"""RLDS as a format of `store.py`: builds, caches and opens the index of a folder (`open_store`).

The index lies in `.prismo_index/` inside the dataset's version folder, or in the user's cache where that folder cannot
be written. Its name is a digest of the shards' identity and of the spec, so a changed dataset or description gets
another one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from prismo.data.features import DatasetInfo, read_dataset_info
from prismo.data.index_files import ROWS_PER_PIECE, FileCheck, file_check, piece_checksums, read_sealed, write_sealed
from prismo.data.rlds import EPISODE, EpisodeIndex, byte_strings, numbers, row_type
from prismo.data.specs import DatasetSpec, Feature, Trajectory, find_feature, split_slice, standardize
from prismo.data.tfrecord import FOOTER, HEADER, Record, crc32c, parse_example, read_records
from prismo.util.files import atomic_folder
from prismo.util.locks import exclusive
from prismo.util.schema import JsonObject

logger = logging.getLogger(__name__)

_FORMAT = 2  # raise it whenever the content of an index changes
_CHECKED_AT_OPEN = 64 << 20  # bytes of rows; those of a larger index are only checked as they are read
_ROWS, _EPISODES, _CHECKSUMS, _TEXTS = "rows.bin", "episodes.bin", "rows.crc", "index.json"


@dataclass(frozen=True)
class _Contents:
    """What index.json says; its own checksum is around it."""

    dataset: str
    spec: JsonObject
    instructions: list[str]
    files: dict[str, FileCheck]


def read_features(folder: Path) -> dict[str, Feature]:
    """What features.json lists; the names of a step's begin with `steps/`."""
    return read_dataset_info(folder).features


def open_store(folder: Path, spec: DatasetSpec) -> EpisodeIndex:
    """The index of a dataset, built by one scan of all shards if it is not there yet or is damaged.

    Any number of processes may call this at once: one builds, the others wait for it.

    Raises:
        ValueError: a shard is damaged, or a record lacks a feature; the message names the file.
        OSError: nothing can be written where an index may lie, or a damaged one cannot be replaced.
    """
    info = read_dataset_info(folder)
    digest = _digest(info, spec)
    for root in _roots(info):
        if (found := _load(info, spec, root / digest)) is not None:
            return found
    index = _writable_root(info) / digest
    with exclusive(index.with_name(f"{digest}.lock")):
        # Somebody else may have built it while we waited; and where there are no locks, while we build: the first wins,
        # because on a network disk its readers would lose the files that we replace.
        if (found := _load(info, spec, index, logging.DEBUG)) is not None:
            return found
        _remove(index)
        with atomic_folder(index, keep_existing=True) as temporary:
            _build(info, spec, temporary)
    return _read(info, spec, index)


def _load(info: DatasetInfo, spec: DatasetSpec, path: Path, level: int = logging.WARNING) -> EpisodeIndex | None:
    """The index in the folder `path`; None if there is none, and, with a message of this level, if it is damaged."""
    if not path.exists():
        return None
    try:
        return _read(info, spec, path)
    except (ValueError, OSError) as error:
        logger.log(level, "the index is damaged and is built again: %s", error)
        return None


def _read(info: DatasetInfo, spec: DatasetSpec, path: Path) -> EpisodeIndex:
    contents = read_sealed(path / _TEXTS, _Contents)
    for name in (_EPISODES, _CHECKSUMS):
        if file_check(path / name) != contents.files.get(name):
            raise ValueError(f"{path / name} does not fit its checksum")
    episodes, checksums = np.fromfile(path / _EPISODES, EPISODE), np.fromfile(path / _CHECKSUMS, np.uint32)
    rows, row_size = path / _ROWS, row_type(spec).itemsize
    size, expected = rows.stat().st_size, int(episodes["steps"].sum()) * row_size
    if size != expected:
        raise ValueError(f"{rows} has {size} bytes, {expected} expected")
    if size <= _CHECKED_AT_OPEN and not np.array_equal(piece_checksums(rows, ROWS_PER_PIECE * row_size), checksums):
        raise ValueError(f"{rows} does not fit its checksums")
    return EpisodeIndex(info, spec, path, episodes, contents.instructions, checksums)


def _remove(folder: Path) -> None:
    """Delete a damaged index."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OSError(f"the index {folder} is damaged and cannot be replaced ({error}); delete it") from error


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
        (folder / _ROWS).open("wb") as out,
        tqdm(total=total, unit="B", unit_scale=True, desc=f"index {spec.name}") as bar,
    ):
        first_row = 0
        for split, shard, file, record in _records(info):
            try:
                rows, named = _index_episode(info, spec, record, texts)
            except ValueError as error:
                raise ValueError(f"{file}: episode {len(episodes)} (at byte {record.offset}): {error}") from error
            out.write(rows.tobytes())
            size = len(record.data)
            episodes.append((split, shard, record.offset, size, record.crc, first_row, len(rows), named))
            first_row += len(rows)
            bar.update(HEADER + size + FOOTER)
    np.array(episodes, EPISODE).tofile(folder / _EPISODES)
    piece_checksums(folder / _ROWS, ROWS_PER_PIECE * row_type(spec).itemsize).tofile(folder / _CHECKSUMS)
    files = {name: file_check(folder / name) for name in (_EPISODES, _CHECKSUMS)}
    write_sealed(folder / _TEXTS, asdict(_Contents(spec.name, spec.identity, list(texts), files)))


def _records(info: DatasetInfo) -> Iterator[tuple[int, int, Path, Record]]:
    """(split, shard, file, record) of every episode; the count of each shard is checked, and that none comes twice."""
    seen: dict[tuple[tuple[int, int], ...], Path] = {}
    for number, split in enumerate(info.splits):
        for shard, (file, expected) in enumerate(zip(split.files, split.episodes, strict=True)):
            content = []
            for record in read_records(file):
                content.append((record.crc, len(record.data)))
                yield number, shard, file, record
            if len(content) != expected:
                raise ValueError(
                    f"{file} holds {len(content)} episodes, dataset_info.json says {expected}: the file is cut off or "
                    "belongs to another version; fetch it again"
                )
            if content and (twin := seen.setdefault(tuple(content), file)) != file:
                raise ValueError(
                    f"{file} holds the very episodes of {twin}: one is a copy of the other; fetch both again"
                )


def _index_episode(
    info: DatasetInfo, spec: DatasetSpec, record: Record, texts: dict[str, int]
) -> tuple[np.ndarray, bool]:
    """Rows of one episode, and whether any of its steps has an instruction. New texts are added to `texts`."""
    entries = parse_example(record.data)
    action, proprio = (_vectors(names, info, record, entries) for names in (spec.action, spec.proprio))
    images = [byte_strings(camera, _find(camera, "image", info, entries)[1]) for camera in spec.cameras]
    texts_at = byte_strings(spec.instruction, _find(spec.instruction, "text", info, entries)[1])
    phrases = [record.data[a:b].decode() for a, b in texts_at]
    phrases = phrases * len(action) if len(phrases) == 1 else phrases  # one text for the whole episode
    lengths = {len(proprio), len(action), len(phrases), *map(len, images)}
    if len(lengths) > 1:
        raise ValueError(f"its features have different numbers of steps: {sorted(lengths)}")
    trajectory = standardize(spec, action, proprio)
    _check_finite(trajectory)
    steps = slice(trajectory.start, trajectory.start + len(trajectory.action))
    rows = np.zeros(len(trajectory.action), row_type(spec))
    rows["action"], rows["proprio"] = trajectory.action, trajectory.proprio
    rows["instruction"] = [texts.setdefault(phrase, len(texts)) for phrase in phrases[steps]]
    for camera, ranges in enumerate(images):
        start, stop = np.array(ranges[steps], np.int64).reshape(-1, 2).T
        rows["offset"][:, camera], rows["length"][:, camera] = record.offset + start, stop - start
        rows["crc"][:, camera] = [crc32c(record.data[a:b]) for a, b in ranges[steps]]
    return rows, any(phrases[steps])


def _check_finite(trajectory: Trajectory) -> None:
    """A single one would take the quantiles from a whole dataset, and stop training wherever it is met."""
    for name, values in (("action", trajectory.action), ("proprio", trajectory.proprio)):
        for step, dim in np.argwhere(~np.isfinite(values)):
            raise ValueError(
                f"step {trajectory.start + step}: {name} number {dim} is {values[step, dim]}; mend or leave out this "
                "episode and build the dataset again"
            )


def _find(name: str, kind: str, info: DatasetInfo, entries: Mapping[str, Any]) -> tuple[Feature, Any]:
    """The feature `name` and its entry in a record."""
    key, feature = find_feature(name, kind, info.features)
    if key not in entries:
        raise ValueError(f"it has no {key!r}, which features.json promises")
    return feature, entries[key]


def _vectors(names: tuple[str, ...], info: DatasetInfo, record: Record, entries: Mapping[str, Any]) -> np.ndarray:
    """Concatenated vectors float32 [T, D] of a spec's action or proprio."""
    columns = []
    for name in names:
        key, part = split_slice(name)
        feature, entry = _find(key, "tensor", info, entries)
        vectors = numbers(key, feature, record.data, entry)
        columns.append(vectors.reshape(len(vectors), -1)[:, part].astype(np.float32))
    return np.concatenate(columns, axis=1)
