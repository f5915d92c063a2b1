"""Fixtures that several parts of the suite share; expensive things are made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prismo.sim.gl import GLBackend, GLUnavailableError, choose_backend
from prismo.testing.tiny import make_tiny_openvla, make_tiny_policy, make_tiny_vggt

pytest_plugins = ("tests.skips",)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors are slower on many threads, ten times so where other processes want the same cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base checkpoint in the layout of openvla-7b; read-only."""
    return make_tiny_openvla(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned checkpoint (L1 head, proprio, merged weights) as OFT and Spatial-Forcing publish theirs."""
    return make_tiny_policy(tmp_path_factory.mktemp("tiny") / "policy")


@pytest.fixture(scope="session")
def tiny_vggt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VGGT `model.pt`."""
    return make_tiny_vggt(tmp_path_factory.mktemp("tiny") / "model.pt")


@pytest.fixture(scope="session")
def drawing() -> GLBackend:
    """What pictures of the simulator are drawn with; where nothing can draw, the tests that need it are skipped."""
    try:
        return choose_backend()
    except GLUnavailableError:
        pytest.skip("nothing here can draw: `make gl` installs what is missing, or says what to type")
