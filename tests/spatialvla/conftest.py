"""A tiny SpatialVLA, made once per session, and small files of the published one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from prismo.models.spatialvla import SpatialVLAForConditionalGeneration, SpatialVLAProcessor
from prismo.testing.tiny_spatialvla import make_tiny_spatialvla

INSTRUCTIONS = ("Pick up the black bowl", "put it on the plate", "open the top drawer of the cabinet, please")
_TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tiny_spatialvla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder in the official layout (fp32)."""
    return make_tiny_spatialvla(tmp_path_factory.mktemp("spatialvla") / "tiny")


@pytest.fixture(scope="session")
def model(tiny_spatialvla: Path) -> SpatialVLAForConditionalGeneration:
    """For tests that leave it as it is."""
    return SpatialVLAForConditionalGeneration.from_pretrained(tiny_spatialvla).requires_grad_(False)


@pytest.fixture
def fresh(tiny_spatialvla: Path) -> SpatialVLAForConditionalGeneration:
    """For tests that change it."""
    return SpatialVLAForConditionalGeneration.from_pretrained(tiny_spatialvla)


@pytest.fixture(scope="session")
def processor(tiny_spatialvla: Path) -> SpatialVLAProcessor:
    return SpatialVLAProcessor.from_pretrained(tiny_spatialvla)


@pytest.fixture(scope="session")
def frames() -> list[np.ndarray]:
    """Three camera frames: noise, a gradient, black."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 256, dtype=np.uint8)
    gradient = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(90)), axis=-1)
    return [rng.integers(0, 256, (256, 256, 3), dtype=np.uint8), gradient, np.zeros((224, 224, 3), np.uint8)]


@pytest.fixture(scope="session")
def published() -> Path:
    """Small files of the published spatialvla-4b-mix-224-pt: those of tests/golden/, or a whole checkpoint."""
    return Path(os.environ.get("PRISMO_SPATIALVLA") or _TESTS / "golden" / "spatialvla-4b-mix-224-pt")
