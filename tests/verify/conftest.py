"""A tiny folder of every kind, facts about it, and tools to break one thing in a copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prismo.data.normalize import load_statistics
from prismo.data.synthetic import write_synthetic_libero
from prismo.testing.tiny import make_tiny_openvla
from prismo.verify import Options, Report, verify
from prismo.verify.facts import Architecture, DatasetFacts, Facts, Published, SideModule, read_facts
from prismo.verify.tensors import parameters, read_file, read_model
from tests.policies.conftest import prefer_action_tokens
from tests.spatialvla import conftest as spatialvla

NO_FORWARD = Options(forward=False)
DATASET = "libero_spatial_no_noops"
tiny_spatialvla, published = spatialvla.tiny_spatialvla, spatialvla.published  # fixtures


@pytest.fixture(scope="session")
def tiny_vanilla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OpenVLA as it was first published: action tokens, causal, which its config.json does not say."""
    folder = make_tiny_openvla(tmp_path_factory.mktemp("verify") / "vanilla")
    prefer_action_tokens(folder)
    with changed(folder / "config.json") as config:
        del config["attention"]
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with one dataset of four shards."""
    root = tmp_path_factory.mktemp("verify_rlds")
    write_synthetic_libero(root, DATASET, episodes=6, steps=20, image_size=32, shard_bytes=30_000)
    return root


@pytest.fixture(scope="session")
def facts(tiny_policy: Path, tiny_spatialvla: Path, tiny_vggt: Path) -> Facts:
    """What would be known of the tiny folders if they were published."""
    official = read_facts()
    model, vggt, spatialvla = read_model(tiny_policy), read_file(tiny_vggt), read_model(tiny_spatialvla)
    openvla_7b, vggt_1b = official.architectures["openvla-7b"], official.architectures["vggt-1b"]
    statistics = load_statistics(tiny_policy / "dataset_statistics.json")[DATASET]
    bridge = load_statistics(tiny_spatialvla / "processor_config.json")["bridge_orig/1.0.0"]
    groups = {
        group: parameters(tensor for name, tensor in vggt.items() if name.startswith(f"{group}."))
        for group in vggt_1b.groups
    }
    parts = {
        stem: parameters(read_file(tiny_policy / f"{stem}--latest_checkpoint.pt").values())
        for stem in ("action_head", "proprio_projector")
    }
    return Facts(
        architectures={
            "policy": Architecture(
                len(model),
                parameters(model.values()),
                "BF16",
                {"n_action_bins": 256, "llm_max_length": 2048, "text_config.hidden_size": 32},
                openvla_7b.normalization,
            ),
            "svla": Architecture(
                len(spatialvla),
                parameters(spatialvla.values()),
                "F32",
                {"spatial_token_num": 8194},
                action_grid=official.architectures["spatialvla-4b"].action_grid,
            ),
            "vggt": Architecture(len(vggt), parameters(vggt.values()), groups=groups),
            "vggt-1b": vggt_1b,
        },
        datasets={
            "libero_spatial": DatasetFacts(1000, 10, 4, statistics.action.q01.tolist(), statistics.action.q99.tolist()),
            "libero_goal": official.datasets["libero_goal"],
            "bridge_orig": DatasetFacts(1000, 10, None, bridge.action.q01.tolist(), bridge.action.q99.tolist()),
        },
        published={
            "test/policy": Published(
                "openvla",
                "this test",
                "policy",
                ["model.safetensors.index.json", "dataset_statistics.json", "action_head--latest_checkpoint.pt"],
                {stem: SideModule(count, "F32") for stem, count in parts.items()},
                "l1",
                "bidirectional",
                DATASET,
                [DATASET],
            ),
            "test/vanilla": Published("openvla", "this test", "policy", head="discrete", attention="causal"),
            "test/svla": Published("spatialvla", "this test", "svla", unnorm_key="bridge_orig/1.0.0"),
            "test/vggt": Published("vggt", "this test", "vggt"),
            "test/rlds": Published("rlds", "this test", keys=["libero_goal"]),
        },
    )


Copy = Callable[[Path], Path]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """`copy(folder)`: a folder of the same name that the test may break."""
    return lambda folder: shutil.copytree(folder, tmp_path / folder.name)


def differing(report: Report) -> set[str]:
    """Names of the checks that found a difference."""
    return {row.name for row in report.rows if row.finding.status == "differs"}


def found(report: Report, name: str) -> str:
    """Everything that a check says."""
    (row,) = (row for row in report.rows if row.name == name)
    return "\n".join((row.finding.text, *row.finding.details))


def statuses(report: Report) -> dict[str, str]:
    return {row.name: row.finding.status for row in report.rows}


def look(folder: Path, name: str, facts: Facts, *, forward: bool = False, **options: Any) -> Report:
    """Verify against a tiny id."""
    return verify(str(folder), Options(forward=forward, **options), name, facts)


@contextmanager
def changed(path: Path) -> Iterator[Any]:
    """Edit a JSON file."""
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


@contextmanager
def changed_weights(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Edit the tensors of the shard that holds the projector, or of the only file; the index follows."""
    index = folder / "model.safetensors.index.json"
    file = folder / "model.safetensors"
    if index.is_file():
        file = folder / json.loads(index.read_text())["weight_map"]["projector.fc3.weight"]
    tensors = load_file(file)
    yield tensors
    save_file(tensors, file, metadata={"format": "pt"})
    if index.is_file():
        with changed(index) as content:
            others = {name: other for name, other in content["weight_map"].items() if other != file.name}
            content["weight_map"] = others | dict.fromkeys(tensors, file.name)


@contextmanager
def changed_state(path: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Edit the tensors of a `.pt` file."""
    state = torch.load(path, weights_only=True)
    yield state
    torch.save(state, path)


def truncate(path: Path, keep: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
