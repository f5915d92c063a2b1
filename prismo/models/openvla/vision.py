"""What an OpenVLA sees with: one or two towers, their projector, and FiLM, by which the instruction modulates them.

FiLM (Perez et al., arXiv 1709.07871) is what OpenVLA-OFT uses for robots whose policies otherwise ignore the language;
`prismo.models.film` adds it to a model.

Shape legend: B batch, V views, C tower width, D LLM width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prismo.models.vit import Mlp, VisionTransformer, ViTConfig


class PrismaticVisionBackbone(nn.Module):
    """One or two towers over every camera view; features are concatenated per patch.

    `film` is True on `FiLMVisionBackbone`, whose blocks need a language embedding.
    """

    film = False

    def __init__(self, towers: Sequence[ViTConfig]) -> None:
        super().__init__()
        self.featurizer = VisionTransformer(towers[0])
        self.fused_featurizer = VisionTransformer(towers[1]) if len(towers) == 2 else None

    @property
    def width(self) -> int:
        """Feature channels per patch (1024 + 1152 for DINOv2 + SigLIP)."""
        return sum(tower.config.width for tower in self.towers)

    @property
    def towers(self) -> list[VisionTransformer]:
        """The towers in the order of their channels."""
        return [tower for tower in (self.featurizer, self.fused_featurizer) if tower is not None]

    def language_mean(self, embeddings: Tensor, action_mask: Tensor | None, real: Tensor | None) -> Tensor | None:
        """The condition of FiLM's blocks: these are none."""
        return None

    def forward(self, pixel_values: Tensor, condition: Tensor | None = None) -> Tensor:
        """Features of the second-to-last block, without final norm and prefix tokens.

        Args:
            pixel_values: [B, V * 3 * towers, H, W], per view the channels of each tower.
            condition: language embedding [B, D], only with FiLM.

        Returns:
            [B, V * patches, width], view-major, patches row-major.

        Raises:
            ValueError: channels or image size do not fit the towers.
        """
        batch, channels, height, width = pixel_values.shape
        per_view, size = 3 * len(self.towers), self.featurizer.config.image_size
        if channels % per_view or (height, width) != (size, size):
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape)}; expected [B, {per_view} * views, {size}, {size}]"
            )
        views = channels // per_view
        images = pixel_values.reshape(batch * views, len(self.towers), 3, height, width)
        if condition is not None:
            condition = condition.repeat_interleave(views, dim=0)
        features = [
            tower(images[:, i], blocks=tower.config.depth - 1, condition=condition)
            for i, tower in enumerate(self.towers)
        ]
        return torch.cat(features, dim=-1).reshape(batch, -1, self.width)


class PrismaticProjector(Mlp):
    """From vision features to LLM embeddings: three layers for fused towers, two for a single one."""

    def __init__(self, vision_width: int, llm_width: int, fused: bool) -> None:
        super().__init__(vision_width, 4 * vision_width if fused else llm_width, llm_width)
        self.fc3 = nn.Linear(llm_width, llm_width) if fused else None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.fc3 is None else self.fc3(F.gelu(x))


class FiLMBlock(nn.Module):
    """A transformer block whose residual stream is scaled and shifted by the language between its two branches."""

    trained_beside_adapters = ("scale", "shift")

    def __init__(self, block: nn.Module, condition_width: int, identity_init: bool) -> None:
        super().__init__()
        weight = block.get_parameter("norm1.weight")
        self.block = block
        # fp32 as in the published files; a policy casts the whole backbone afterwards.
        self.scale = nn.Linear(condition_width, len(weight), device=weight.device, dtype=torch.float32)
        self.shift = nn.Linear(condition_width, len(weight), device=weight.device, dtype=torch.float32)
        if identity_init:
            for parameter in (*self.scale.parameters(), *self.shift.parameters()):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens `x` [B, N, C] and language embedding `condition` [B, D] -> [B, N, C]."""
        condition = condition.to(self.scale.weight.dtype)
        gamma, beta = (layer(condition).to(x.dtype).unsqueeze(1) for layer in (self.scale, self.shift))
        return self.block(x, modulation=(gamma, beta))


class FiLMVisionBackbone(nn.Module):
    """A vision backbone with FiLM in every block, under the published names (`vision_backbone.featurizer...`).

    Args:
        vision_backbone: wrapped in place.
        condition_width: width D of the language embedding.
        identity_init: start with a modulation that changes nothing. The original starts with random layers, which
            disturbs the pre-trained towers at first; False keeps that.
        exclude_padding: leave padding tokens out of the language mean. In the original they are in it, so that the
            same instruction gives another condition in another batch; False keeps that, and published checkpoints
            need it.
    """

    film = True

    def __init__(
        self,
        vision_backbone: PrismaticVisionBackbone,
        condition_width: int,
        *,
        identity_init: bool = False,
        exclude_padding: bool = False,
    ) -> None:
        super().__init__()
        self.vision_backbone = vision_backbone
        self.exclude_padding = exclude_padding
        for tower in vision_backbone.towers:
            tower.blocks = nn.ModuleList(FiLMBlock(block, condition_width, identity_init) for block in tower.blocks)

    @property
    def towers(self) -> list[VisionTransformer]:
        """The towers in the order of their channels."""
        return self.vision_backbone.towers

    def language_mean(self, embeddings: Tensor, action_mask: Tensor | None, real: Tensor | None) -> Tensor:
        """Mean of the text embeddings except the action tokens.

        Args:
            embeddings: [B, L, D].
            action_mask: True at action tokens [B, L].
            real: True at tokens that are not padding [B, L]; only `exclude_padding` looks at it.

        Returns:
            The condition [B, D].
        """
        keep = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        if action_mask is not None:
            keep = keep & ~action_mask
        if self.exclude_padding and real is not None:
            keep = keep & real.bool()
        weights = keep.unsqueeze(-1).to(embeddings.dtype)
        return (embeddings * weights).sum(dim=1) / weights.sum(dim=1)

    def forward(self, pixel_values: Tensor, condition: Tensor) -> Tensor:
        """Features [B, V * patches, width] of `pixel_values` [B, V * 6, H, W] under the condition [B, D]."""
        return self.vision_backbone(pixel_values, condition)
