"""Our own index of a dataset: what a cache holds may be lost, but never be taken for other data."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz.harness import Fuzzer
from tests.fuzz.mutate import damage, json_of
from tests.fuzz.test_shards import read_samples


def test_damaged_index(fuzz: Fuzzer, dataset: Path) -> None:
    files = [str(path.relative_to(dataset)) for path in dataset.rglob(".prismo_index/*/*") if path.stat().st_size]
    described = [name for name in files if name.endswith(".json")]
    assert len(files) > len(described) > 0
    fuzz(dataset, st.one_of(damage(dataset, files), json_of(dataset, described)), read_samples, percent=6)
