"""The training objective: one module that holds every trainable part and whose forward returns the loss.

One module, because only what runs inside the wrapped module's forward has its gradients reduced between GPUs: the
original called its action head around DDP, so that every GPU trained a head of its own (openvla-oft issue 160).

Shape legend: B batch, V views, K actions per chunk, A numbers per action, T = K * A action tokens, D LLM width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from prismo.align import SpatialForcing, vision_tokens
from prismo.models.openvla import OpenVLAForActionPrediction, OpenVLAOutput, TextBatch
from prismo.models.openvla.prediction import ActionModules, OpenVLARun


@dataclass(frozen=True)
class TrainingInputs:
    """One micro-batch on the training device.

    Attributes:
        images: what the policy sees, float [B, V, 3, H, W] in [0, 1], augmented and resized.
        pixel_values: the same, normalised for the towers [B, V * 6, H, W].
        text: prompt, action tokens and stop token.
        actions: normalised chunk [B, K, A] in [-1, 1].
        action_mask: False at actions that lie behind the end of an episode [B, K]; None = all are real.
        proprio: normalised state [B, proprio_dim], or None for a policy without it.
        view_mask: False where a camera is missing [B, V]; None = all are there.
    """

    images: Tensor
    pixel_values: Tensor
    text: TextBatch
    actions: Tensor
    action_mask: Tensor | None = None
    proprio: Tensor | None = None
    view_mask: Tensor | None = None


@dataclass(frozen=True)
class Losses:
    """What one forward pass gives.

    Attributes:
        total: `action + align_loss_coeff * align`; the one to differentiate.
        metrics: detached scalars under the original's names (`loss` is the action loss without alignment).
        actions: predicted normalised actions [B, K, A] of an L1 head; None for heads that need more than this pass.
        align_map: cosine of every vision token [B, V, rows, columns], where it was asked for.
    """

    total: Tensor
    metrics: dict[str, Tensor]
    actions: Tensor | None = None
    align_map: Tensor | None = None


class OpenVLAObjective(nn.Module):
    """Action loss of OpenVLA-OFT plus Spatial-Forcing's alignment (arXiv 2510.12276, equation 5).

    Args:
        vla: the model, with adapters injected where it is fine-tuned by LoRA.
        modules: action head and projectors; they become submodules, named as their files.
        alignment: None trains without a teacher.
    """

    def __init__(
        self, vla: OpenVLAForActionPrediction, modules: ActionModules, alignment: SpatialForcing | None = None
    ) -> None:
        super().__init__()
        self.vla = vla
        self.policy = modules
        for stem, module in modules.by_stem().items():
            self.add_module(stem, module)
        self.alignment = alignment

    def forward(self, batch: TrainingInputs, *, with_map: bool = False) -> Losses:
        """Loss of a micro-batch; see `Losses`. `with_map` adds the alignment's cosine map."""
        run = OpenVLARun(
            self.vla,
            self.policy,
            batch.text,
            batch.pixel_values,
            (batch.actions.shape[1], batch.actions.shape[2]),
            proprio=batch.proprio,
            hidden_layers=() if self.alignment is None else (self.alignment.recipe.vla_layers_align,),
        )
        action = self.policy.head.loss(run, batch.actions, batch.action_mask)
        metrics = action.metrics | {"loss": action.loss.detach()}
        total, align_map = action.loss, None
        if self.alignment is not None:
            align, align_metrics = _align(self.alignment, run.output, batch, with_map)
            align_map = align_metrics.pop("align_cosine_map", None)
            total = action.loss + align  # already times align_loss_coeff
            metrics |= align_metrics
        return Losses(total, metrics, action.actions, align_map)


def _align(
    alignment: SpatialForcing, out: OpenVLAOutput, batch: TrainingInputs, with_map: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    recipe = alignment.recipe
    hidden = out.hidden_states[recipe.vla_layers_align]
    tokens = vision_tokens(hidden, count=out.vision_tokens, shift=recipe.gain_feat_1move)
    return alignment(batch.images, tokens, view_mask=batch.view_mask, return_map=with_map)
