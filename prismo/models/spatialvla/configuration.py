"""Configuration of SpatialVLA checkpoints (`model_type: spatialvla`), as published; `modeling.py` builds from it."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args

import torch
from transformers import Gemma2Config, PreTrainedConfig, SiglipVisionConfig, ZoeDepthConfig

from prismo.util.text import did_you_mean

Geometry = Literal["parity", "exact"]
PrefixMask = Literal["bidirectional", "causal"]
C = TypeVar("C", bound=PreTrainedConfig)


class SpatialVLAConfig(PreTrainedConfig):
    """Settings of a SpatialVLA (Qu et al., "SpatialVLA", arXiv 2501.15830); the defaults are the published 4B models.

    Args:
        text_config, vision_config, vision_zoe_config: Gemma2, SigLIP and ZoeDepth; differences from the 4B sizes.
        image_token_index: id of the placeholders that image features replace.
        action_token_begin_idx: id of the first of `spatial_token_num` action tokens, the last ids of the vocabulary.
        ego3d_patch_reso: back-projected points per side of one SigLIP patch.
        n_freqs: sinusoid frequencies per coordinate.
        use_vision_zoe: False leaves out depth and the 3D position encoding (ablation).
        geometry: "parity" rounds the pixel grid, the intrinsics and the image scale to bf16, as the released weights
            were trained; "exact" computes the geometry in fp32. Published files do not say; they mean "parity".
        prefix_mask: attention within image and prompt. The authors train with "causal" (their FlashAttention path)
            and predict with "bidirectional".
        **kwargs: whatever else the file holds, kept as read (`hidden_size` 2048 is a left-over that nothing uses).

    Raises:
        ValueError: unknown switch, or sizes that contradict each other.
    """

    model_type = "spatialvla"
    # transformers reads this class attribute.
    sub_configs = {  # noqa: RUF012
        "text_config": Gemma2Config,
        "vision_config": SiglipVisionConfig,
        "vision_zoe_config": ZoeDepthConfig,
    }

    text_config: Any = None
    vision_config: Any = None
    vision_zoe_config: Any = None
    image_token_index: int = 257152
    action_token_begin_idx: int = 257153
    spatial_token_num: int = 8194
    ego3d_patch_reso: int = 2
    n_freqs: int = 8
    use_vision_zoe: bool = True
    geometry: Geometry = "parity"
    prefix_mask: PrefixMask = "bidirectional"
    bos_token_id: int = 2
    eos_token_id: int = 1
    pad_token_id: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _sub_config(Gemma2Config, self.text_config, _TEXT_4B)
        self.vision_config = _sub_config(SiglipVisionConfig, self.vision_config, _VISION_4B)
        self.vision_zoe_config = _sub_config(ZoeDepthConfig, self.vision_zoe_config, zoedepth_sizes())
        if not kwargs.pop("use_spatial_token", True):
            raise ValueError("use_spatial_token is false: such models were never published and are not supported")
        self._check()
        kwargs.pop("_vocab_size", None)  # repeats the text vocabulary
        super().__post_init__(**kwargs | {"tie_word_embeddings": False})

    def _check(self) -> None:
        for name, value, options in (
            ("geometry", self.geometry, get_args(Geometry)),
            ("prefix_mask", self.prefix_mask, get_args(PrefixMask)),
        ):
            if value not in options:
                raise ValueError(did_you_mean(name, value, options))
        vocabulary = self.text_config.vocab_size
        if self.action_token_begin_idx + self.spatial_token_num != vocabulary:
            raise ValueError(
                f"the action tokens {self.action_token_begin_idx} + {self.spatial_token_num} must end the vocabulary, "
                f"which has {vocabulary} tokens"
            )
        if self.patch_pixels % self.ego3d_patch_reso:
            raise ValueError(
                f"ego3d_patch_reso {self.ego3d_patch_reso} does not divide the patch size {self.patch_pixels}; "
                "the published checkpoints use 2"
            )

    @property
    def image_pixels(self) -> int:
        """Pixels per side of SigLIP's images (224)."""
        return _square(self.vision_config.image_size)

    @property
    def patch_pixels(self) -> int:
        """Pixels per side of a patch (14)."""
        return _square(self.vision_config.patch_size)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the weights in the files, bf16 where config.json does not say."""
        return self.dtype if isinstance(self.dtype, torch.dtype) else torch.bfloat16

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one image (256 for 224 pixels and patches of 14)."""
        return (self.image_pixels // self.patch_pixels) ** 2

    def to_diff_dict(self) -> dict[str, Any]:
        """What goes into config.json: the published schema, sub-configurations in full, readable by transformers 4."""
        values = super().to_diff_dict() | {"_vocab_size": self.text_config.vocab_size, "use_spatial_token": True}
        for name in self.sub_configs:
            values[name] = getattr(self, name).to_dict()
        return _as_transformers_4(values)


_TEXT_4B = {"vocab_size": 265347, "eos_token_id": [1, 107], "num_key_value_heads": 4, "hidden_act": "gelu_pytorch_tanh"}
_VISION_4B = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}


def zoedepth_sizes(hidden: int = 1024, layers: int = 24, heads: int = 16, fusion: int = 256) -> dict[str, Any]:
    """A ZoeDepth configuration shaped like Intel/zoedepth-nyu-kitti (the defaults); smaller numbers are for tests."""
    stages = [layers * i // 4 for i in (1, 2, 3, 4)]
    return {
        "backbone_config": {
            "model_type": "beit",
            "image_size": 384,
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "use_relative_position_bias": True,
            "layer_scale_init_value": 0.1,
            "reshape_hidden_states": False,
            "out_features": [f"stage{stage}" for stage in stages],
        },
        "neck_hidden_sizes": [fusion, 2 * fusion, 4 * fusion, 4 * fusion],
        "fusion_hidden_size": fusion,
        "bottleneck_features": fusion,
        "bin_embedding_dim": fusion // 2,
        "num_relative_features": fusion // 8,
        "bin_configurations": [
            {"name": "nyu", "n_bins": 64, "min_depth": 0.001, "max_depth": 10.0},
            {"name": "kitti", "n_bins": 64, "min_depth": 0.001, "max_depth": 80.0},
        ],
        "num_patch_transformer_layers": 4,
        "patch_transformer_hidden_size": 128,
        "patch_transformer_intermediate_size": 4 * fusion,
        "patch_transformer_num_attention_heads": 4,
    }


def _sub_config(kind: type[C], value: Any, sizes_4b: dict[str, Any]) -> C:
    if not isinstance(value, kind):
        value = kind(**{**sizes_4b, **(value or {})})
    if kind is Gemma2Config:
        value.tie_word_embeddings = False  # the checkpoints hold an lm_head of their own
    return value


def _square(pixels: int | list[int] | tuple[int, int]) -> int:
    if not isinstance(pixels, int):
        raise ValueError(f"vision_config: expected square images and patches, one number each, found {pixels}")
    return pixels


def _as_transformers_4(values: dict[str, Any]) -> dict[str, Any]:
    """Without private and version keys, `dtype` under its former name, in every nested dictionary."""
    result = {}
    for key, value in values.items():
        if key == "transformers_version" or (str(key).startswith("_") and key != "_vocab_size"):
            continue
        nested = _as_transformers_4(value) if isinstance(value, dict) else value
        result["torch_dtype" if key == "dtype" else key] = nested
    return result
