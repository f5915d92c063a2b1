"""The facts hold together, and fit folders of the published size: headers without weights, which take no room."""

from __future__ import annotations

import json
import math
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import prismo
from prismo.align.vggt import VGGTAggregator
from prismo.data.normalize import DatasetStats, FieldStats, dump_statistics
from prismo.data.specs import SPECS
from prismo.models.heads import L1RegressionActionHead
from prismo.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction
from prismo.models.projectors import ProprioProjector
from prismo.models.spatialvla import SpatialVLAForConditionalGeneration
from prismo.models.spatialvla.checkpoint import official_name
from prismo.models.spatialvla.modeling import read_config
from prismo.models.weight_files import DTYPES
from prismo.verify import Options, page, verify
from prismo.verify.facts import PUBLISHED, read_facts
from prismo.verify.kinds import kinds
from prismo.verify.sample import FILE as SAMPLE
from prismo.verify.tensors import Shapes, on_meta, shapes_of
from tests.verify.conftest import NO_FORWARD, differing, found, statuses

FACTS = read_facts()


def test_what_is_not_python_is_packaged() -> None:
    package = Path(prismo.__file__).parent
    data = tomllib.loads((package.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {package.parent / name.replace(".", "/") / file for name, files in data.items() for file in files}
    assert packaged >= {PUBLISHED, SAMPLE}
    assert packaged == {path for path in package.rglob("*.*") if path.suffix not in (".py", ".pyc")}


@pytest.mark.parametrize("name", FACTS.published)
def test_every_entry_is_complete(name: str) -> None:
    known = FACTS.get(name)
    assert known.kind in kinds()
    assert known.source
    assert (known.architecture in FACTS.architectures) == (known.kind != "rlds")
    assert all(FACTS.dataset(key) is not None for key in known.keys or ())
    assert known.unnorm_key is None or known.keys is None or known.unnorm_key in known.keys
    if known.kind == "rlds":
        assert name.rpartition("/")[2] in SPECS


def test_quantiles_are_in_order() -> None:
    for known in FACTS.datasets.values():
        if known.q01 is not None and known.q99 is not None:
            assert len(known.q01) == len(known.q99) == 7
            assert all(low < high for low, high in zip(known.q01, known.q99, strict=True))


def test_a_folder_is_compared_with_the_checkpoint_it_is_named_after(tmp_path: Path) -> None:
    assert FACTS.identify(tmp_path / "openvla-7b") == "openvla/openvla-7b"
    cached = tmp_path / "models--facebook--VGGT-1B" / "snapshots" / "0123"
    assert FACTS.identify(cached) == "facebook/VGGT-1B"
    assert FACTS.identify(tmp_path / "models--somebody--openvla-7b" / "snapshots" / "0123") is None
    assert FACTS.identify(tmp_path / "libero_goal_no_noops") is None  # anybody's dataset has this name
    with pytest.raises(ValueError, match=r"Did you mean 'openvla/openvla-7b'"):
        FACTS.get("openvla/openvla7b")


# --------------------------------------------------------------------------------------------------- published sizes


def write_headers(folder: Path, shapes: Shapes, dtype: str) -> None:
    """Two shards and their index; the weights are holes in the files."""
    weight_map: dict[str, str] = {}
    names = list(shapes)
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        header, end = {}, 0
        for name in part:
            start, end = end, end + DTYPES[dtype].itemsize * math.prod(shapes[name])
            header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        path = folder / f"model-0000{number}-of-00002.safetensors"
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        weight_map |= dict.fromkeys(part, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def hollow(shapes: Shapes, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of these shapes that a file stores as one number each."""
    return {name: torch.zeros(1, dtype=dtype).expand(shape) for name, shape in shapes.items()}


@pytest.fixture
def oft(tiny_policy: Path, tmp_path: Path) -> Path:
    """openvla-7b-oft-finetuned-libero-spatial in full size, without its weights."""
    folder = tmp_path / "openvla-7b-oft-finetuned-libero-spatial"
    folder.mkdir()
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_policy / name, folder)
    OpenVLAConfig().save_pretrained(folder)
    with on_meta():
        write_headers(folder, shapes_of(OpenVLAForActionPrediction(OpenVLAConfig())), "BF16")
        parts = {
            "action_head": (shapes_of(L1RegressionActionHead()), torch.bfloat16),
            "proprio_projector": (shapes_of(ProprioProjector()), torch.float32),
        }
    for stem, (shapes, dtype) in parts.items():
        state = {f"module.{name}": value for name, value in hollow(shapes, dtype).items()}
        torch.save(state, folder / f"{stem}--150000_checkpoint.pt")
    known = FACTS.datasets["libero_spatial"]
    low, high = np.array(known.q01), np.array(known.q99)
    action = FieldStats((low + high) / 2, high - low, low, high, low, high, np.arange(7) < 6)
    ones = np.ones(8)
    proprio = FieldStats(0 * ones, ones, -ones, ones, -ones, ones)
    stats = DatasetStats(action, proprio, known.transitions, known.trajectories)
    dump_statistics({"libero_spatial_no_noops": stats}, folder / "dataset_statistics.json")
    return folder


def test_the_facts_fit_openvla_oft(oft: Path) -> None:
    """15 GB by their headers: 982 tensors, 7,541,237,184 parameters, and the heads."""
    report = verify(str(oft), NO_FORWARD)
    assert report.compared_with is not None
    assert report.compared_with[0] == "moojink/openvla-7b-oft-finetuned-libero-spatial"
    assert not report.differs, page(report)
    assert "7,541,237,184 parameters in 982 tensors" in found(report, "counts")
    assert found(report, "action head").startswith("151,117,831 parameters, BF16")
    skipped = {name for name, status in statuses(report).items() if status == "skipped"}
    assert skipped == {"self-test", "prediction", "black image", "time and memory"}


def test_a_model_that_does_not_fit_into_memory_is_not_loaded(oft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prismo.verify.memory.free_memory", lambda device: 8e9)
    report = verify(str(oft), Options(device="cpu"))
    assert found(report, "self-test") == "needs 34.7 GB in float32, 8.0 GB are free on cpu"
    assert not report.differs


def test_another_size_than_the_published_one_is_noticed(oft: Path) -> None:
    config = OpenVLAConfig(text_config={"num_hidden_layers": 31})
    config.save_pretrained(oft)
    with on_meta():
        write_headers(oft, shapes_of(OpenVLAForActionPrediction(config)), "BF16")
    report = verify(str(oft), NO_FORWARD)
    assert differing(report) == {"configuration", "counts"}, page(report)
    assert "`text_config.num_hidden_layers`: expected 32, found 31" in found(report, "configuration")


def test_the_facts_fit_vggt(tmp_path: Path) -> None:
    folder = tmp_path / "VGGT-1B"
    folder.mkdir()
    with on_meta():
        shapes = {f"aggregator.{name}": shape for name, shape in shapes_of(VGGTAggregator()).items()}
    architecture = FACTS.architectures["vggt-1b"]
    for group, count in architecture.groups.items():  # heads: as many tensors as are missing, in any shapes
        if group != "aggregator":
            number = {"camera_head": 69, "point_head": 62, "depth_head": 62, "track_head": 394}[group]
            shapes |= {f"{group}.{i}": (1,) for i in range(number - 1)}
            shapes[f"{group}.rest"] = (count - number + 1,)
    torch.save(hollow(shapes, torch.float32), folder / "model.pt")
    report = verify(str(folder), NO_FORWARD)
    assert not report.differs, page(report)
    assert "1,256,537,516 parameters in 1,797 tensors" in found(report, "counts")


def test_the_facts_fit_spatialvla(published: Path, tiny_spatialvla: Path, tmp_path: Path) -> None:
    """The published small files; weights are holes, and the tokenizer is another one."""
    folder = tmp_path / "spatialvla-4b-mix-224-pt"
    folder.mkdir()
    for path in published.glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(tiny_spatialvla / "tokenizer.json", folder / "tokenizer.json")
    model = SpatialVLAForConditionalGeneration.empty(read_config(folder))
    shapes = {official_name(name): tuple(value.shape) for name, value in model.named_parameters()}
    listed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(listed) == set(shapes)
    write_headers(folder, shapes, "BF16")
    report = verify(str(folder), NO_FORWARD)
    assert differing(report) == {"tokenizer"}, page(report)
    assert "id of '<image>': expected 257152, found 600" in found(report, "tokenizer")
    assert "3 actions as published" in found(report, "action grid")
    assert "4,027,854,731 parameters in 1,382 tensors" in found(report, "counts")
    assert "counts of 28 datasets, quantiles of 3" in found(report, "statistics of this id")
