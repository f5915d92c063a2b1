"""Configuration of OpenVLA checkpoints (`model_type: openvla`), as published and as the original project reads it."""

from __future__ import annotations

from typing import Any, get_args

from transformers import LlamaConfig, PreTrainedConfig

from prismo.models.self_test import AttentionKind
from prismo.models.vit import ViTConfig
from prismo.util.text import did_you_mean


def _dinov2_large(size: int) -> ViTConfig:
    return ViTConfig(1024, 24, 16, 4096, image_size=size, cls_token=True, registers=4, layer_scale="scale_factor")


def _siglip_so400m(size: int) -> ViTConfig:
    return ViTConfig(1152, 27, 16, 4304, image_size=size, attention_pool=True)


def _timm_id(tower: ViTConfig) -> str:
    """What timm calls one of the two towers above."""
    siglip = f"vit_so400m_patch14_siglip_{tower.image_size}"
    return siglip if tower.attention_pool else "vit_large_patch14_reg4_dinov2.lvd142m"


# Towers in the order in which their features are concatenated: `featurizer`, then `fused_featurizer`.
VISION_BACKBONES: dict[str, tuple[ViTConfig, ...]] = {
    "dinosiglip-vit-so-224px": (_dinov2_large(224), _siglip_so400m(224)),
    "dinosiglip-vit-so-384px": (_dinov2_large(384), _siglip_so400m(384)),
    "dinov2-vit-l": (_dinov2_large(224),),
    "siglip-vit-so400m": (_siglip_so400m(224),),
    "siglip-vit-so400m-384px": (_siglip_so400m(384),),
}
LLM_BACKBONES = {
    "llama2-7b-pure": "meta-llama/Llama-2-7b-hf",
    "llama2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama2-13b-pure": "meta-llama/Llama-2-13b-hf",
    "llama2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
    "vicuna-v15-7b": "lmsys/vicuna-7b-v1.5",
    "vicuna-v15-13b": "lmsys/vicuna-13b-v1.5",
}


class OpenVLAConfig(PreTrainedConfig):
    """Settings of an OpenVLA model.

    Args:
        vision_backbone_id: key of `VISION_BACKBONES`.
        llm_backbone_id: key of `LLM_BACKBONES` (Llama-2 family).
        arch_specifier: projector kind as the original names it; kept as read.
        use_fused_vision_backbone: two towers side by side; None = as the backbone id says.
        image_resize_strategy: "resize-naive" (squash) or "letterbox".
        text_config: differences from transformers' `LlamaConfig` defaults (rms_norm_eps is 1e-6 there, which is what
            OpenVLA was trained with, not Llama-2's 1e-5).
        llm_max_length, pad_token_id, pad_to_multiple_of, output_projector_states: as published.
        norm_stats: statistics per dataset (`prismo.data.normalize`).
        n_action_bins: bins per action dimension of the discrete action tokens.
        vision_towers: sizes of the towers where they are not those of the backbone id (tiny models for tests).
        attention: "bidirectional" (OpenVLA-OFT and Spatial-Forcing: a chunk is decoded in one pass) or "causal"
            (vanilla OpenVLA: token by token). Published files do not say; the default is that of OFT.

    Raises:
        ValueError: unknown backbone, or an attention kind that is neither.
    """

    model_type = "openvla"
    sub_configs = {"text_config": LlamaConfig}  # noqa: RUF012 (transformers reads this class attribute)

    vision_backbone_id: str = "dinosiglip-vit-so-224px"
    llm_backbone_id: str = "llama2-7b-pure"
    arch_specifier: str = "no-align+fused-gelu-mlp"
    use_fused_vision_backbone: bool | None = None
    image_resize_strategy: str = "resize-naive"
    text_config: Any = None
    llm_max_length: int = 2048
    pad_token_id: int = 32000
    pad_to_multiple_of: int = 64
    output_projector_states: bool = False
    norm_stats: dict[str, Any] | None = None
    n_action_bins: int = 256
    vision_towers: list[dict[str, Any]] | None = None
    attention: AttentionKind = "bidirectional"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_backbone_id not in VISION_BACKBONES:
            raise ValueError(did_you_mean("vision_backbone_id", self.vision_backbone_id, VISION_BACKBONES))
        if self.llm_backbone_id not in LLM_BACKBONES:
            raise ValueError(did_you_mean("llm_backbone_id", self.llm_backbone_id, LLM_BACKBONES))
        if self.attention not in get_args(AttentionKind):
            raise ValueError(did_you_mean("attention", self.attention, get_args(AttentionKind)))
        if self.use_fused_vision_backbone is None:
            self.use_fused_vision_backbone = self.vision_backbone_id.startswith(("dinoclip", "dinosiglip"))
        if not isinstance(self.text_config, LlamaConfig):
            settings: dict[str, Any] = {"vocab_size": 32064, "pad_token_id": self.pad_token_id}
            settings |= {k: v for k, v in (self.text_config or {}).items() if k != "model_type"}
            self.text_config = LlamaConfig(**settings)
        for derived in ("timm_model_ids", "timm_override_act_layers", "image_sizes", "hf_llm_id"):
            kwargs.pop(derived, None)  # stored by the original, but only ever a function of the ids
        self.timm_model_ids = [_timm_id(tower) for tower in VISION_BACKBONES[self.vision_backbone_id]]
        self.timm_override_act_layers = [None] * len(self.timm_model_ids)
        self.image_sizes = [tower.image_size for tower in self.towers]
        self.hf_llm_id = LLM_BACKBONES[self.llm_backbone_id]
        super().__post_init__(**kwargs)

    @property
    def towers(self) -> tuple[ViTConfig, ...]:
        """Sizes of the vision towers, in order."""
        if self.vision_towers is not None:
            return tuple(ViTConfig(**tower) for tower in self.vision_towers)
        return VISION_BACKBONES[self.vision_backbone_id]

    @property
    def patches_per_view(self) -> int:
        """Vision tokens of one camera image (256 for 224 pixels and patches of 14)."""
        return self.towers[0].grid ** 2

    @property
    def token_vocab_size(self) -> int:
        """Vocabulary without the padding rows (32,000); action tokens count down from here."""
        return self.text_config.vocab_size - self.pad_to_multiple_of

    def to_diff_dict(self) -> dict[str, Any]:
        """What goes into config.json: the published schema, `text_config` as differences from the Llama defaults."""
        values = super().to_diff_dict()
        text, defaults = self.text_config.to_dict(), LlamaConfig().to_dict()
        values["text_config"] = {
            key: value
            for key, value in text.items()
            if key == "model_type" or (value != defaults.get(key) and not key.startswith("_"))
        }
        values["text_config"].pop("transformers_version", None)
        if text["head_dim"] == text["hidden_size"] // text["num_attention_heads"]:
            values["text_config"].pop("head_dim", None)  # unknown to the transformers of the original project
        for block in (values, values["text_config"]):
            if "dtype" in block:  # transformers 4 reads `torch_dtype`
                block["torch_dtype"] = str(block.pop("dtype")).removeprefix("torch.")
        if self.vision_towers is None:
            values.pop("vision_towers", None)
        return values
