"""Metric depth of RGB images from ZoeDepth, in the way SpatialVLA feeds it. Called by `modeling.py`.

Shape legend: B images, S image side (224), Z side of ZoeDepth's input (384).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ZoeDepthForDepthEstimation
from transformers.models.beit.modeling_beit import BeitRelativePositionBias


class ConstantPositionBias(BeitRelativePositionBias):
    """BEiT's relative position bias, computed once per weight instead of at every forward.

    ZoeDepth is frozen, yet each of its 24 layers would interpolate its table and gather 333,000 rows of it by an index
    that lies in host memory. The results take 256 MB in bf16 for the published size.
    """

    _kept: tuple[tuple[object, ...], Tensor] | None = None

    def forward(
        self, window_size: tuple[int, int], interpolate_pos_encoding: bool = False, dim_size: int | None = None
    ) -> Tensor:
        table = self.relative_position_bias_table
        if table.is_inference() or table.requires_grad:
            return super().forward(window_size, interpolate_pos_encoding, dim_size)
        key = (window_size, interpolate_pos_encoding, table.data_ptr(), table._version, table.dtype, table.device)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, super().forward(window_size, interpolate_pos_encoding, dim_size))
        return self._kept[1]


def freeze_zoe(zoe: ZoeDepthForDepthEstimation) -> None:
    """Evaluation mode, no gradients, constant position biases (the modules keep their parameters and names)."""
    zoe.eval().requires_grad_(False)
    for module in zoe.modules():
        if type(module) is BeitRelativePositionBias:
            module.__class__ = ConstantPositionBias


@torch.no_grad()
def predict_depth(zoe: ZoeDepthForDepthEstimation, pixel_values: Tensor) -> Tensor:
    """Depth [B, Z, Z] in metres of images [B, 3, S, S] in 0..1, in the network's dtype.

    ZoeDepth chooses its metric head (indoor or outdoor) by one vote over the batch, so an image's depth would depend
    on its batch mates. Here every image gets the head of its own vote: images that were outvoted are run again
    among their kind (robot data is all indoor, so there is rarely a second pass).
    """
    images = _zoe_input(pixel_values.to(next(zoe.parameters()).dtype), zoe.backbone.config.image_size)
    output = zoe(images)
    depth, logits = output.predicted_depth, output.domain_logits
    if len(images) == 1 or logits is None:
        return depth
    own = logits.argmax(-1)
    used = torch.softmax(logits.sum(0), dim=-1).argmax()
    if not (own == used).all():
        for domain in range(logits.shape[-1]):
            outvoted = (own == domain) & (own != used)
            if outvoted.any():
                depth[outvoted] = zoe(images[outvoted]).predicted_depth
    return depth


def _padding(size: int) -> int:
    return int(math.sqrt(size / 2) * 3)  # ZoeDepth's rule; 31 pixels for 224


def _zoe_input(pixel_values: Tensor, size: int) -> Tensor:
    """Reflect-pad, then resize (bicubic, corners aligned), then scale to -1..1: the order matters."""
    pad = _padding(pixel_values.shape[-1])
    padded = F.pad(pixel_values, (pad, pad, pad, pad), mode="reflect")
    return (F.interpolate(padded, size=(size, size), mode="bicubic", align_corners=True) - 0.5) / 0.5


def depth_at_image(depth: Tensor, image_size: int) -> Tensor:
    """Undo the padding of `predict_depth`: [B, Z, Z] -> [B, S, S]."""
    pad = _padding(image_size)
    size = (image_size + 2 * pad,) * 2
    resized = F.interpolate(depth[:, None], size=size, mode="bicubic", align_corners=True)[:, 0]
    return resized[:, pad : pad + image_size, pad : pad + image_size]
