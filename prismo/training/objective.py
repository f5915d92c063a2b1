"""The training objective: one module that holds every trainable part and whose forward returns the loss.

One module, because only what runs inside the wrapped module's forward has its gradients reduced between GPUs: the
original called its action head around DDP, so that every GPU trained a head of its own (openvla-oft issue 160).

Shape legend: B batch, V views, K actions per chunk, A numbers per action, T = K * A action tokens, D LLM width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prismo.align import SpatialForcing, vision_tokens
from prismo.models.openvla import IGNORE_INDEX, ActionTokenizer, OpenVLAForActionPrediction, OpenVLAOutput, TextBatch
from prismo.models.openvla.prediction import ActionModules, join_tokens, proprio_token


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
        modules: action head and projectors; they become submodules.
        alignment: None trains without a teacher.
    """

    def __init__(
        self, vla: OpenVLAForActionPrediction, modules: ActionModules, alignment: SpatialForcing | None = None
    ) -> None:
        super().__init__()
        self.vla = vla
        self.action_head = modules.head
        self.proprio_projector = modules.proprio_projector
        self.noisy_action_projector = modules.noisy_action_projector
        self.alignment = alignment

    @property
    def modules_of_policy(self) -> ActionModules:
        """The side modules, for prediction."""
        return ActionModules(self.action_head, self.proprio_projector, self.noisy_action_projector)

    def forward(self, batch: TrainingInputs, *, with_map: bool = False) -> Losses:
        """Loss of a micro-batch; see `Losses`. `with_map` adds the alignment's cosine map."""
        mask = self.vla.action_tokenizer.mask(batch.text.labels)
        modules = self.modules_of_policy
        proprio = proprio_token(modules, batch.proprio)
        noisy = slots = None
        if modules.diffusion is not None:
            head, noisy_action_projector = modules.diffusion
            noisy = head.noisy_actions(batch.actions)
            slots = noisy_action_projector(noisy.actions)
        layers = () if self.alignment is None else (self.alignment.recipe.vla_layers_align,)
        out = self.vla(
            batch.text.input_ids,
            batch.text.attention_mask,
            batch.pixel_values,
            action_mask=mask,
            action_embeddings=slots,
            extra_tokens=join_tokens(
                proprio, None if noisy is None else noisy.time_embedding, dtype=batch.pixel_values.dtype
            ),
            hidden_layers=layers,
        )
        actions = None
        if self.action_head is None:
            action, metrics = self._token_loss(out, batch)
        elif noisy is not None:
            noise = self.action_head(out.action_states(mask)).float()
            action, metrics = _masked_mean((noise - noisy.noise.float()) ** 2, batch.action_mask), {}
        else:
            actions = self.action_head(out.action_states(mask)).float()
            action, metrics = _l1(actions, batch)
        metrics["loss"] = action.detach()
        total, align_map = action, None
        if self.alignment is not None:
            align, align_metrics = _align(self.alignment, out, batch, with_map)
            align_map = align_metrics.pop("align_cosine_map", None)
            total = action + align  # already times align_loss_coeff
            metrics |= align_metrics
        return Losses(total, metrics, actions, align_map)

    def _token_loss(self, out: OpenVLAOutput, batch: TrainingInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy over action tokens and stop token; the LM head sees these positions only."""
        targets = batch.text.labels[:, 1:]
        supervised = targets != IGNORE_INDEX
        if batch.action_mask is not None:
            supervised = supervised & self._real_tokens(targets, batch.action_mask, batch.actions.shape[-1])
        logits = self.vla.logits(out.last_hidden_state[:, out.inserted_tokens : -1][supervised])
        wanted = targets[supervised]
        loss = F.cross_entropy(logits, wanted)
        tokenizer = self.vla.action_tokenizer
        is_action = tokenizer.mask(wanted)
        predicted = logits.argmax(dim=-1)
        first = tokenizer.first_action_mask(batch.text.labels, batch.actions.shape[-1])[:, 1:][supervised]
        right = (predicted == wanted).float()
        centers = torch.as_tensor(tokenizer.centers, dtype=torch.float32, device=wanted.device)
        error = (_center(centers, predicted, tokenizer) - _center(centers, wanted, tokenizer)).abs()
        metrics = {}
        for name, where in (("curr_action", is_action & first), ("next_actions", is_action & ~first)):
            metrics[f"{name}_accuracy"] = _mean_where(right, where).detach()
            metrics[f"{name}_l1_loss"] = _mean_where(error, where).detach()
        return loss, metrics

    def _real_tokens(self, targets: Tensor, action_mask: Tensor, action_dim: int) -> Tensor:
        """False at tokens of padded actions [B, L-1]; the stop token stays."""
        real = torch.ones_like(targets, dtype=torch.bool)
        per_token = action_mask.repeat_interleave(action_dim, dim=1)
        return real.masked_scatter(self.vla.action_tokenizer.mask(targets), per_token)


def _align(
    alignment: SpatialForcing, out: OpenVLAOutput, batch: TrainingInputs, with_map: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    recipe = alignment.recipe
    hidden = out.hidden_states[recipe.vla_layers_align]
    tokens = vision_tokens(hidden, count=out.vision_tokens, shift=recipe.gain_feat_1move)
    return alignment(batch.images, tokens, view_mask=batch.view_mask, return_map=with_map)


def _center(centers: Tensor, ids: Tensor, tokenizer: ActionTokenizer) -> Tensor:
    """Bin centres of token ids; ids outside the action block give the nearest bin."""
    return centers[(tokenizer.vocab_size - ids - 1).clamp(0, len(centers) - 1)]


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).sum() / where.sum().clamp(min=1)


def _masked_mean(errors: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of [B, K, A] over the real actions."""
    if mask is None:
        return errors.mean()
    weight = mask.unsqueeze(-1).to(errors.dtype)
    return (errors * weight).sum() / (weight.sum() * errors.shape[-1]).clamp(min=1)


def _l1(predicted: Tensor, batch: TrainingInputs) -> tuple[Tensor, dict[str, Tensor]]:
    # fp32: the original took the mean of bf16 differences, which resolves the loss to 0.4 %.
    errors = (predicted - batch.actions.float()).abs()
    detached = errors.detach()
    mask = batch.action_mask
    following = None if mask is None else mask[:, 1:]
    metrics = {
        "curr_action_l1_loss": detached[:, 0].mean(),  # the first action of a window is always real
        "next_actions_l1_loss": _masked_mean(detached[:, 1:], following),
    }
    return _masked_mean(errors, mask), metrics
