"""What damaged recordings hold under right checksums: broken pictures, numbers that are none, half messages."""

from __future__ import annotations

import functools
import io
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from PIL import Image

from prismo.data.tfrecord import encode_example, frame_record, parse_example, read_records
from tests.fuzz.harness import Fuzzer
from tests.fuzz.mutate import Draw, Mutation, damaged, writes
from tests.fuzz.test_shards import VERSION, read_samples, shard_names

_IMAGES = ("steps/observation/image", "steps/observation/wrist_image")
_VECTORS = ("steps/action", "steps/observation/state")
_USED = (*_IMAGES, *_VECTORS, "steps/language_instruction")
_NUMBERS = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf}
Entries = dict[str, Any]


def entries_of(data: bytes) -> Entries:
    """Entries of a record as `encode_example` takes them."""
    return {k: [data[a:b] for a, b in v] if isinstance(v, list) else v.copy() for k, v in parse_example(data).items()}


def picture(size: tuple[int, int], kind: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


@functools.cache
def _other_pictures() -> dict[str, bytes]:
    return {
        "of another size": picture((48, 32), "JPEG"),
        "that is grey": picture((32, 32), "JPEG", "L"),
        "in CMYK": picture((32, 32), "JPEG", "CMYK"),
        "that is a PNG": picture((32, 32), "PNG"),
        "that is a GIF": picture((32, 32), "GIF"),
        "of zero bytes": b"\0" * 500,
    }


@st.composite
def rewritten(draw: Draw, root: Path, change: Callable[[Draw, Entries], tuple[str, str, bool]]) -> Mutation:
    """A shard with one record changed and right checksums; the dataset was not indexed before."""
    file = draw(st.sampled_from(shard_names(root)))
    records = [record.data for record in read_records(root / file)]
    number = draw(st.integers(0, len(records) - 1))
    entries = entries_of(records[number])
    kind, what, must_fail = change(draw, entries)
    records[number] = encode_example(entries)
    return _stored(file, kind, f"record {number}: {what}", records, must_fail)


def _stored(file: str, kind: str, what: str, records: list[bytes], must_fail: bool = False) -> Mutation:
    whole = writes(file, kind, what, b"".join(map(frame_record, records)), must_fail=must_fail)

    def apply(root: Path) -> None:
        shutil.rmtree(root / VERSION / ".prismo_index")
        whole.apply(root)

    return Mutation(file, kind, what, apply, must_fail=must_fail)


def _image(draw: Draw, entries: Entries) -> tuple[str, str, bool]:
    name = draw(st.sampled_from(_IMAGES))
    step = draw(st.integers(0, len(entries[name]) - 1))
    kind = draw(st.sampled_from(["truncate", "flip", "insert", "zeros", "random", "other"]))
    if kind == "other":
        what = draw(st.sampled_from(sorted(_other_pictures())))
        entries[name][step] = _other_pictures()[what]
        return "picture", f"{name} {step} is a picture {what}", what in ("of another size", "of zero bytes")
    entries[name][step], what = draw(damaged(entries[name][step], kind))
    return "picture", f"{name} {step} {what}", False


def _number(draw: Draw, entries: Entries) -> tuple[str, str, bool]:
    name, value = draw(st.sampled_from(_VECTORS)), draw(st.sampled_from(sorted(_NUMBERS)))
    place = draw(st.integers(0, len(entries[name]) - 1))
    entries[name][place] = _NUMBERS[value]
    return "number", f"{name} holds {value}", True


def _length(draw: Draw, entries: Entries) -> tuple[str, str, bool]:
    name, kind = draw(st.sampled_from(_USED)), draw(st.sampled_from(["gone", "empty", "shorter", "longer"]))
    value = entries.pop(name)
    if kind != "gone":
        longer = np.append(value, value[-1:]) if isinstance(value, np.ndarray) else [*value, value[-1]]
        entries[name] = {"empty": value[:0], "shorter": value[:-1], "longer": longer}[kind]
    return "length", f"{name} is {kind}", True


def _text(draw: Draw, entries: Entries) -> tuple[str, str, bool]:
    values = {"not UTF-8": b"\xff\xfe", "in UTF-16": "pick up".encode("utf-16"), "with a half letter": b"caf\xc3"}
    name = draw(st.sampled_from(sorted(values)))
    entries["steps/language_instruction"][0] = values[name]
    return "text", f"an instruction {name}", True


@st.composite
def message(draw: Draw, root: Path) -> Mutation:
    """A record whose protobuf message is damaged."""
    file = draw(st.sampled_from(shard_names(root)))
    records = [record.data for record in read_records(root / file)]
    number = draw(st.integers(0, len(records) - 1))
    kind = draw(st.sampled_from(["truncate", "insert", "flip", "zeros", "ones", "empty", "random", "varint"]))
    if kind == "varint":  # a length without end
        at = draw(st.integers(0, 40))
        records[number] = records[number][:at] + b"\xff" * 12 + records[number][at:]
        return _stored(file, kind, f"message {number}: endless varint at {at}", records)
    before = records[number]
    records[number], what = draw(damaged(before, kind))
    assume(records[number] != before)
    return _stored(file, kind, f"message {number} {what}", records)


def other_content(mutation: Mutation, before: list[Any], after: list[Any]) -> bool:
    """Pictures have no checksum of their own: one that can be decoded is a picture. Everything else is as before.

    A message without a checksum of its own may hold other numbers and texts, as long as they are some.
    """
    if mutation.kind == "picture":
        return [sample[1:] for sample in before] == [sample[1:] for sample in after] or len(before) == len(after)
    return mutation.kind in ("flip", "zeros", "ones", "insert", "varint")


def test_damaged_payload(fuzz: Fuzzer, dataset: Path) -> None:
    images, *others = (rewritten(dataset, change) for change in (_image, _number, _length, _text))
    fuzz(dataset, st.one_of(images, images, message(dataset), *others), read_samples, percent=6,
         legitimate=other_content)  # fmt: skip


def test_a_message_cannot_ask_for_memory(fuzz: Fuzzer, dataset: Path) -> None:
    """Lengths within a message that no file has."""
    file = shard_names(dataset)[0]
    first = [record.data for record in read_records(dataset / file)]
    lengths = st.sampled_from([2**31 - 1, 2**32, 2**62, 2**63, 2**64 - 1])

    def with_length(length: int) -> Mutation:
        varint = bytes((length >> shift & 0x7F) | 0x80 for shift in range(0, 63, 7)) + b"\1"
        data = struct.pack("B", 1 << 3 | 2) + varint + first[0][2:]
        return _stored(file, "length", f"a field of {length} bytes", [data, *first[1:]], must_fail=True)

    fuzz(dataset, lengths.map(with_length), read_samples, percent=1)
