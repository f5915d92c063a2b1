"""OpenVLA as a transformers model: two vision towers, a projector and Llama, with explicit attention.

Serves vanilla OpenVLA (arXiv 2406.09246; causal, token by token), OpenVLA-OFT (arXiv 2502.19645; bidirectional, a chunk
in one pass) and Spatial-Forcing (arXiv 2510.12276; OFT whose hidden states are aligned, see `prismo.align`).

Sequence of a sample: `BOS | vision patches (view by view) | extra tokens (proprio, diffusion time) | text 1..L-1`.

Shape legend: B batch, V views, P vision tokens = V * patches, E extra tokens, L text tokens, S = L + P + E, D LLM
width, T action tokens = chunk * action_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from prismo.models.bin_tokenizer import BinTokenizer
from prismo.models.folder import check_folder
from prismo.models.openvla.attention import attention_mask_for
from prismo.models.openvla.configuration import OpenVLAConfig
from prismo.models.openvla.loading import check_loaded, read_config
from prismo.models.openvla.vision import FiLMVisionBackbone, PrismaticProjector, PrismaticVisionBackbone
from prismo.models.self_test import AttentionKind, judge_influences
from prismo.models.vla import VLAModel

_TEST_TOKENS = 16  # text of the self-test
_TEST_STRIDE = 16  # a sixteenth of the patches is enough to see whether the image has an influence


@dataclass(frozen=True)
class OpenVLAOutput:
    """What a forward pass returns.

    Attributes:
        last_hidden_state: after the final RMSNorm [B, S, D].
        hidden_states: only the layers that were asked for, by their index as asked, each [B, S, D].
        vision_tokens: P.
        inserted_tokens: P + E, the tokens between BOS and text token 1.
        past_key_values: the cache that was passed in.
    """

    last_hidden_state: Tensor
    hidden_states: dict[int, Tensor]
    vision_tokens: int
    inserted_tokens: int
    past_key_values: Cache | None = None

    def action_states(self, action_mask: Tensor) -> Tensor:
        """Hidden states that predict the action tokens: those one position before each of them.

        Args:
            action_mask: True at the T action tokens of every sample, in text positions [B, L].

        Returns:
            [B, T, D].
        """
        # Text token i (i >= 1) sits at position inserted + i, so its predecessor at inserted + i - 1.
        states = self.last_hidden_state[:, self.inserted_tokens : -1]
        return states[action_mask[:, 1:]].unflatten(0, (states.shape[0], -1))


class OpenVLAForActionPrediction(VLAModel):
    """OpenVLA with the parameter names of the published checkpoints.

    `forward` stops at hidden states. Nothing computes the LM head unless `logits` is called, and no cache is built
    unless one is passed in.
    """

    config_class = OpenVLAConfig
    config: OpenVLAConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["LlamaDecoderLayer", "Block"]  # noqa: RUF012 (transformers reads this class attribute)

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__(config)
        towers = config.towers
        self.vision_backbone: PrismaticVisionBackbone | FiLMVisionBackbone = PrismaticVisionBackbone(towers)
        self.projector = PrismaticProjector(
            self.vision_backbone.width, config.text_config.hidden_size, fused=len(towers) == 2
        )
        self.language_model = LlamaForCausalLM(config.text_config)
        self.action_tokenizer = BinTokenizer(config.token_vocab_size, config.n_action_bins)
        self.set_attention(config.attention)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, self_test: bool = True, **kwargs: Any
    ) -> OpenVLAForActionPrediction:
        """Load a folder or hub id in the published layout; nothing in it is executed or written.

        Args:
            pretrained_model_name_or_path: folder with config.json and safetensors, or a hub id.
            self_test: check after loading that attention and the image path work (`prismo.models.self_test`).
            *args, **kwargs: as in transformers (`dtype`, `device_map`, `attn_implementation`, ...); `attention` chooses
                "bidirectional" or "causal".

        Raises:
            FileNotFoundError: the folder is not a checkpoint.
            ValueError: a file is truncated, or tensors are missing or do not fit.
            SelfTestError: the loaded model does not behave as its attention kind demands.
        """
        check_folder(pretrained_model_name_or_path)
        if Path(pretrained_model_name_or_path).is_dir():
            read_config(Path(pretrained_model_name_or_path))
        kwargs.pop("trust_remote_code", None)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # else a bare RuntimeError
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model, report = loaded  # what it returns depends on output_loading_info
        check_loaded(pretrained_model_name_or_path, report)
        if self_test and all(p.device.type != "meta" for p in model.parameters()):
            model.self_test()
        return model

    def set_attention(self, kind: AttentionKind) -> None:
        """Choose "bidirectional" or "causal" attention for every decoder layer."""
        self.config.attention = kind
        for module in self.language_model.modules():
            if isinstance(module, LlamaAttention):
                module.is_causal = kind == "causal"  # what sdpa and flash read when they get no mask

    def project_vision(self, pixel_values: Tensor, condition: Tensor | None = None) -> Tensor:
        """Vision tokens [B, P, D] of `pixel_values` [B, V * 6, H, W]."""
        return self.projector(self.vision_backbone(pixel_values, condition))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        action_mask: Tensor | None = None,
        action_embeddings: Tensor | None = None,
        extra_tokens: Tensor | None = None,
        vision_tokens: Tensor | None = None,
        hidden_layers: Sequence[int] = (),
        past_key_values: Cache | None = None,
    ) -> OpenVLAOutput:
        """Hidden states of a batch.

        Args:
            input_ids: right-padded text [B, L], BOS first.
            attention_mask: True at real tokens [B, L]; None says that there is no padding (and allows the kernels
                that take no mask).
            pixel_values: [B, V * 6, H, W]; may (only) be left out when `vision_tokens` is given.
            action_mask: True at the action tokens [B, L]; their embeddings become zeros (OFT) or `action_embeddings`.
                None leaves them as they are (vanilla OpenVLA).
            action_embeddings: projected noisy actions [B, T, D] (diffusion).
            extra_tokens: [B, E, D] behind the vision tokens: proprio, then diffusion time.
            vision_tokens: result of `project_vision`, reused between diffusion steps.
            hidden_layers: indices of `layer_index` to return as well.
            past_key_values: a cache to fill (token-by-token decoding).
        """
        embeddings = self.get_input_embeddings()(input_ids)
        if vision_tokens is None:
            if pixel_values is None:
                raise ValueError("expected pixel_values or vision_tokens, found neither")
            condition = self.vision_backbone.language_mean(embeddings, action_mask, attention_mask)
            vision_tokens = self.project_vision(pixel_values, condition)
        if action_mask is not None:
            embeddings = _fill_actions(embeddings, action_mask, action_embeddings)
        inserted = [vision_tokens] if extra_tokens is None else [vision_tokens, extra_tokens]
        inserted = [part.to(embeddings.dtype) for part in inserted]
        sequence = torch.cat([embeddings[:, :1], *inserted, embeddings[:, 1:]], dim=1)
        count = sequence.shape[1] - embeddings.shape[1]
        keys = None
        if attention_mask is not None:
            real = attention_mask.bool()
            keys = torch.cat([real[:, :1], real.new_ones(real.shape[0], count), real[:, 1:]], dim=1)
        last, hidden = self._run(sequence, keys, hidden_layers=hidden_layers, cache=past_key_values)
        return OpenVLAOutput(
            last_hidden_state=last,
            hidden_states=hidden,
            vision_tokens=vision_tokens.shape[1],
            inserted_tokens=count,
            past_key_values=past_key_values,
        )

    def _run(
        self, sequence: Tensor, keys: Tensor | None, *, positions: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """`run_llm` with the mask for this model's kind of attention.

        Args:
            sequence: embeddings [B, Q, D].
            keys: True at tokens that may be attended to [B, S], cache included; None without padding.
            positions: [B, Q]; default 0..Q-1 for every sample.
        """
        if positions is None:
            positions = torch.arange(sequence.shape[1], device=sequence.device)[None]
        kernel = self.language_model.config._attn_implementation or "eager"
        mask = attention_mask_for(kernel, self.config.attention, keys, sequence)
        return self.run_llm(sequence, mask, positions, **options)

    @torch.no_grad()
    def self_test(self) -> None:
        """Run four short sequences that differ in a later token or the image; raises as `judge_influences` does."""
        was_training = self.training
        self.eval()
        try:
            influences = self._influences()
        finally:
            self.train(was_training)
        judge_influences(self.config.attention, *influences)

    def _influences(self) -> tuple[float, float, float]:
        """Largest change of (earlier states by a later token, later states by it, states by the image)."""
        embedding = self.get_input_embeddings()
        table = embedding.get_parameter("weight")
        size = self.config.towers[0].image_size
        channels = 3 * len(self.config.towers)
        # Of the model, not of some weight: quantised ones are integers.
        pixels = torch.ones(2, channels, size, size, device=table.device, dtype=self.dtype)
        pixels[0] *= -1
        ids = torch.arange(3, 3 + _TEST_TOKENS, device=table.device)[None].repeat(3, 1)
        ids[1, -2] += 100  # the later token that differs
        embeddings = embedding(ids)
        condition = self.vision_backbone.language_mean(embeddings[:2], None, None)
        black, white = self.project_vision(pixels, condition)[:, ::_TEST_STRIDE].to(embeddings.dtype)
        sequence = torch.cat([torch.stack([black, black, white]), embeddings], dim=1)
        states, _ = self._run(sequence, None)
        early = black.shape[0] + 2
        before = (states[0, early] - states[1, early]).abs().max()
        after = (states[0, -1] - states[1, -1]).abs().max()
        image = (states[0, early] - states[2, early]).abs().max()
        return before.item(), after.item(), image.item()

    def logits(self, hidden: Tensor) -> Tensor:
        """LM head on hidden states [..., D] -> float32 [..., vocabulary]. Ask only for the positions you need."""
        return self.language_model.lm_head(hidden).float()

    @torch.no_grad()
    def generate_action_tokens(
        self, input_ids: Tensor, attention_mask: Tensor | None, pixel_values: Tensor, tokens: int
    ) -> Tensor:
        """Greedy decoding over a cache, for vanilla (causal) checkpoints; prompts of different lengths in one batch.

        Args:
            input_ids: prompts ending with the space token, right-padded [B, L].
            attention_mask: True at real tokens [B, L], or None.
            pixel_values: [B, V * 6, H, W].
            tokens: how many to decode (action_dim).

        Returns:
            int64 ids [B, tokens].

        Raises:
            ValueError: the model attends bidirectionally, so a cache of earlier tokens would be wrong.
        """
        if self.config.attention != "causal":
            raise ValueError(
                "token-by-token decoding needs attention='causal' (this is an OFT model: predict in parallel)"
            )
        cache = DynamicCache(config=self.language_model.config)
        out = self(input_ids, attention_mask, pixel_values, past_key_values=cache)
        batch = input_ids.shape[0]
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        keys = torch.cat([real[:, :1], real.new_ones(batch, out.inserted_tokens), real[:, 1:]], dim=1)
        position = keys.sum(dim=1, keepdim=True) - 1  # of the last real token; padding lies behind it
        last = out.last_hidden_state.gather(1, position[..., None].expand(-1, -1, self.llm_dim))
        ids = []
        for step in range(tokens):
            token = self.logits(last[:, -1]).argmax(dim=-1)
            ids.append(token)
            if step + 1 < tokens:
                position = position + 1
                keys = torch.cat([keys, keys.new_ones(batch, 1)], dim=1)
                embedding = self.get_input_embeddings()(token[:, None])
                seen = None if attention_mask is None else keys
                last, _ = self._run(embedding, seen, positions=position, cache=cache)
        return torch.stack(ids, dim=1)


def _fill_actions(embeddings: Tensor, action_mask: Tensor, values: Tensor | None) -> Tensor:
    """Embeddings [B, L, D] with zeros, or `values` [B, T, D] in order, at the action positions."""
    mask = action_mask.unsqueeze(-1)
    if values is None:
        return embeddings.masked_fill(mask, 0)
    return embeddings.masked_scatter(mask, values.to(embeddings.dtype))
