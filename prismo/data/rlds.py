"""Random access to the frames and episodes of an RLDS folder.

`index.py` finds out where everything lies; training reads a few hundred bytes of index rows and the encoded images of
one frame per sample. Nothing grows with the dataset: rows and images are read by position when they are needed
(`os.pread`), so neither a shuffle buffer nor a memory map fills the host.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from prismo.data.features import DatasetInfo
from prismo.data.images import decode_image
from prismo.data.index_files import ROWS_PER_PIECE
from prismo.data.specs import DatasetSpec, Feature, find_feature, number_type, step_size
from prismo.data.tfrecord import crc32c

_MAX_OPEN_FILES = 64

EPISODE: np.dtype = np.dtype(
    [
        ("split", "u1"),
        ("shard", "u4"),  # within the split
        ("offset", "u8"),  # of the record's message in the shard
        ("length", "u8"),
        ("crc", "u4"),
        ("first_row", "u8"),
        ("steps", "u4"),
        ("named", "?"),  # at least one step has an instruction
    ]
)


def row_type(spec: DatasetSpec) -> np.dtype:
    """Type of one frame's row in an index: values in the spec's convention and where its images are in the shard."""
    cameras = (len(spec.cameras),)
    return np.dtype(
        [
            ("action", "<f4", (spec.embodiment.action_dim,)),
            ("proprio", "<f4", (spec.embodiment.proprio_dim,)),
            ("instruction", "<u4"),  # number of the text
            ("offset", "<u8", cameras),
            ("length", "<u4", cameras),
            ("crc", "<u4", cameras),
        ]
    )


class PositionedFiles:
    """Reads byte ranges of files and keeps a few of them open. Safe across forks and threads, picklable.

    Every thread has its own open files: none can close what another one reads, and no lock can be held in a fork.
    """

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`; ValueError where the file is shorter."""
        opened: OrderedDict[Path, BinaryIO] = self._of_thread.__dict__.setdefault("files", OrderedDict())
        file = opened.get(path)
        if file is None:
            file = opened[path] = path.open("rb", buffering=0)
            if len(opened) > _MAX_OPEN_FILES:
                opened.popitem(last=False)[1].close()
        data = os.pread(file.fileno(), size, offset)
        if len(data) < size:
            raise ValueError(f"{path} ends at byte {offset + len(data)}, {offset + size} expected; fetch it again")
        return data

    def __reduce__(self) -> tuple[type[PositionedFiles], tuple[()]]:
        return PositionedFiles, ()


@dataclass(frozen=True, eq=False)
class EpisodeIndex:
    """Where every frame of a dataset lies, with its standardised action and proprio: an `EpisodeStore`.

    Attributes:
        info, spec: the folder and its meaning.
        cache: folder of the index.
        episodes: structured array `EPISODE`, one entry per stored episode of every split.
        instructions: distinct instruction texts, by number.
        checksums: uint32, of every `ROWS_PER_PIECE` rows.
        row_type: dtype of a frame's row.
        num_rows: frames of all episodes.
    """

    info: DatasetInfo
    spec: DatasetSpec
    cache: Path
    episodes: np.ndarray
    instructions: list[str]
    checksums: np.ndarray
    row_type: np.dtype = field(init=False, repr=False)
    num_rows: int = field(init=False)
    _files: PositionedFiles = field(default_factory=PositionedFiles, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "row_type", row_type(self.spec))
        object.__setattr__(self, "num_rows", int(self.episodes["steps"].sum()))

    @property
    def root(self) -> Path:
        return self.info.path

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(split.name for split in self.info.splits)

    def rows(self, episode: int, start: int, stop: int) -> np.ndarray:
        """Rows (`row_type`) of the steps `start` to `stop` of an episode, fewer at its end."""
        entry = self.episodes[episode]
        return self._read_rows(int(entry["first_row"]) + start, min(stop, int(entry["steps"])) - start)

    def column(self, name: str, dims: slice = slice(None)) -> np.ndarray:
        """One row field ("action", "proprio") of every frame of every split, float64 [frames, dims]."""
        parts, piece = [], 1 << 16
        for first in range(0, self.num_rows, piece):
            rows = self._read_rows(first, min(piece, self.num_rows - first))
            parts.append(rows[name][:, dims].astype(np.float64))
        return np.concatenate(parts)

    def _read_rows(self, first: int, count: int) -> np.ndarray:
        """Rows by number over all episodes. Whole pieces are read, as only those have a checksum."""
        pieces = range(first // ROWS_PER_PIECE, -(-(first + count) // ROWS_PER_PIECE))
        start, stop = pieces.start * ROWS_PER_PIECE, min(pieces.stop * ROWS_PER_PIECE, self.num_rows)
        size = self.row_type.itemsize
        path = self.cache / "rows.bin"
        data = self._files.read(path, start * size, (stop - start) * size)
        for number, piece in enumerate(pieces):
            at = number * ROWS_PER_PIECE * size
            if crc32c(data[at : at + ROWS_PER_PIECE * size]) != self.checksums[piece]:
                raise ValueError(
                    f"{path} is damaged at byte {start * size + at}; delete the folder {self.cache}, the next start "
                    "builds it again"
                )
        return np.frombuffer(data, self.row_type)[first - start : first - start + count]

    def shard(self, episode: int) -> Path:
        """The file that holds an episode."""
        entry = self.episodes[episode]
        return self.info.splits[entry["split"]].files[entry["shard"]]

    def image_size(self, camera: int) -> tuple[int, int] | None:
        """(height, width) of a camera as features.json declares it, None if it may vary."""
        shape = find_feature(self.spec.cameras[camera], "image", self.info.features)[1].shape
        return (shape[0], shape[1]) if len(shape) > 1 and min(shape[:2]) > 0 else None

    def image(self, episode: int, row: np.void, camera: int, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 [H, W, 3] of one camera in one of the `rows`; black where the dataset stores an empty image.

        Args:
            out: where to put it, of the camera's `image_size`.

        Raises:
            ValueError: the bytes are not those that were indexed, or no image of the right size; the message names the
                file.
        """
        offset, length = int(row["offset"][camera]), int(row["length"][camera])
        size = self.image_size(camera)
        if out is None and size is not None:
            out = np.empty((*size, 3), np.uint8)
        if length == 0 and out is not None:
            out.fill(0)
            return out
        path = self.shard(episode)
        data = self._files.read(path, offset, length)
        if crc32c(data) != row["crc"][camera]:
            name = self.spec.cameras[camera]
            raise ValueError(
                f"{path}: {name} at byte {offset} is not what was indexed; the file changed: fetch it again"
            )
        try:
            return decode_image(data, out)
        except ValueError as error:
            raise ValueError(f"{path}: {self.spec.cameras[camera]} at byte {offset}: {error}") from error


def byte_strings(name: str, entry: Any) -> list[tuple[int, int]]:
    """Where the texts or images of one entry of a record are; ValueError where it holds numbers."""
    if not isinstance(entry, list):
        raise ValueError(f"{name} holds numbers, features.json promises texts or images")
    return entry


def numbers(name: str, feature: Feature, data: bytes, entry: Any) -> np.ndarray:
    """Numbers [T, *shape] of one entry of a record.

    Raises:
        ValueError: the entry is not what the feature promises.
    """
    dtype, size = number_type(name, feature), step_size(name, feature)
    if isinstance(entry, list):  # tensors stored as bytes, one string per step
        entry = _from_bytes(name, dtype, [data[a:b] for a, b in entry], feature.encoding == "zlib")
    elif (entry.dtype.kind == "f") != (dtype.kind == "f"):
        raise ValueError(f"{name} holds {entry.dtype} numbers, features.json says {dtype}")
    if not size or len(entry) % size:
        raise ValueError(f"{name} holds {len(entry)} numbers, which do not make steps of shape {list(feature.shape)}")
    return entry.reshape(-1, *feature.shape).astype(dtype)


def _from_bytes(name: str, dtype: np.dtype, pieces: list[bytes], zipped: bool) -> np.ndarray:
    try:
        raw = b"".join(map(zlib.decompress, pieces) if zipped else pieces)
    except zlib.error as error:
        raise ValueError(f"{name} cannot be decompressed: {error}") from error
    if len(raw) % dtype.itemsize:
        raise ValueError(f"{name} holds {len(raw)} bytes, which are no whole {dtype} numbers")
    return np.frombuffer(raw, dtype)
