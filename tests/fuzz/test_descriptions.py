"""`dataset_info.json` and `features.json` of a dataset, damaged or edited, before and after it was indexed."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz.harness import Fuzzer
from tests.fuzz.mutate import damage, json_of
from tests.fuzz.test_shards import VERSION, read_samples, unindexed

FILES = [f"{VERSION}/{name}" for name in ("dataset_info.json", "features.json")]


def test_damaged_descriptions(fuzz: Fuzzer, dataset: Path) -> None:
    edits = json_of(dataset, FILES)
    fuzz(dataset, unindexed(st.one_of(edits, edits, edits, damage(dataset, FILES))), read_samples, percent=8)
