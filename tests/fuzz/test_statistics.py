"""Statistics files: what they are edited to must scale actions to sensible places, or be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from prismo.data.normalize import load_statistics, normalize, resolve_unnorm_key, statistics_to_json, unnormalize
from prismo.embodiment import LIBERO
from prismo.testing.tiny import tiny_statistics
from tests.fuzz.conftest import DATASET
from tests.fuzz.harness import Fuzzer
from tests.fuzz.mutate import Mutation, damage, json_of

FILES = ("dataset_statistics.json", "config.json", "processor_config.json")
_NUMBERS = ("-1", "0", "1.5", "huge", "reversed", "drop")  # other numbers may be those of another robot


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three files that hold statistics, each with two datasets."""
    folder = tmp_path_factory.mktemp("fuzz") / "statistics"
    folder.mkdir()
    written = statistics_to_json({name: tiny_statistics(LIBERO) for name in (DATASET, "bridge_orig")})
    for name, content in zip(FILES, (written, {"norm_stats": written}, {"statistics": written}), strict=True):
        (folder / name).write_text(json.dumps(content))
    return folder


def read_scaling(folder: Path) -> Any:
    """Where the extremes of an action land, and a state, by every file."""
    found = {}
    for name in FILES:
        statistics = load_statistics(folder / name)
        chosen = statistics[resolve_unnorm_key(statistics, "libero_spatial")]
        ends = [unnormalize(np.full(7, value), chosen.action, "bounds_q99").tolist() for value in (-1, 1)]
        states = [np.full(8, value) for value in (-0.5, 0.5)] if chosen.proprio else []
        scaled = [normalize(state, chosen.proprio, "bounds_q99").tolist() for state in states]
        found[name] = {"ends": ends, "states": scaled}
    return found


def sensible(mutation: Mutation, before: Any, after: Any) -> bool:
    """Other numbers, finite, that turn no movement around."""
    found = after[mutation.file]
    if not found["states"] and "proprio" in mutation.place:
        return mutation.kind in ("drop", "rename", "null", "{}") and found["ends"] == before[mutation.file]["ends"]
    if mutation.kind in ("drop", "rename", "null") and mutation.place[-1] == "mask":
        return True
    pairs = [np.array(found["ends"]), np.array(found["states"])]
    return mutation.kind in _NUMBERS and all(np.isfinite(pair).all() and (pair[0] <= pair[1]).all() for pair in pairs)


def test_damaged_statistics(fuzz: Fuzzer, statistics: Path) -> None:
    edits = json_of(statistics, FILES)
    fuzz(statistics, st.one_of(edits, edits, edits, damage(statistics, FILES)), read_scaling, percent=8,
         legitimate=sensible, also=("unnorm_key",))  # fmt: skip
