"""Checksums of the files in an index, so that damage is noticed and nothing is read as other data.

`index.py` writes and checks them, `rlds.py` checks every row that it reads, `statistics.py` keeps its result in the
same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import numpy as np

from prismo.data.tfrecord import crc32c
from prismo.util.files import write_json
from prismo.util.schema import JsonObject, check, read_json

T = TypeVar("T")

ROWS_PER_PIECE = 64  # rows that share a checksum and are read together; 6 kB of a LIBERO index
_AT_ONCE = 1 << 20  # bytes


@dataclass(frozen=True)
class FileCheck:
    """Size in bytes and CRC32C of a file."""

    bytes: int
    crc32c: int


def file_check(path: Path) -> FileCheck:
    """Read a whole file and describe it."""
    size, crc = 0, 0
    for block in _blocks(path, _AT_ONCE):
        size, crc = size + len(block), google_crc32c.extend(crc, block)
    return FileCheck(size, crc)


def piece_checksums(path: Path, piece: int) -> np.ndarray:
    """CRC32C, uint32, of every `piece` bytes of a file."""
    return np.fromiter(map(crc32c, _blocks(path, piece)), np.uint32)


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb", buffering=max(size, _AT_ONCE)) as file:
        while block := file.read(size):
            yield block


@dataclass(frozen=True)
class _Sealed:
    content: JsonObject
    crc32c: int


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON together with its checksum, atomically."""
    write_json(path, {"content": content, "crc32c": _checksum(content)})


def read_sealed(path: Path, kind: type[T]) -> T:
    """Read what `write_sealed` wrote.

    Raises:
        ValueError: not of this kind, or not what was written.
        OSError: the file cannot be read.
    """
    sealed = read_json(path, _Sealed, advice="it is made again")
    if _checksum(sealed.content) != sealed.crc32c:
        raise ValueError(f"{path} does not fit its checksum")
    return check(sealed.content, kind, str(path))


def _checksum(content: Mapping[str, Any]) -> int:
    return crc32c(json.dumps(content, sort_keys=True).encode())
