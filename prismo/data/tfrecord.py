"""TFRecord files of tf.train.Example messages, read and written without TensorFlow.

`index.py` scans shards with it, `rlds_writer.py` produces them. Framing of one record: uint64 length, masked CRC32C of
those eight bytes, the message, masked CRC32C of the message (little-endian throughout).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

_CRC_MASK = 0xA282EAD8
_BYTES, _FLOATS, _INTS = 1, 2, 3  # field numbers of tf.train.Feature's oneof
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5  # protobuf wire types
HEADER, FOOTER = 12, 4


@dataclass(frozen=True)
class Record:
    """One message of a shard.

    Attributes:
        offset: position of the message's first byte in the file.
        data: the message.
        crc: its CRC32C (unmasked).
    """

    offset: int
    data: bytes
    crc: int


crc32c = google_crc32c.value  # of bytes (Castagnoli)


def masked(crc: int) -> int:
    """A CRC32C in the rotated form that TFRecord stores."""
    return ((crc >> 15 | crc << 17) + _CRC_MASK) & 0xFFFFFFFF


def read_records(path: Path) -> Iterator[Record]:
    """Every record of a shard in order, both checksums verified.

    Raises:
        ValueError: the file ends inside a record or a checksum does not fit; the message names file and position.
    """
    advice = "the file is damaged or only partly downloaded: fetch this shard again"
    size = path.stat().st_size
    with path.open("rb") as file:
        offset = 0
        while header := file.read(HEADER):
            if len(header) < HEADER:
                raise ValueError(f"{path} ends in the middle of a record header at byte {offset}; {advice}")
            length, length_crc = struct.unpack("<QI", header)
            if masked(crc32c(header[:8])) != length_crc:
                raise ValueError(f"{path}: wrong checksum of the record length at byte {offset}; {advice}")
            if offset + HEADER + length + FOOTER > size:
                raise ValueError(f"{path} ends in the middle of the record at byte {offset} ({length} bytes); {advice}")
            data, footer = file.read(length), file.read(FOOTER)
            crc = crc32c(data)
            if masked(crc) != struct.unpack("<I", footer)[0]:
                raise ValueError(f"{path}: wrong checksum of the record at byte {offset} ({length} bytes); {advice}")
            yield Record(offset + HEADER, data, crc)
            offset += HEADER + length + FOOTER


def frame_record(data: bytes) -> bytes:
    """`data` with the length and checksums of a TFRecord around it."""
    length = struct.pack("<Q", len(data))
    first, last = (struct.pack("<I", masked(crc32c(part))) for part in (length, data))
    return b"".join((length, first, data, last))


# --- tf.train.Example -------------------------------------------------------------------------------------------------


def parse_example(data: bytes) -> dict[str, np.ndarray | list[tuple[int, int]]]:
    """Features of a serialised tf.train.Example by name.

    Returns:
        float lists as float32 [n], integer lists as int64 [n], byte lists as the (start, stop) of every entry in
        `data`, so that images need not be copied to be located.

    Raises:
        ValueError: not a tf.train.Example.
    """
    features: dict[str, np.ndarray | list[tuple[int, int]]] = {}
    try:
        for start, stop in _messages(data, 0, len(data), 1):  # Example.features
            for entry in _messages(data, start, stop, 1):  # one entry of the map
                name, value = "", None
                for number, _, a, b in _fields(data, *entry):
                    if number == 1:
                        name = data[a:b].decode()
                    elif number == 2:
                        value = _parse_feature(data, a, b)
                features[name] = [] if value is None else value
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError("not a tf.train.Example message") from error
    return features


def _parse_feature(data: bytes, start: int, stop: int) -> np.ndarray | list[tuple[int, int]] | None:
    for kind, _, a, b in _fields(data, start, stop):
        if kind == _BYTES:
            return _messages(data, a, b, 1)
        # Numbers are packed into one entry by every known writer, but one entry each is also legal.
        pieces = list(_fields(data, a, b))
        if kind == _FLOATS:
            return np.concatenate([np.zeros(0, "<f4"), *(np.frombuffer(data[x:y], "<f4") for _, _, x, y in pieces)])
        if kind == _INTS:
            return np.concatenate([np.zeros(0, np.int64), *(_varints(data[x:y]) for _, _, x, y in pieces)])
    return None


def _messages(data: bytes, at: int, end: int, wanted: int) -> list[tuple[int, int]]:
    """(start, stop) of every length-delimited field `wanted` between `at` and `end`."""
    return [(start, stop) for number, _, start, stop in _fields(data, at, end) if number == wanted]


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, start, stop) of the fields of a protobuf message."""
    while at < end:
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == _LENGTH_DELIMITED:
            length, at = _varint(data, at)
        elif wire == _VARINT:
            length = _varint(data, at)[1] - at
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise IndexError(f"wire type {wire}")
        if at + length > end:
            raise IndexError("a field reaches beyond its message")
        yield tag >> 3, wire, at, at + length
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    byte = data[at]
    at += 1
    value, shift = byte & 0x7F, 7
    while byte & 0x80:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
    return value, at


def _varints(packed: bytes) -> np.ndarray:
    """int64 values of consecutive varints."""
    raw = np.frombuffer(packed, np.uint8)
    ends = raw < 0x80
    if ends.all():  # flags and small counters: one byte each
        return raw.astype(np.int64)
    first = np.flatnonzero(np.concatenate([[True], ends[:-1]]))
    place = np.arange(len(raw)) - np.repeat(first, np.diff(np.append(first, len(raw))))
    bits = (raw & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.add.reduceat(bits, first).view(np.int64)


def encode_example(features: Mapping[str, np.ndarray | Sequence[bytes]]) -> bytes:
    """Serialise a tf.train.Example: floating arrays as float lists, integers and bools as int lists, bytes as such."""
    entries = []
    for name, value in sorted(features.items()):
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            feature = _delimited(_FLOATS, _delimited(1, value.astype("<f4").tobytes()))
        elif isinstance(value, np.ndarray):
            feature = _delimited(_INTS, _delimited(1, _encode_varints(value)))
        else:
            feature = _delimited(_BYTES, b"".join(_delimited(1, item) for item in value))
        entries.append(_delimited(1, _delimited(1, name.encode()) + _delimited(2, feature)))
    return _delimited(1, b"".join(entries))


def _encode_varints(values: np.ndarray) -> bytes:
    flat = values.reshape(-1).astype(np.int64)
    if ((flat >= 0) & (flat < 0x80)).all():
        return flat.astype(np.uint8).tobytes()
    return b"".join(_encode_varint(int(value) & 0xFFFFFFFFFFFFFFFF) for value in flat)


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _delimited(number: int, payload: bytes) -> bytes:
    return b"".join((_encode_varint(number << 3 | _LENGTH_DELIMITED), _encode_varint(len(payload)), payload))
