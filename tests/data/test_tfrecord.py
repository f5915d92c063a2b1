"""tf.train.Example messages: what is encoded is parsed again, and no bytes do more than raise a ValueError."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from prismo.data.tfrecord import encode_example, parse_example

MANY = settings(max_examples=300, derandomize=True, database=None, deadline=None)
VALUES = st.one_of(
    arrays.arrays(np.float32, st.integers(0, 20)),
    arrays.arrays(np.int64, st.integers(0, 20)),
    st.lists(st.binary(max_size=20), min_size=1, max_size=5),
)
MESSAGES = st.dictionaries(st.text(max_size=12), VALUES, max_size=5)


@MANY
@given(features=MESSAGES)
def test_encoded_features_come_back(features: dict[str, np.ndarray | list[bytes]]) -> None:
    data = encode_example(features)
    parsed = parse_example(data)
    assert parsed.keys() == features.keys()
    for name, value in features.items():
        found = parsed[name]
        if isinstance(value, np.ndarray):
            assert isinstance(found, np.ndarray)
            assert found.dtype == value.dtype
            np.testing.assert_array_equal(found, value)
        else:
            assert [data[start:stop] for start, stop in found] == value


@MANY
@example(data=b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")  # a length that Python takes and an array does not
@given(data=st.binary(max_size=80))
def test_other_bytes_are_no_message(data: bytes) -> None:
    with contextlib.suppress(ValueError):  # any other error fails
        parse_example(data)


@MANY
@given(features=MESSAGES, place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_damaged_messages(features: dict[str, np.ndarray | list[bytes]], place: float, value: int, cut: bool) -> None:
    """One byte changed, or the end missing: other features or a ValueError, and entries that lie inside the message."""
    data = bytearray(encode_example(features))
    if not data:
        pytest.skip("nothing to damage")
    at = int(place * len(data))
    data[at] = value
    damaged = bytes(data[:at] if cut else data)
    try:
        parsed = parse_example(damaged)
    except ValueError:
        return
    for found in parsed.values():
        if isinstance(found, list):
            assert all(0 <= start <= stop <= len(damaged) for start, stop in found)
