"""Messages between a simulator process and its owner: JSON, and behind it arrays as they lie in memory.

A message is the length of its header (4 bytes, big-endian), the header (JSON), and the bytes of arrays in the order in
which the header names them, each as {"array": [dtype, shape]}. Nothing in a message is ever run, and the two processes
may have different Pythons and packages: this needs numpy only.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

LONGEST = 1 << 30  # bytes; 25 steps filmed by two cameras of 2048 pixels are 630 MB
_TYPES = {name: np.dtype(name).newbyteorder("<") for name in ("uint8", "bool", "int64", "float32", "float64")}
_LENGTH = struct.Struct(">I")


class MessageError(ValueError):
    """What came through the pipe is no message."""


def encode(value: Any) -> bytes:
    """A message of JSON types, arrays, paths (as text) and dataclasses (as dictionaries); tuples arrive as lists.

    Raises:
        TypeError: the value holds something else.
        ValueError: it is too long.
    """
    arrays: list[np.ndarray] = []

    def plain(item: Any) -> Any:
        if isinstance(item, np.ndarray) and item.dtype.name in _TYPES:
            arrays.append(item)
            return {"array": [item.dtype.name, item.shape]}
        if isinstance(item, np.generic):
            return item.item()
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
        if isinstance(item, Path):
            return str(item)
        raise TypeError(f"a message cannot hold {type(item).__name__} {getattr(item, 'dtype', '')}".rstrip())

    header = json.dumps(value, default=plain).encode()
    size = _LENGTH.size + len(header) + sum(array.nbytes for array in arrays)
    if size > LONGEST:
        raise ValueError(f"a message of {size:,} bytes is too long; at most {LONGEST:,}")
    blocks = (array.astype(_TYPES[array.dtype.name], copy=False).tobytes() for array in arrays)
    return b"".join([_LENGTH.pack(len(header)), header, *blocks])


def decode(data: bytes) -> Any:
    """The value of a message; its arrays are writable.

    Raises:
        MessageError: it is damaged.
    """
    place = 0

    def take(count: int, kind: np.dtype) -> np.ndarray:
        nonlocal place
        array = np.frombuffer(data, kind, count, place)
        place += array.nbytes
        return array.copy()

    def filled(item: dict[str, Any]) -> Any:
        if item.keys() != {"array"}:
            return item
        name, shape = item["array"]
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError(f"an array of shape {shape}")
        return take(math.prod(shape), _TYPES[name]).reshape(shape)

    try:
        place = _LENGTH.size + _LENGTH.unpack_from(data)[0]
        value = json.loads(data[_LENGTH.size : place], object_hook=filled)
        if place != len(data):
            raise ValueError(f"{len(data)} bytes, of which {place} have a meaning")
    except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise MessageError(f"a damaged message ({type(error).__name__}: {error})") from error
    return value
