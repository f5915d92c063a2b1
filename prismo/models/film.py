"""FiLM: the instruction modulates every block of both vision towers (Perez et al., arXiv 1709.07871).

OpenVLA-OFT uses it for robots whose policies otherwise ignore the language. `add_film` wraps the vision backbone of a
model in place; trained wrappers are stored whole as `vision_backbone--*_checkpoint.pt` and read by
`load_film_backbone`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prismo.models.adapter_file import ADAPTER_FOLDER
from prismo.models.component_files import Step, find_component, load_state, read_component
from prismo.models.lora import LoraSpec, merged_weight, read_adapter_spec
from prismo.models.publish import read_marker
from prismo.models.vit import VisionTransformer

if TYPE_CHECKING:
    from prismo.models.openvla import OpenVLAForActionPrediction
    from prismo.models.openvla.modeling import PrismaticVisionBackbone


class FiLMBlock(nn.Module):
    """A transformer block whose residual stream is scaled and shifted by the language between its two branches."""

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

    @property
    def width(self) -> int:
        """Feature channels per patch."""
        return self.vision_backbone.width

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


def add_film(
    model: OpenVLAForActionPrediction, *, identity_init: bool = False, exclude_padding: bool = False
) -> FiLMVisionBackbone:
    """Wrap the vision backbone of `model` in place; its LoRA layers, if any, stay where they are."""
    backbone = model.vision_backbone
    if isinstance(backbone, FiLMVisionBackbone):
        raise ValueError("the vision backbone already has FiLM; wrapping it twice would rename its weights")
    wrapped = FiLMVisionBackbone(backbone, model.llm_dim, identity_init=identity_init, exclude_padding=exclude_padding)
    model.vision_backbone = wrapped
    return wrapped


def load_film_backbone(model: OpenVLAForActionPrediction, folder: str | Path, step: Step | None = None) -> Path:
    """Give `model` the trained FiLM backbone of a checkpoint folder, with its LoRA merged into the weights.

    The originals keep the LoRA layers of these files apart and pay for them in every prediction. The scaling comes from
    `lora_adapter/adapter_config.json` or `merge.json` if one is there, else from the recipe (`alpha = min(rank, 16)`).

    Returns:
        The file that was read.

    Raises:
        FileNotFoundError, ValueError: as `prismo.models.component_files.load_component`.
    """
    path = find_component(folder, "vision_backbone", step)
    state = _merge_lora(read_component(path), path)
    if not model.vision_backbone.film:
        add_film(model)
    load_state(model.vision_backbone, state, path)
    return path


def _merge_lora(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`state` without LoRA tensors, their product added to the weights."""
    merged = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        module, found, parameter = name.partition(".base_layer.")
        if not found:
            merged[name] = value
        elif parameter == "weight" and f"{module}.lora_A.default.weight" in state:
            a, b = state[f"{module}.lora_A.default.weight"], state.get(f"{module}.lora_B.default.weight")
            if b is None or (len(b), *a.shape[1:], len(a)) != (*value.shape, b.shape[1]):
                raise ValueError(f"{path}: the LoRA factors of {module} do not fit its weight; copy it again")
            merged[f"{module}.weight"] = merged_weight(value, a, b, _lora_scale(path.parent, rank=len(a)))
        else:
            merged[f"{module}.{parameter}"] = value
    return merged


def _lora_scale(folder: Path, rank: int) -> float:
    """As the adapter beside the file says, or the record of its merge where the adapter stayed behind."""
    if (folder / ADAPTER_FOLDER).is_dir():
        return read_adapter_spec(folder / ADAPTER_FOLDER).scale
    marker = read_marker(folder)
    return LoraSpec(rank).scale if marker is None else marker.scale
