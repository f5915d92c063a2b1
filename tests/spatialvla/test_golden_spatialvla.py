"""Equality with the original implementation (fp32) on weights drawn from names, see tests/golden/."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from prismo.models.spatialvla import (
    CameraIntrinsics,
    SpatialVLAConfig,
    SpatialVLAForConditionalGeneration,
    SpatialVLATextBatch,
    TokenDecoder,
)
from prismo.models.spatialvla.checkpoint import official_name
from prismo.models.spatialvla.modeling import attention_bias, token_positions
from tests import golden
from tests.golden import close

CAMERA = CameraIntrinsics(218.26, 291.01, 111.83, 111.79, 224, 224)


@pytest.fixture(scope="module")
def vla() -> SpatialVLAForConditionalGeneration:
    config = SpatialVLAConfig(**golden.sizes("spatialvla_config.json"), geometry="exact")  # the original ran in fp32
    model = SpatialVLAForConditionalGeneration.random(config, dtype=torch.float32)
    shapes = {official_name(name): list(p.shape) for name, p in model.named_parameters()}
    assert shapes == golden.sizes("spatialvla_shapes.json")
    return golden.fill(model, golden.salt(), official_name).requires_grad_(False)


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return golden.figures("spatialvla.npz")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return golden.uniform_input("svla_img", 2, 3, 224, 224)


@pytest.fixture(scope="module")
def features(vla: SpatialVLAForConditionalGeneration, images: Tensor) -> Tensor:
    return vla.image_features(images, CAMERA.matrix(224).expand(2, 3, 3))


@pytest.fixture(autouse=True)
def _bidirectional(vla: SpatialVLAForConditionalGeneration) -> Iterator[None]:
    yield
    vla.config.prefix_mask = "bidirectional"


def states(
    vla: SpatialVLAForConditionalGeneration, ids: Tensor, prompt: int, features: Tensor, layers: tuple[int, ...] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """Hidden states [1, L, D] of one sample whose first `prompt` ids are the prefix."""
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    types[:, prompt:] = 1
    bias = attention_bias(mask, types, vla.config.prefix_mask, torch.float32)
    return vla.run_llm(vla.embed(ids, features), bias, token_positions(mask), hidden_layers=layers)


def test_depth_of_each_image(
    vla: SpatialVLAForConditionalGeneration, images: Tensor, expected: dict[str, Tensor]
) -> None:
    close(vla.predict_depth(images)[:, ::31, ::31], expected["depth"])


def test_image_features(vla: SpatialVLAForConditionalGeneration, features: Tensor, expected: dict[str, Tensor]) -> None:
    unscaled = features[:, ::17] / vla.llm_dim**0.5  # the original stored them before Gemma2's input scale
    close(unscaled, expected["image_features_batch"])
    close(unscaled, expected["image_features_single"])


def test_loss(vla: SpatialVLAForConditionalGeneration, images: Tensor, expected: dict[str, Tensor]) -> None:
    ids, prompt = expected["full"][:1], expected["prompt"].shape[1]
    types = torch.zeros_like(ids)
    types[:, prompt:] = 1
    output = vla(
        ids, images[:1], CAMERA.matrix(224)[None], token_type_ids=types, labels=ids.masked_fill(types == 0, -100)
    )
    close(output.loss[None], expected["loss"][None], rel=1e-3)


@pytest.mark.parametrize(("mask", "figure"), [("bidirectional", "logits_train"), ("causal", "logits_causal")])
def test_hidden_states_and_logits(
    vla: SpatialVLAForConditionalGeneration,
    features: Tensor,
    expected: dict[str, Tensor],
    mask: str,
    figure: str,
) -> None:
    vla.config.prefix_mask = mask
    hidden, kept = states(vla, expected["full"][:1], expected["prompt"].shape[1], features[:1], (1,))
    if mask == "bidirectional":
        close(kept[1][0, ::23], expected["hidden1"])
        close(hidden[0, ::23], expected["last_hidden"])
    close(vla.lm_logits(hidden)[0, vla.config.num_image_tokens :: 3, ::97], expected[figure])


def test_greedy_decoding(
    vla: SpatialVLAForConditionalGeneration, images: Tensor, features: Tensor, expected: dict[str, Tensor]
) -> None:
    prompt, wanted = expected["prompt"][:1], expected["greedy"][None]
    ones = torch.ones_like(prompt)
    text = SpatialVLATextBatch(prompt, ones, torch.zeros_like(prompt), torch.full_like(prompt, -100))
    decoder = TokenDecoder(vla, slots=(), tokens=wanted.shape[1], unconstrained=True)
    ids = decoder(text, images[:1], CAMERA.matrix(224)[None])
    assert ids.tolist() == wanted.tolist()
    # The same without a cache: logits before the first and before the last of these tokens.
    sequence = torch.cat((prompt, wanted[:, :-1]), dim=1)
    logits = vla.lm_logits(states(vla, sequence, prompt.shape[1], features[:1])[0])[0]
    close(logits[prompt.shape[1] - 1, ::97], expected["first"])
    close(logits[-1, vla.config.action_token_begin_idx :: 371], expected["act_first"])
