"""VGGT and pooling against figures of the original implementation (`tests.golden`).

`tests/test_golden.py` goes on from here with the VLA's side: the whole alignment figure and its gradients.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from prismo.align.pooling import pool
from prismo.align.vggt import VGGTAggregator, infer_config, resize
from tests import golden

pytestmark = pytest.mark.slow  # the teacher sees pictures of the published size
VLA_PATCH = 14


@lru_cache(maxsize=1)
def aggregator() -> VGGTAggregator:
    """The golden aggregator; its sizes are read from the folder."""
    shapes = golden.sizes("aggregator_shapes.json")
    config = infer_config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    model = VGGTAggregator(config)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == shapes
    return golden.fill(model, golden.salt("aggregator")).requires_grad_(False).eval()


@lru_cache(maxsize=2)
def teacher_output(layer: int) -> Tensor:
    """Output of one layer on the golden images, [2, 2, P, 2C]."""
    model = aggregator()
    return model(resize(golden.images(), model.config.image_size, model.config.patch_size), layer)


def teacher_targets(layer: int, *, position: bool = True) -> Tensor:
    """What the VLA's vision tokens are compared with, [2, 512, 2C]."""
    model = aggregator()
    side = model.config.image_size // model.config.patch_size
    features = teacher_output(layer)[:, :, model.patch_start_idx :].unflatten(2, (side, side))
    rows, columns = (pixels // VLA_PATCH for pixels in golden.images().shape[-2:])
    return pool(features, (rows, columns), position=position)


def expected(name: str) -> Tensor:
    return golden.figures("train_l1_align.npz")[name]


def test_resized_images() -> None:
    resized = resize(golden.images(), aggregator().config.image_size, aggregator().config.patch_size)
    golden.close(resized[:, :, :, ::41, ::41], expected("vggt_images"))


@pytest.mark.parametrize(("figure", "layer"), [("vggt_last", -1), ("vggt_1", 1)])
def test_aggregator_output(figure: str, layer: int) -> None:
    golden.close(teacher_output(layer)[:, :, ::91, ::17], expected(figure))


def test_patch_start() -> None:
    assert aggregator().patch_start_idx == expected("patch_start").item()


@pytest.mark.parametrize(("figure", "position"), [("pooled", True), ("pooled_nope", False)])
def test_pooled_targets(figure: str, position: bool) -> None:
    golden.close(teacher_targets(-1, position=position)[:, ::37, ::17], expected(figure))
