"""From an observation's tokens to normalised action chunks, for every kind of OpenVLA checkpoint and any batch size.

Called by the policy (`prismo.policies`), by validation during training and by the tests.

Shape legend: B batch, K actions per chunk, A numbers per action, T = K * A action tokens, D LLM width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from prismo.embodiment import Embodiment
from prismo.models.heads import ActionHead, TokenHead
from prismo.models.heads.tokens import decode
from prismo.models.openvla.modeling import OpenVLAForActionPrediction, OpenVLAOutput
from prismo.models.openvla.processing import TextBatch
from prismo.models.projectors import ProprioProjector


@dataclass(frozen=True)
class ActionModules:
    """What a checkpoint holds beside the VLA itself.

    Attributes:
        head: makes actions of hidden states.
        proprio_projector: adds one token for the proprioceptive state.
    """

    head: ActionHead = field(default_factory=TokenHead)
    proprio_projector: ProprioProjector | None = None

    def by_stem(self) -> dict[str, nn.Module]:
        """The modules by the stems of their files."""
        modules, state = self.head.modules, self.proprio_projector
        first = {stem: modules.pop(stem) for stem in ("action_head",) if stem in modules}
        return first | ({} if state is None else {"proprio_projector": state}) | modules


class OpenVLARun:
    """The VLA on one batch, see `prismo.models.heads.Run`; the pictures are encoded once for all passes.

    Args:
        vla, modules: the policy's parts.
        text: with action slots.
        pixel_values: [B, V * 6, H, W].
        shape: actions per chunk K and numbers per action A.
        proprio: normalised state [B, proprio_dim]; required with a proprio projector, an error without one.
        hidden_layers: states that `output` keeps.
        steps: passes of a head that starts from noise.
        noise: that noise [B, K, A]; drawn from N(0, 1) by default.

    Attributes:
        output: of the latest pass.
    """

    output: OpenVLAOutput

    def __init__(
        self,
        vla: OpenVLAForActionPrediction,
        modules: ActionModules,
        text: TextBatch,
        pixel_values: Tensor,
        shape: tuple[int, int],
        *,
        proprio: Tensor | None = None,
        hidden_layers: Sequence[int] = (),
        steps: int = 50,
        noise: Tensor | None = None,
    ) -> None:
        self.labels, self.tokens, self.shape = text.labels, vla.action_tokenizer, shape
        self._vla, self._text, self._pixels, self._layers = vla, text, pixel_values, hidden_layers
        self.steps, self._noise = steps, noise
        self._mask = self.tokens.mask(text.labels)
        self._proprio = _proprio_token(modules, proprio)

    @cached_property
    def noise(self) -> Tensor:
        if self._noise is not None:
            return self._noise
        return torch.randn(len(self.labels), *self.shape, device=self.labels.device)

    @cached_property
    def _vision(self) -> Tensor:
        text = self._text
        embeddings = self._vla.get_input_embeddings()(text.input_ids)
        condition = self._vla.vision_backbone.language_mean(embeddings, self._mask, text.attention_mask)
        return self._vla.project_vision(self._pixels, condition)

    def __call__(self, action_embeddings: Tensor | None = None, time_token: Tensor | None = None) -> Tensor:
        extra = [token.to(self._pixels.dtype) for token in (self._proprio, time_token) if token is not None]
        self.output = self._vla(
            self._text.input_ids,
            self._text.attention_mask,
            action_mask=self._mask,
            action_embeddings=action_embeddings,
            extra_tokens=torch.cat(extra, dim=1) if extra else None,
            vision_tokens=self._vision,
            hidden_layers=self._layers,
        )
        return self.output.action_states(self._mask)

    def text_states(self) -> Tensor:
        self()
        return self.output.last_hidden_state[:, self.output.inserted_tokens : -1]

    def logits(self, states: Tensor) -> Tensor:
        return self._vla.logits(states)


@torch.no_grad()
def predict_normalized(
    vla: OpenVLAForActionPrediction,
    modules: ActionModules,
    text: TextBatch,
    pixel_values: Tensor,
    embodiment: Embodiment,
    *,
    proprio: Tensor | None = None,
    diffusion_steps: int = 50,
    start: Tensor | None = None,
) -> Tensor:
    """Predict normalised actions.

    Args:
        vla, modules, embodiment: the policy's parts and robot.
        text: `PrismaticProcessor.query_text` (OFT), or `prompt_batch` for a causal (vanilla) model.
        pixel_values: [B, V * 6, H, W].
        proprio: normalised state [B, proprio_dim]; required with a proprio projector, an error without one.
        diffusion_steps: passes of a head that denoises.
        start: noise to denoise [B, K, A]; drawn from N(0, 1) by default.

    Returns:
        float32 [B, K, A]; a causal checkpoint predicts one action, K = 1.

    Raises:
        ValueError: proprio given or missing against what the checkpoint has.
    """
    if vla.config.attention == "causal":
        ids = vla.generate_action_tokens(text.input_ids, text.attention_mask, pixel_values, embodiment.action_dim)
        return decode(vla.action_tokenizer, ids).unflatten(1, (1, embodiment.action_dim))
    shape = (embodiment.chunk, embodiment.action_dim)
    run = OpenVLARun(vla, modules, text, pixel_values, shape, proprio=proprio, steps=diffusion_steps, noise=start)
    return modules.head.predict(run).float()


def _proprio_token(modules: ActionModules, proprio: Tensor | None) -> Tensor | None:
    """The token of the robot state [B, 1, D], or None for a policy without one.

    Raises:
        ValueError: the state is missing although the checkpoint was trained with it, or the other way round.
    """
    projector = modules.proprio_projector
    if projector is not None and proprio is not None:
        return projector(proprio)
    if projector is None and proprio is None:
        return None
    has, given = ("takes no", "given") if projector is None else ("needs a", "missing")
    raise ValueError(f"this checkpoint {has} proprio state, but one is {given}; set --use_proprio accordingly")
