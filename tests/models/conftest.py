"""Fixtures of the adapter tests."""

from types import SimpleNamespace

import pytest
import torch

from prismo.embodiment import LIBERO
from prismo.models.openvla import ActionTokenizer, OpenVLAForActionPrediction, PrismaticProcessor


@pytest.fixture
def tiny_model(tiny_base) -> OpenVLAForActionPrediction:
    """A fresh fp32 model that a test may change."""
    return OpenVLAForActionPrediction.from_pretrained(tiny_base, dtype=torch.float32, self_test=False)


@pytest.fixture(scope="session")
def batch(tiny_base) -> SimpleNamespace:
    """Two samples of different prompt length: `text` (placeholders, padded), `pixel_values`, `mask`."""
    text = PrismaticProcessor.from_pretrained(tiny_base).query_text(
        ["pick up the black bowl", "open the top drawer of the cabinet"], LIBERO.action_tokens, ActionTokenizer()
    )
    pixels = torch.rand(2, 6, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return SimpleNamespace(text=text, pixel_values=pixels, mask=ActionTokenizer().mask(text.labels))
