"""Parts of the tiny SpatialVLA, made once per session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prismo.models.spatialvla import SpatialVLAForConditionalGeneration, SpatialVLAProcessor

INSTRUCTIONS = ("Pick up the black bowl", "put it on the plate", "open the top drawer of the cabinet, please")


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
