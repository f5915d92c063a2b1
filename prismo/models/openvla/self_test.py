"""A cheap check after loading: does attention go where the checkpoint needs it, and does the image matter?

Both failures are silent otherwise: with causal attention an OFT checkpoint loses half of its success, and some
transformers versions dropped the image of OpenVLA without an error.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from prismo.models.openvla.modeling import OpenVLAForActionPrediction

_TEXT_TOKENS = 16
_VISION_STRIDE = 16  # a sixteenth of the patches is enough to see whether the image has an influence


class SelfTestError(RuntimeError):
    """The loaded model does not do what its configuration says."""


@torch.no_grad()
def run_self_test(model: OpenVLAForActionPrediction) -> None:
    """Run the model on four short sequences that differ in one later token or in the image.

    Raises:
        SelfTestError: a later token does (causal) or does not (bidirectional) influence an earlier one, or a black and
            a white image give the same states.
    """
    was_training = model.training
    model.eval()
    try:
        before, after, image = _influences(model)
    finally:
        model.train(was_training)
    if not math.isfinite(before + after + image):
        raise SelfTestError("self-test failed: the model computes numbers that are not finite; its weights are damaged")
    kind = model.config.attention
    if kind == "bidirectional" and not before > 0:
        raise SelfTestError(
            "attention self-test failed: a later token does not influence an earlier one, but this model needs "
            "bidirectional attention (chunks are decoded in one pass). Load it with attention='causal' only if it is "
            "a vanilla OpenVLA checkpoint; otherwise the attention function of transformers was replaced"
        )
    if kind == "causal" and before > 0:
        raise SelfTestError(
            "attention self-test failed: a later token influences an earlier one, but attention='causal' was asked"
        )
    if not after > 0 or not image > 0:
        raise SelfTestError(
            "self-test failed: "
            + ("the image does not influence the output" if after > 0 else "an earlier token has no influence")
            + "; actions would not depend on what the robot sees"
        )


def _influences(model: OpenVLAForActionPrediction) -> tuple[float, float, float]:
    """Largest change of (earlier states by a later token, later states by it, states by the image)."""
    embedding = model.get_input_embeddings()
    table = embedding.get_parameter("weight")
    size = model.config.towers[0].image_size
    channels = 3 * len(model.config.towers)
    # Of the model, not of some weight: quantised ones are integers.
    pixels = torch.ones(2, channels, size, size, device=table.device, dtype=model.dtype)
    pixels[0] *= -1
    condition = None
    ids = torch.arange(3, 3 + _TEXT_TOKENS, device=table.device)[None].repeat(3, 1)
    ids[1, -2] += 100  # the later token that differs
    embeddings = embedding(ids)
    if model.vision_backbone.film:
        condition = embeddings[:2].mean(dim=1)
    black, white = model.project_vision(pixels, condition)[:, ::_VISION_STRIDE].to(embeddings.dtype)
    sequence = torch.cat([torch.stack([black, black, white]), embeddings], dim=1)
    states, _ = model.run_llm(sequence)
    early = black.shape[0] + 2
    before = (states[0, early] - states[1, early]).abs().max()
    after = (states[0, -1] - states[1, -1]).abs().max()
    image = (states[0, early] - states[2, early]).abs().max()
    return before.item(), after.item(), image.item()
