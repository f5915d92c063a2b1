"""The settings of the alignment, under the names and with the defaults of the original's command-line flags."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prismo.util.text import did_you_mean

POOLING_FUNCTIONS = ("bilinear",)
ALIGN_LOSS_TYPES = ("cosine",)


@dataclass(frozen=True)
class AlignRecipe:
    """Settings of Spatial Forcing (arXiv 2510.12276). The defaults are those of the original's code.

    `vla_layers_align` and `gain_feat_1move` say which hidden states the caller hands over (see
    `prismo.align.vision_tokens`); all others are read by `SpatialForcing`.

    Attributes:
        vla_layers_align: index into the VLA's hidden states: 0 = input embeddings, k = output of decoder layer k,
            -1 = last, after the final norm.
        vggt_layers_align: index into the teacher's layers, negative from the end.
        pooling_func: how the teacher's grid becomes the VLA's: "bilinear".
        use_vggt_pe: add the 0.1-scaled position embedding to the teacher's features.
        use_vlm_norm: LayerNorm on the VLA's hidden states in front of the projector.
        align_loss_type: "cosine".
        align_loss_coeff: factor of the alignment loss in the total loss.
        gain_feat_1move: compare teacher patch j with the VLA token of patch j + 1, as all published runs do.
    """

    vla_layers_align: int = -1
    vggt_layers_align: int = -1
    pooling_func: str = "bilinear"
    use_vggt_pe: bool = False
    use_vlm_norm: bool = False
    align_loss_type: str = "cosine"
    align_loss_coeff: float = 0.5
    gain_feat_1move: bool = True

    def __post_init__(self) -> None:
        for kind, value, options in (
            ("pooling_func", self.pooling_func, POOLING_FUNCTIONS),
            ("align_loss_type", self.align_loss_type, ALIGN_LOSS_TYPES),
        ):
            if value not in options:
                raise ValueError(did_you_mean(kind, value, options))
        if not math.isfinite(self.align_loss_coeff) or self.align_loss_coeff < 0:
            raise ValueError(f"align_loss_coeff must be a number >= 0, found {self.align_loss_coeff}")

    @classmethod
    def spatial_forcing(cls) -> AlignRecipe:
        """The published recipe: output of layer 24 of 32, last VGGT layer, LayerNorm and position embedding."""
        return cls(vla_layers_align=24, vggt_layers_align=-1, use_vggt_pe=True, use_vlm_norm=True)


def layer_index(layer: int, layers: int) -> int:
    """`layer` of a teacher with `layers` layers as an index from 0; negative values count from the end.

    Raises:
        ValueError: there is no such layer.
    """
    if not -layers <= layer < layers:
        raise ValueError(
            f"vggt_layers_align={layer} is out of range: the teacher has {layers} layers, choose {-layers} to "
            f"{layers - 1} (the published recipe uses -1, the last)"
        )
    return layer % layers
