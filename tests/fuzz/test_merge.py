"""Merging a damaged adapter, checkpoint or base: the right weights and a whole folder, or no folder at all."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from safetensors.torch import load_file

from prismo.merging.merge import merge
from prismo.policies.checkpoint import open_checkpoint
from tests.fuzz.harness import Fuzzer
from tests.fuzz.mutate import Mutation, damage, data_starts, header_edit, json_of
from tests.fuzz.tensors import tensor_edit
from tests.fuzz.test_checkpoints import RUN, files_of

ADAPTER = f"{RUN}/lora_adapter"
_IN_FINGERPRINT = 4096  # bytes of every tensor of the base


def read_merged(folder: Path) -> Any:
    """Every file that a merge into another folder writes, and what kind of policy they are."""
    os.chdir(folder)
    try:
        merge("base", RUN, "merged", progress=False)
    except Exception:
        left = [path.name for path in Path("merged").glob("*")]
        assert not left, f"a merge that failed left {', '.join(left)}"
        raise
    policy = open_checkpoint("merged")
    digests = {path.name: _digest(path) for path in sorted(Path("merged").iterdir()) if path.name != "merge.json"}
    return digests | {
        "kind": [str(value) for value in (policy.head, policy.proprio_dim, policy.chunk, policy.attention)]
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def other_weights(folder: Path) -> Any:
    """What is no weight is copied as it is; the adapter's numbers have no checksum, the base's a fingerprint."""

    def judge(mutation: Mutation, before: Any, after: Any) -> bool:
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        changed -= {"README.md"}  # the card, which says what the other files say
        name = Path(mutation.file).name
        if mutation.file.endswith(".safetensors"):
            in_data = mutation.at >= data_starts(folder / mutation.file)
            whole = mutation.file.startswith("base/") and _in_fingerprint(folder / mutation.file, mutation.at)
            return {"model"} == {name.partition("-")[0] for name in changed} and in_data and not whole
        if name == "dataset_statistics.json":  # its numbers have no checksum, and the merged config.json repeats them
            return changed <= {name, "config.json"} and mutation.kind == "flip"
        return changed <= {name}

    return judge


def _in_fingerprint(path: Path, at: int) -> bool:
    """Whether a byte of the file is one by which an adapter knows its base."""
    place = at - data_starts(path)
    for value in load_file(path).values():  # in the order of the file
        size = value.numel() * value.element_size()
        if 0 <= place < size:
            return place < _IN_FINGERPRINT
        place -= size
    return False


def test_damaged_merge(fuzz: Fuzzer, trained: Path) -> None:
    files = [name for name in files_of(trained, RUN, "base") if "trainer_state" not in name]
    described = [name for name in files if name.endswith(".json") and "tokenizer" not in name]
    weights = [name for name in files if name.endswith(".safetensors")]
    adapter = [name for name in weights if name.startswith(ADAPTER)]
    kinds = [damage(trained, files), json_of(trained, described), header_edit(trained, weights)]
    kinds += [tensor_edit(trained, adapter), json_of(trained, [f"{ADAPTER}/adapter_config.json"])]
    outside = st.one_of(kinds).map(
        lambda mutation: replace(mutation, must_fail=mutation.kind == "../" and "weight_map" in mutation.place)
    )
    fuzz(trained, outside, read_merged, percent=7, legitimate=other_weights(trained))
