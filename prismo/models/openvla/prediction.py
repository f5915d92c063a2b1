"""From an observation's tokens to normalised action chunks, for every kind of OpenVLA checkpoint and any batch size.

Called by the policy (`prismo.policies`), by validation during training and by the tests.

Shape legend: B batch, K actions per chunk, A numbers per action, T = K * A action tokens, D LLM width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prismo.embodiment import Embodiment
from prismo.models.heads import DiffusionActionHead, L1RegressionActionHead
from prismo.models.openvla.modeling import OpenVLAForActionPrediction
from prismo.models.openvla.processing import TextBatch
from prismo.models.projectors import NoisyActionProjector, ProprioProjector


@dataclass(frozen=True)
class ActionModules:
    """What a checkpoint holds beside the VLA itself.

    Attributes:
        head: regresses or denoises actions from hidden states; None = the LM head predicts action tokens.
        proprio_projector: adds one token for the proprioceptive state.
        noisy_action_projector: needed by a diffusion head.
    """

    head: L1RegressionActionHead | DiffusionActionHead | None = None
    proprio_projector: ProprioProjector | None = None
    noisy_action_projector: NoisyActionProjector | None = None

    def __post_init__(self) -> None:
        if isinstance(self.head, DiffusionActionHead) != (self.noisy_action_projector is not None):
            raise ValueError("a diffusion head and a noisy-action projector belong together; one of them is missing")

    @property
    def diffusion(self) -> tuple[DiffusionActionHead, NoisyActionProjector] | None:
        """The two parts of a diffusion policy; None for others."""
        if isinstance(self.head, DiffusionActionHead) and self.noisy_action_projector is not None:
            return self.head, self.noisy_action_projector
        return None


@torch.no_grad()
def predict_actions(
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
        diffusion_steps: denoising steps.
        start: noise to denoise [B, K, A]; drawn from N(0, 1) by default.

    Returns:
        float32 [B, K, A]; a causal checkpoint predicts one action, K = 1.

    Raises:
        ValueError: proprio given or missing against what the checkpoint has.
    """
    if vla.config.attention == "causal":
        ids = vla.generate_action_tokens(text.input_ids, text.attention_mask, pixel_values, embodiment.action_dim)
        return _decode(vla, ids).unflatten(1, (1, embodiment.action_dim))
    extra = proprio_token(modules, proprio)
    mask = vla.action_tokenizer.mask(text.labels)
    shape = (embodiment.chunk, embodiment.action_dim)
    if modules.diffusion is None:
        out = vla(text.input_ids, text.attention_mask, pixel_values, action_mask=mask, extra_tokens=extra)
        states = out.action_states(mask)
        if isinstance(modules.head, L1RegressionActionHead):
            return modules.head.predict(states).float()
        return _decode(vla, vla.logits(states).argmax(dim=-1)).unflatten(1, shape)

    head, noisy_action_projector = modules.diffusion
    condition = vla.language_condition(vla.get_input_embeddings()(text.input_ids), mask, text.attention_mask)
    vision = vla.project_vision(pixel_values, condition)  # the same at every denoising step

    def action_hidden(noisy: Tensor, time_token: Tensor) -> Tensor:
        slots = noisy_action_projector(noisy)
        tokens = join_tokens(extra, time_token, dtype=vision.dtype)
        out = vla(
            text.input_ids,
            text.attention_mask,
            action_mask=mask,
            action_embeddings=slots,
            extra_tokens=tokens,
            vision_tokens=vision,
        )
        return out.action_states(mask)

    if start is None:
        start = torch.randn(len(mask), *shape, device=vision.device)
    return head.sample(action_hidden, start, diffusion_steps).float()


def proprio_token(modules: ActionModules, proprio: Tensor | None) -> Tensor | None:
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


def join_tokens(*tokens: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The given [B, 1, D] tokens side by side in one dtype; None without any."""
    present = [token.to(dtype) for token in tokens if token is not None]
    return torch.cat(present, dim=1) if present else None


def _decode(vla: OpenVLAForActionPrediction, ids: Tensor) -> Tensor:
    """Action token ids [B, n] -> bin centres [B, n] float32."""
    return torch.from_numpy(vla.action_tokenizer.decode(ids.cpu().numpy())).float().to(ids.device)
