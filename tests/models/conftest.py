"""Tiny checkpoints shared by the model tests; read-only."""

from pathlib import Path

import pytest

from prismo.models.tiny import make_tiny_openvla, make_tiny_policy, make_tiny_vggt


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    return make_tiny_openvla(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("tiny") / "policy")


@pytest.fixture(scope="session")
def tiny_vggt(tmp_path_factory) -> Path:
    return make_tiny_vggt(tmp_path_factory.mktemp("tiny") / "model.pt")
