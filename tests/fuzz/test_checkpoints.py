"""Checkpoints of every kind: merged, unmerged with its base, and SpatialVLA."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from prismo.embodiment import LIBERO
from prismo.policies.base import PolicyInput
from prismo.policies.flags import PolicyFlags
from prismo.policies.loading import prepare_policy
from prismo.testing.tiny import make_tiny_policy
from prismo.testing.tiny_spatialvla import make_tiny_spatialvla
from tests.fuzz.conftest import DATASET
from tests.fuzz.harness import Fuzzer
from tests.fuzz.mutate import Mutation, damage, data_starts, header_edit, json_of
from tests.fuzz.tensors import tensor_edit

RUN = "runs/run--1_chkpt"


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("fuzz") / "merged", layers=2)


@pytest.fixture(scope="module")
def spatialvla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_spatialvla(tmp_path_factory.mktemp("fuzz") / "spatialvla")


NAMED = ("unknown unnorm_key", "was trained on")  # about the name that was asked for, no file


def reader(policy: str, key: str) -> Callable[[Path], Any]:
    """Loads the policy in a sub-folder and asks it once."""

    def read(folder: Path) -> Any:
        os.chdir(folder)
        flags = PolicyFlags(pretrained_checkpoint=policy or str(folder), unnorm_key=key, device="cpu")
        spec = prepare_policy(flags, LIBERO)
        loaded = spec.load()
        rng = np.random.default_rng(0)
        images = tuple(rng.integers(0, 256, (loaded.num_images, 64, 64, 3), dtype=np.uint8))
        loaded.start_episode(0, 0)
        actions = loaded.predict([PolicyInput(images, rng.normal(0, 0.3, 8), "pick up the milk")], [0])
        return {"settings": spec.describe(), "actions": actions.tolist()}

    return read


def mutations(folder: Path, files: list[str]) -> st.SearchStrategy[Mutation]:
    """Of every kind of file in equal parts."""
    described = [name for name in files if name.endswith(".json")]
    weights = [name for name in files if name.endswith(".safetensors")]
    modules = [name for name in files if name.endswith(".pt")]
    parts = [damage(folder, files), json_of(folder, described), header_edit(folder, weights)]
    parts += [tensor_edit(folder, weights + modules)] * (2 if modules else 1)
    small = [name for name in described if "tokenizer.json" not in name]
    parts += [json_of(folder, small)] * 2
    return st.one_of(parts).map(_refuse_escapes)


def _refuse_escapes(mutation: Mutation) -> Mutation:
    """A file of weights outside of the folder is not the checkpoint's."""
    leads_out = mutation.kind == "../" and "weight_map" in mutation.place
    return replace(mutation, must_fail=True) if leads_out else mutation


def files_of(folder: Path, *below: str) -> list[str]:
    """Files of sub-folders, without logs."""
    found = [path for name in below for path in (folder / name).rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(folder)) for path in found if path.stat().st_size)


def other_numbers(folder: Path) -> Callable[[Mutation, Any, Any], bool]:
    """Weights have no checksum, numbers of a description may be others; the kind of policy may not change."""

    def judge(mutation: Mutation, before: Any, after: Any) -> bool:  # noqa: PLR0911 (one for each kind)
        if not np.isfinite(after["actions"]).all():
            return False
        name = Path(mutation.file).name
        if mutation.kind == "delete":  # published folders do not say what belongs to them, those of the trainer do
            return not (folder / RUN).is_dir()
        if mutation.file.endswith((".pt", ".safetensors")) and before["settings"] != after["settings"]:
            return False
        if mutation.file.endswith(".safetensors"):
            return mutation.at >= data_starts(folder / mutation.file) or mutation.kind in _OTHER_WEIGHTS
        if mutation.file.endswith(".pt"):
            return mutation.at >= 0 or mutation.kind in _OTHER_WEIGHTS
        if name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            return True  # another tokenizer
        return mutation.kind in ("-1", "0", "1.5", "huge", "drop", "rename", "reversed", "null")

    return judge


_OTHER_WEIGHTS = ("tensor float64", "tensor int64", "tensor bool", "tensor NaN", "tensor Infinity")


def test_damaged_merged_checkpoint(fuzz: Fuzzer, merged: Path) -> None:
    read = reader("", DATASET)
    fuzz(
        merged, mutations(merged, files_of(merged, ".")), read, percent=6, legitimate=other_numbers(merged), also=NAMED
    )


def test_damaged_unmerged_checkpoint(fuzz: Fuzzer, trained: Path) -> None:
    files = files_of(trained, RUN, "base")
    files = [name for name in files if "trainer_state" not in name]
    fuzz(
        trained,
        mutations(trained, files),
        reader(RUN, DATASET),
        percent=5,
        legitimate=other_numbers(trained),
        also=NAMED,
    )


def test_damaged_spatialvla_checkpoint(fuzz: Fuzzer, spatialvla: Path) -> None:
    read = reader("", "bridge_orig/1.0.0")
    files = files_of(spatialvla, ".")
    fuzz(spatialvla, mutations(spatialvla, files), read, percent=4, legitimate=other_numbers(spatialvla), also=NAMED)
