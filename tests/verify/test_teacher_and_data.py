"""VGGT and RLDS: whole ones pass, and one wrong thing is named by the check that is meant for it, and by no other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prismo.verify import Options, page, verify
from prismo.verify.facts import Facts
from tests.verify.conftest import (
    DATASET,
    NO_FORWARD,
    Copy,
    changed,
    changed_state,
    differing,
    found,
    look,
    statuses,
    truncate,
)

# ------------------------------------------------------------------------------------------------------------- VGGT


def test_vggt_passes(tiny_vggt: Path, facts: Facts) -> None:
    report = look(tiny_vggt, "test/vggt", facts, forward=True)
    assert set(statuses(report).values()) == {"ok"}, page(report)
    assert "[2, 18, 18, 128]" in found(report, "features")


def test_a_folder_with_vggt_and_no_id(tiny_vggt: Path) -> None:
    report = verify(str(tiny_vggt.parent), NO_FORWARD, "none")
    assert {name for name, status in statuses(report).items() if status == "not known"} == {"counts", "groups"}
    assert statuses(report)["features"] == "skipped"
    assert found(report, "features") == "--no_forward"


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: state.pop(name)


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: state.update({name: value})


NORM = "aggregator.frame_blocks.1.norm1.weight"


@pytest.mark.parametrize(
    ("change", "check", "text"),
    [
        (drop(NORM), "tensor names", "missing: expected `frame_blocks.1.norm1.weight`"),
        (drop("aggregator.patch_embed.pos_embed"), "tensor names", "aggregator.patch_embed.pos_embed is missing"),
        (put("policy.weight", torch.ones(1)), "tensor names", "found `policy.weight`"),
        (put(NORM, torch.ones(65)), "tensor shapes", "expected [64], found [65]"),
        (put(NORM, torch.ones(64).half()), "tensor types", "expected F32, found F16"),
        (put("depth_head.more", torch.ones(5)), "counts", "parameters: expected"),
        (put(NORM, torch.full((64,), float("nan"))), "features", "expected finite numbers"),
        (
            lambda state: state["aggregator.patch_embed.patch_embed.proj.weight"].zero_(),
            "black image",
            "the same features",
        ),
    ],
)
def test_one_wrong_thing_in_vggt(
    change: Callable[[dict[str, torch.Tensor]], object],
    check: str,
    text: str,
    tiny_vggt: Path,
    tmp_path: Path,
    facts: Facts,
) -> None:
    file = tmp_path / "model.pt"
    file.write_bytes(tiny_vggt.read_bytes())
    with changed_state(file) as state:
        change(state)
    report = look(file, "test/vggt", facts, forward=check in ("features", "black image"))
    assert differing(report) - {"groups"} == {check}, page(report)
    assert text in found(report, check)


def test_a_truncated_vggt(tiny_vggt: Path, tmp_path: Path, facts: Facts) -> None:
    file = tmp_path / "model.pt"
    file.write_bytes(tiny_vggt.read_bytes())
    truncate(file)
    report = look(file, "test/vggt", facts)
    assert differing(report) == {"weight files"}
    assert "model.pt is truncated" in found(report, "weight files")


# ------------------------------------------------------------------------------------------------------------- RLDS


def test_a_dataset_passes(dataset: Path) -> None:
    """Of its own name it is not the published one: our builder names the dataset like the folder."""
    report = verify(str(dataset / DATASET), Options())
    assert not report.differs, page(report)
    assert {name for name, status in statuses(report).items() if status == "not known"} == {
        "description",
        "statistics of this id",
    }
    assert "2 cameras (32 x 32), action 7, state 8" in found(report, "features")


def test_every_dataset_below_a_root(dataset: Path, tmp_path: Path) -> None:
    for name in (DATASET, "my_robot"):
        shutil.copytree(dataset / DATASET, tmp_path / name)
    report = verify(str(tmp_path), Options())
    assert not report.differs, page(report)
    assert statuses(report)[f"{DATASET}: windows"] == "ok"
    assert statuses(report)["my_robot: records"] == "ok"
    assert "no description of a dataset `my_robot` here" in found(report, "my_robot: features")


def test_a_dataset_that_claims_to_be_the_published_one(dataset: Path, facts: Facts, copy: Copy) -> None:
    report = look(copy(dataset / DATASET), "test/rlds", facts)
    assert differing(report) == {"instructions", "statistics of this id"}, page(report)
    assert "tasks: expected 10, found 4" in found(report, "instructions")
    assert "steps: expected 52,042" in found(report, "statistics of this id")


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "1.0.0").glob("*.tfrecord*"))


def flip_a_byte(folder: Path) -> None:
    data = bytearray(shards(folder)[1].read_bytes())
    data[len(data) // 2] ^= 255
    shards(folder)[1].write_bytes(data)


def count_wrong(folder: Path) -> None:
    with changed(folder / "1.0.0" / "dataset_info.json") as info:
        info["splits"][0]["shardLengths"][0] = "5"


def rename_a_camera(folder: Path) -> None:
    path = folder / "1.0.0" / "features.json"
    path.write_text(path.read_text().replace('"wrist_image"', '"hand_image"'))


@pytest.mark.parametrize(
    ("break_it", "check", "text"),
    [
        (lambda folder: shards(folder)[0].unlink(), "description", "lacks 1 of"),
        (lambda folder: (folder / "1.0.0" / "features.json").unlink(), "description", "has no features.json"),
        (lambda folder: truncate(shards(folder)[0]), "records", "ends in the middle of"),
        (flip_a_byte, "records", "wrong checksum"),
        (count_wrong, "records", "expected 5, found"),
        (rename_a_camera, "features", "unknown image feature 'observation/wrist_image'"),
    ],
)
def test_one_wrong_thing_in_a_dataset(
    break_it: Callable[[Path], None], check: str, text: str, dataset: Path, copy: Copy
) -> None:
    folder = copy(dataset / DATASET)
    break_it(folder)
    report = verify(str(folder), Options())
    assert differing(report) == {check}, page(report)
    assert text in found(report, check)
