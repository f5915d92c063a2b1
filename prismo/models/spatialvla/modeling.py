"""SpatialVLA on transformers' own Gemma2, SigLIP and ZoeDepth, without remote code.

One RGB image becomes 256 tokens (SigLIP features plus Ego3D position vectors), the instruction follows, and Gemma2
emits three tokens per action. Training calls `SpatialVLAForConditionalGeneration.forward`; prediction is in
`decoding.py`. Parameter names are those of the published checkpoints (see `checkpoint.py` for the exception).

Shape legend: B batch, L tokens, I image tokens (256), D language width, V vocabulary, N supervised tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from annotated_types import Ge, Le
from torch import Tensor, nn
from transformers import Gemma2ForCausalLM, SiglipVisionModel, ZoeDepthForDepthEstimation
from transformers.utils import ModelOutput

from prismo.models.bin_tokenizer import IGNORE_INDEX
from prismo.models.folder import CONFIG, Layers, Size
from prismo.models.random_weights import fill_random
from prismo.models.spatialvla.checkpoint import model_folder, official_name, save_weights
from prismo.models.spatialvla.configuration import Geometry, PrefixMask, SpatialVLAConfig
from prismo.models.spatialvla.depth import depth_at_image, freeze_zoe, predict_depth
from prismo.models.spatialvla.ego3d import Ego3DPositionEmbedding
from prismo.models.vla import VLAModel, read_model_config
from prismo.models.weight_files import load_weights, set_parameter
from prismo.util.files import write_json
from prismo.util.schema import JsonObject


@dataclass(frozen=True)
class _Transformer:
    """`text_config` and `vision_config`; what a file leaves out is the 4B model's."""

    vocab_size: Size = 1
    hidden_size: Size = 1
    intermediate_size: Size = 1
    num_hidden_layers: Layers = 1
    num_attention_heads: Size = 1
    num_key_value_heads: Size = 1
    head_dim: Size = 1
    image_size: Size = 1
    patch_size: Size = 1


@dataclass(frozen=True)
class _SpatialVLAFile:
    """config.json of a SpatialVLA; what a file leaves out is the default of `SpatialVLAConfig`."""

    text_config: _Transformer | None = None
    vision_config: _Transformer | None = None
    vision_zoe_config: JsonObject | None = None
    image_token_index: Annotated[int, Ge(0)] = 0
    action_token_begin_idx: Annotated[int, Ge(0)] = 0
    spatial_token_num: Size = 1
    ego3d_patch_reso: Size = 1
    n_freqs: Annotated[int, Ge(1), Le(64)] = 1
    use_vision_zoe: bool = True
    use_spatial_token: bool = True
    geometry: Geometry = "parity"
    prefix_mask: PrefixMask = "bidirectional"


# LoRA targets of the authors' `--lora_target`, as full-match patterns for peft. Theirs were bare layer names, which
# also put adapters on four layers of the frozen ZoeDepth.
_LINEAR = (
    r"language_model\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    r"|vision_tower\.vision_model\.encoder\.layers\.\d+\.(self_attn\.([qkv]|out)_proj|mlp\.fc[12])"
    r"|multi_modal_projector\.linear|position_embedding_3d\.position_embedding_head\.[03]"
)
LORA_TARGETS = {"linear": _LINEAR}


@dataclass
class SpatialVLAOutput(ModelOutput):
    """What `forward` returns (a ModelOutput, because FSDP2 looks for gradients only in types that it can flatten).

    Attributes:
        loss: mean cross-entropy over the supervised tokens; None without labels.
        logits: [N, V] fp32 at the supervised positions, soft-capped; None without labels.
        targets: [N] their token ids.
        last_hidden_state: [B, L, D] after the final norm; feed it to `lm_logits`.
        image_hidden_states: image tokens [B, I, D] of the hidden layers that were asked for, by their index as asked.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    targets: Tensor | None = None
    last_hidden_state: Tensor | None = None
    image_hidden_states: dict[int, Tensor] | None = None

    def supervised(self) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, logits, targets).

        Raises:
            ValueError: the pass had no labels.
        """
        if self.loss is None or self.logits is None or self.targets is None:
            raise ValueError("a pass without labels has no loss")
        return self.loss, self.logits, self.targets


class SpatialVLAForConditionalGeneration(VLAModel):
    """SpatialVLA with a language-model head.

    ZoeDepth is frozen, stays in evaluation mode and takes no gradient.
    """

    config_class = SpatialVLAConfig
    config: SpatialVLAConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["Gemma2DecoderLayer", "SiglipEncoderLayer", "BeitLayer"]  # noqa: RUF012

    def __init__(self, config: SpatialVLAConfig) -> None:
        super().__init__(config)
        # Soft-capped scores under an arbitrary mask: only the eager kernel computes what the weights were made for.
        # (Set here because some versions of transformers hand the outer model's choice down.)
        config.text_config._attn_implementation = "eager"
        vision, width = config.vision_config, config.text_config.hidden_size
        self.vision_tower = nn.ModuleDict({"vision_model": SiglipVisionModel(vision)})
        self.multi_modal_projector = nn.ModuleDict({"linear": nn.Linear(vision.hidden_size, width)})
        self.language_model = Gemma2ForCausalLM(config.text_config)
        self.spatial_embed_tokens = nn.Embedding(config.spatial_token_num, width)
        if config.use_vision_zoe:
            self.vision_zoe_model = ZoeDepthForDepthEstimation(config.vision_zoe_config)
            freeze_zoe(self.vision_zoe_model)
            self.position_embedding_3d = Ego3DPositionEmbedding(
                vision.hidden_size, config.image_pixels, config.patch_pixels, config.ego3d_patch_reso, config.n_freqs
            )
        self.post_init()

    @classmethod
    def empty(cls, config: SpatialVLAConfig) -> SpatialVLAForConditionalGeneration:
        """The network with parameters on the meta device (no memory) and real buffers, which no file stores."""
        with init_empty_weights(include_buffers=False):
            return cls(config).eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        geometry: Geometry | None = None,
        prefix_mask: PrefixMask | None = None,
    ) -> SpatialVLAForConditionalGeneration:
        """Load an official checkpoint, or one that `save_pretrained` wrote; nothing in it is executed or written.

        transformers' own loader is not used: it would take other weights for missing ones, and renames only classes
        that it knows.

        Args:
            pretrained_model_name_or_path: folder with config.json and safetensors, or a hub id.
            dtype: of the parameters; None takes the stored one (bf16 for the published checkpoints).
            device: where the parameters go, without a detour through the host's memory.
            geometry, prefix_mask: replace the file's settings (see `SpatialVLAConfig`).

        Raises:
            FileNotFoundError: not a checkpoint.
            ValueError: another model's config.json, or tensors that miss, are unknown or do not fit; names them.
        """
        folder = model_folder(pretrained_model_name_or_path)
        config = read_config(folder, geometry=geometry, prefix_mask=prefix_mask)
        model = cls.empty(config)
        load_weights(model, folder, official_name, torch.device(device), dtype or config.stored_dtype)
        model.name_or_path = config.name_or_path = str(pretrained_model_name_or_path)
        return model.to(device)

    @classmethod
    def random(
        cls,
        config: SpatialVLAConfig,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> SpatialVLAForConditionalGeneration:
        """Random weights drawn on `device`; nothing touches the disk. For tests and benchmarks."""
        model = cls.empty(config)
        for name, parameter in list(model.named_parameters()):
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            set_parameter(model, name, value, parameter.requires_grad)
        fill_random(model, seed)
        return model.to(device)

    def save_pretrained(  # ty: ignore[incompatible-method-override] (what is not here was never supported)
        self,
        save_directory: str | Path,
        *,
        state_dict: dict[str, Tensor] | None = None,
        max_shard_size: str | int = "5GB",
    ) -> None:
        """Write `config.json` and the weights in the official layout.

        Args:
            state_dict: parameters under our names, e.g. gathered from a sharded model; None takes this module's own.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        config = self.config.to_diff_dict()
        dtype = str(state["spatial_embed_tokens.weight"].dtype).removeprefix("torch.")
        write_json(folder / CONFIG, config | {"architectures": [type(self).__name__], "torch_dtype": dtype})
        save_weights(state, folder, max_shard_size)

    def train(self, mode: bool = True) -> SpatialVLAForConditionalGeneration:
        """Like any module, except that ZoeDepth stays in evaluation mode: its drop-path would make depth noisy."""
        super().train(mode)
        if self.config.use_vision_zoe:
            self.vision_zoe_model.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> SpatialVLAForConditionalGeneration:
        super()._apply(fn, recurse)
        # A cast of the whole module (`model.bfloat16()`, DeepSpeed) must not round RoPE's frequencies: at position 270
        # their bf16 values are wrong by up to a third of a radian.
        rotary = self.language_model.model.rotary_emb
        if rotary.inv_freq.dtype != torch.float32:
            frequencies, _ = rotary.compute_default_rope_parameters(rotary.config)
            rotary.register_buffer("inv_freq", frequencies.to(rotary.inv_freq.device), persistent=False)
        return self

    def freeze(self, llm_embed: bool = True, vision_tower: bool = False) -> None:
        """Set what full fine-tuning trains: everything but ZoeDepth, the text embeddings and, if asked, SigLIP."""
        self.requires_grad_(True)
        if self.config.use_vision_zoe:
            self.vision_zoe_model.requires_grad_(False)
        self.get_input_embeddings().requires_grad_(not llm_embed)
        self.vision_tower.requires_grad_(not vision_tower)

    def predict_depth(self, pixel_values: Tensor) -> Tensor:
        """Metric depth [B, 384, 384] in metres of images [B, 3, 224, 224] in 0..1."""
        return predict_depth(self.vision_zoe_model, pixel_values)

    def image_features(self, pixel_values: Tensor, intrinsics: Tensor, depth: Tensor | None = None) -> Tensor:
        """Image tokens [B, I, D] as Gemma2 takes them.

        Args:
            pixel_values: [B, 3, 224, 224] RGB in 0..1.
            intrinsics: [B, 3, 3] in pixels of these images.
            depth: [B, 224, 224] metres, from a sensor or a cache; None asks ZoeDepth.
        """
        pixels = pixel_values.to(self.dtype)
        features = self.vision_tower["vision_model"]((pixels - 0.5) / 0.5).last_hidden_state
        parity = self.config.geometry == "parity"
        if self.config.use_vision_zoe:
            if depth is None:
                depth = predict_depth(self.vision_zoe_model, pixels)
                depth = depth_at_image(depth if parity else depth.float(), self.config.image_pixels)
            elif parity:
                depth = depth.to(self.dtype)
            features = features + self.position_embedding_3d(depth, intrinsics, self.config.geometry)
        features = self.multi_modal_projector["linear"](features)
        if parity:
            # The official code divides here and Gemma2 of its day multiplied every input again: two roundings.
            features = features / self.llm_dim**0.5 * self._embed_scale(features.dtype)
        return features

    def embed(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Input vectors [B, L, D] of token ids [B, L], image features in the place of the image tokens.

        Raises:
            ValueError: the number of image tokens differs from the number of features.
        """
        first, count = self.config.action_token_begin_idx, self.config.spatial_token_num
        text = self.language_model.model.embed_tokens(input_ids)  # scales by sqrt(D) itself
        actions = self.spatial_embed_tokens((input_ids - first).clamp(0, count - 1)) * self._embed_scale(text.dtype)
        vectors = torch.where((input_ids >= first)[..., None], actions, text)
        if image_features is None:
            return vectors
        image = input_ids == self.config.image_token_index
        if image.sum() != (features := math.prod(image_features.shape[:2])):
            raise ValueError(f"input_ids hold {int(image.sum())} image tokens for {features} image features")
        return vectors.masked_scatter(image[..., None], image_features.to(vectors.dtype))

    def _embed_scale(self, dtype: torch.dtype) -> Tensor:
        return self.language_model.model.embed_tokens.embed_scale.to(dtype)

    def lm_logits(self, hidden: Tensor, rows: slice | None = None) -> Tensor:
        """Soft-capped logits [..., V] fp32 of hidden states [..., D], or only those of a range of token ids."""
        head, cap = self.language_model.lm_head, self.language_model.config.final_logit_softcapping
        if rows is not None and type(head) is nn.Linear:
            logits = F.linear(hidden, head.weight[rows])
        else:  # with an adapter on the head there is no plain matrix to cut
            logits = head(hidden)[..., rows or slice(None)]
        return (logits if cap is None else torch.tanh(logits / cap) * cap).float()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        intrinsics: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        depth: Tensor | None = None,
        hidden_layers: Sequence[int] = (),
    ) -> SpatialVLAOutput:
        """One teacher-forced pass.

        Args:
            input_ids: [B, L] image tokens, prompt and (training) action tokens; padded on either side.
            pixel_values: [B, 3, 224, 224] RGB in 0..1.
            intrinsics: [B, 3, 3] in pixels of these images.
            attention_mask: [B, L] 1 for tokens, 0 for padding; None means no padding.
            token_type_ids: [B, L] 0 for image and prompt, 1 for what is to be predicted; None means no suffix.
            labels: [B, L] token ids, -100 where there is no loss.
            depth: [B, 224, 224] metres instead of ZoeDepth's.
            hidden_layers: states of `run_llm` whose image tokens are returned for alignment.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embeds = self.embed(input_ids, self.image_features(pixel_values, intrinsics, depth))
        bias = attention_bias(attention_mask, token_type_ids, self.config.prefix_mask, embeds.dtype)
        hidden, kept = self.run_llm(embeds, bias, token_positions(attention_mask), hidden_layers=hidden_layers)
        image = input_ids == self.config.image_token_index
        output = SpatialVLAOutput(
            last_hidden_state=hidden,
            image_hidden_states={i: state[image].unflatten(0, (len(state), -1)) for i, state in kept.items()},
        )
        if labels is not None:
            # Token t is predicted at t - 1. The head sees only these positions: 13 of 290 rows, not 290 x 265,347.
            supervised = (labels[:, 1:] != IGNORE_INDEX) & (attention_mask[:, 1:] != 0)
            output.targets = labels[:, 1:][supervised]
            output.logits = self.lm_logits(hidden[:, :-1][supervised])
            output.loss = F.cross_entropy(output.logits, output.targets)
        return output


def read_config(
    folder: Path, *, geometry: Geometry | None = None, prefix_mask: PrefixMask | None = None
) -> SpatialVLAConfig:
    """The configuration of a checkpoint folder; arguments replace its settings; raises as `read_model_config` does."""
    switches = {"geometry": geometry, "prefix_mask": prefix_mask}
    return read_model_config(folder, SpatialVLAConfig, _SpatialVLAFile, "spatialvla", **switches)


def token_positions(attention_mask: Tensor) -> Tensor:
    """Position ids [B, L] of a padding mask: 1, 2, ... over the real tokens (PaliGemma counts from one)."""
    return attention_mask.long().cumsum(-1)


def attention_bias(
    attention_mask: Tensor, token_type_ids: Tensor | None, prefix_mask: PrefixMask, dtype: torch.dtype
) -> Tensor:
    """Additive attention mask [B, 1, L, L]: 0 where a query (row) sees a key (column), the lowest number elsewhere.

    Every token sees itself and what is before it; with "bidirectional" everything also sees the whole prefix (token
    type 0). Padding is invisible in either mode. (The authors' eager path unmasks the prefix after masking the padding,
    whose type is 0 too, so that padding becomes visible.)
    """
    length = attention_mask.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()[None]
    if prefix_mask == "bidirectional":
        types = torch.zeros_like(attention_mask) if token_type_ids is None else token_type_ids
        seen = seen | (types == 0)[:, None, :]
    seen = seen & (attention_mask != 0)[:, None, :]
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
