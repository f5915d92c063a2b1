"""Shards of a dataset that are cut off, flipped, swapped or gone, before and after they were indexed."""

from __future__ import annotations

import functools
import hashlib
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from prismo.data.dataset import open_dataset
from prismo.data.tfrecord import HEADER, crc32c, frame_record, masked, read_records
from tests.fuzz.conftest import DATASET
from tests.fuzz.harness import Fuzzer
from tests.fuzz.mutate import Draw, Mutation, damage, writes

VERSION = f"{DATASET}/1.0.0"
_LENGTHS = (0, 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1)


def read_samples(root: Path) -> Any:
    """Every sample, in an order that does not depend on the files: (picture, numbers, text)."""
    data = open_dataset(root, DATASET, use_tail=True)
    samples = [
        (
            hashlib.sha256(sample.images.numpy().tobytes()).hexdigest(),
            hashlib.sha256(sample.actions.numpy().tobytes() + sample.proprio.numpy().tobytes()).hexdigest(),
            sample.instruction,
        )
        for sample in map(data.__getitem__, range(len(data)))
    ]
    return sorted(samples)


def shard_names(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.tfrecord*"))


@st.composite
def unindexed(draw: Draw, mutations: st.SearchStrategy[Mutation]) -> Mutation:
    """A mutation of a dataset that was not opened before, or was."""
    mutation = draw(mutations)
    if draw(st.booleans()):
        return mutation
    return replace(mutation, what=f"{mutation.what}, no index", apply=functools.partial(_apply_alone, mutation.apply))


def _apply_alone(apply: Callable[[Path], object], root: Path) -> None:
    shutil.rmtree(root / VERSION / ".prismo_index")
    apply(root)


@st.composite
def records(draw: Draw, root: Path) -> Mutation:
    """A shard with other records, all of them with right checksums."""
    file = draw(st.sampled_from(shard_names(root)))
    found = [record.data for record in read_records(root / file)]
    kind = draw(st.sampled_from(["length", "drop", "repeat", "empty record", "append"]))
    if kind == "length":
        data = (root / file).read_bytes()
        length = struct.pack("<Q", draw(st.sampled_from(_LENGTHS)))
        changed = length + struct.pack("<I", masked(crc32c(length))) + data[HEADER:]
        return writes(file, kind, f"record length {length.hex()} with a right checksum", changed, must_fail=True)
    place = draw(st.integers(0, len(found) - 1))
    changed = {
        "drop": found[:place] + found[place + 1 :],
        "repeat": [*found, found[place]],
        "empty record": [*found[:place], b"", *found[place + 1 :]],
        "append": [*found, b""],
    }[kind]
    return writes(file, kind, f"record {place}: {kind}", b"".join(map(frame_record, changed)))


def test_damaged_shards(fuzz: Fuzzer, dataset: Path) -> None:
    mutations = st.one_of(damage(dataset, shard_names(dataset)), records(dataset))
    fuzz(dataset, unindexed(mutations), read_samples, percent=9)
