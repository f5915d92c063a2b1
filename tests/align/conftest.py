"""Tiny teachers and files for the alignment tests, built once per session."""

from pathlib import Path

import pytest
import torch

from prismo.align.random_teacher import random_vggt
from prismo.align.vggt import VGGTAggregator, VGGTConfig
from tests import golden

TINY = VGGTConfig(width=64, depth=3, patch_depth=2, mlp_width=96, image_size=56, registers=2)


@pytest.fixture(scope="session")
def teacher() -> VGGTAggregator:
    """A small aggregator with gains and biases as a trained one has them (an untrained one hides wiring errors)."""
    return golden.fill(random_vggt(config=TINY), "tiny")


@pytest.fixture(scope="session")
def vggt_state(teacher: VGGTAggregator) -> dict[str, torch.Tensor]:
    """The tensors of an official file: the aggregator's, and some of each head's."""
    state = {f"aggregator.{name}": value for name, value in teacher.state_dict().items()}
    for head in ("camera_head", "point_head", "depth_head", "track_head"):
        state[f"{head}.norm.weight"] = torch.ones(4)
    return state


@pytest.fixture(scope="session")
def vggt_file(vggt_state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small `model.pt` of the official layout."""
    path = tmp_path_factory.mktemp("vggt") / "model.pt"
    torch.save(vggt_state, path)
    return path
