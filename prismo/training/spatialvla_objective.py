"""SpatialVLA's training objective: cross entropy of action tokens.

`prismo.training.spatialvla` builds it for the trainer, `scripts/bench_train_spatialvla.py` for measuring.

Shape legend: B batch, K actions per chunk, N supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prismo.align.auxiliary import Auxiliary, ForwardPass
from prismo.data.images import prepare_images
from prismo.models.heads import HeadLoss
from prismo.models.lora import LoraSpec, add_lora
from prismo.models.spatialvla import (
    ActionTokenizer,
    CameraIntrinsics,
    SpatialVLAForConditionalGeneration,
    SpatialVLATextBatch,
)
from prismo.models.spatialvla.action_tokenizer import TOKENS_PER_ACTION
from prismo.training.build import keep_input_dtypes, moved
from prismo.training.distributed import World
from prismo.training.objective import Objective
from prismo.training.sharding import shard

_SLOTS = ("translation", "rotation", "gripper")


@dataclass(frozen=True)
class SpatialVLAInputs:
    """One micro-batch on the training device.

    Attributes:
        images: what the policy sees, float [B, 1, 3, 224, 224] in [0, 1], augmented and resized.
        intrinsics: camera matrices [B, 3, 3] in pixels of these images.
        text: prompt, action tokens and <eos>.
        actions: normalised chunk [B, K, 7], gripper 1 = open.
        view_mask: False where the picture is missing [B, 1]; None = all are there.
    """

    images: Tensor
    intrinsics: Tensor
    text: SpatialVLATextBatch
    actions: Tensor
    view_mask: Tensor | None = None


class SpatialVLAObjective(Objective[SpatialVLAForConditionalGeneration]):
    """Next-token loss over 12 action tokens and <eos> (arXiv 2501.15830), plus auxiliary losses; see `Objective`.

    Args:
        grid: the model's action grid, for errors in action units.
    """

    _table: Tensor

    def __init__(
        self,
        vla: SpatialVLAForConditionalGeneration,
        grid: ActionTokenizer,
        auxiliaries: Mapping[str, Auxiliary] | None = None,
    ) -> None:
        super().__init__(vla, {}, auxiliaries)
        self._grid = grid
        self.register_buffer("_table", _decode_table(grid), persistent=False)

    def main_loss(self, batch: SpatialVLAInputs) -> tuple[HeadLoss, ForwardPass]:
        out = self.vla(
            batch.text.input_ids,
            batch.images[:, 0],
            batch.intrinsics,
            batch.text.attention_mask,
            batch.text.token_type_ids,
            batch.text.labels,
            hidden_layers=self.hidden_layers,
        )
        loss, logits, targets = out.supervised()
        actions, metrics = None, {}
        if self.training:  # in validation the actions come from real decoding, not from the tokens before
            actions, metrics = self._chosen(logits, targets, batch)
        # The states are those of the image tokens alone: none in front that could shift them by one.
        states, count = out.image_hidden_states or {}, self.vla.config.num_image_tokens
        seen = ForwardPass(states, 0, count, batch.images, batch.view_mask)
        return HeadLoss(loss, metrics, actions), seen

    @torch.no_grad()
    def _chosen(self, logits: Tensor, targets: Tensor, batch: SpatialVLAInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Teacher-forced actions [B, K, 7], the target's where there is no loss, and how many tokens are right."""
        first = self.vla.config.action_token_begin_idx
        targets = targets - first
        offsets, metrics = targets, {}
        for name, slot in zip(_SLOTS, self._grid.slots, strict=True):
            here = (targets >= slot.start) & (targets < slot.stop)
            best = logits[:, first + slot.start : first + slot.stop].argmax(-1) + slot.start
            offsets = torch.where(here, best, offsets)
            metrics[f"{name}_accuracy"] = ((best == targets) & here).sum() / here.sum().clamp(min=1)
        suffix = batch.text.token_type_ids[:, 1:].bool() & (batch.text.attention_mask[:, 1:] != 0)
        ids = batch.text.input_ids[:, 1:] - first
        is_action = suffix & (ids >= 0)
        ids = ids.masked_scatter(suffix & (batch.text.labels[:, 1:] != -100), offsets)
        actions = self._table[ids[is_action]].view(*batch.actions.shape[:2], TOKENS_PER_ACTION, -1).sum(dim=2)
        error = (actions - batch.actions.float()).abs()
        real = (batch.text.labels[:, 1:][is_action] != -100).view(*batch.actions.shape[:2], TOKENS_PER_ACTION)[..., 0]
        weight = real[..., None].float()
        metrics["curr_action_l1_loss"] = error[:, 0].mean()
        metrics["next_actions_l1_loss"] = (error * weight)[:, 1:].sum() / (weight[:, 1:].sum() * 7).clamp(min=1)
        return actions, metrics


def _decode_table(grid: ActionTokenizer) -> Tensor:
    """Row i: what the token of offset i adds to the 7 numbers of an action [8194, 7]."""
    table = np.zeros((grid.size, 7), np.float32)
    for column, slot in zip((slice(0, 3), slice(3, 6), slice(6, 7)), grid.slots, strict=True):
        offsets = np.zeros((slot.stop - slot.start, TOKENS_PER_ACTION), np.int64)
        offsets[:] = np.arange(slot.start, slot.stop)[:, None]
        table[slot, column] = grid.decode(offsets)[:, column]
    return torch.from_numpy(table)


def build_spatialvla_objective(
    vla: SpatialVLAForConditionalGeneration,
    grid: ActionTokenizer,
    auxiliaries: Mapping[str, Auxiliary] | None = None,
    *,
    lora: LoraSpec | None = None,
    freeze_llm_embed: bool = True,
    freeze_vision_tower: bool = False,
    autocast: bool = False,
) -> SpatialVLAObjective:
    """Choose what is trained, in fp32, and put everything on the model's device.

    Args:
        vla: the base model; it is changed in place.
        grid: action grid of the targets.
        lora: None trains the weights themselves.
        freeze_llm_embed, freeze_vision_tower: what full fine-tuning leaves out.
        autocast: the objective will run under bf16 autocast.
    """
    if lora is not None:
        add_lora(vla, lora)
    else:
        vla.freeze(llm_embed=freeze_llm_embed, vision_tower=freeze_vision_tower)
    if autocast:
        keep_input_dtypes(vla)
    for parameter in vla.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return SpatialVLAObjective(vla, grid, auxiliaries).to(vla.device)


def shard_objective(objective: SpatialVLAObjective, world: World, precision: torch.dtype) -> None:
    """Spread a fully trained objective over all processes (FSDP2), block by block."""
    vla = objective.vla
    siglip = vla.vision_tower["vision_model"].get_submodule("encoder.layers")
    blocks = [*vla.language_model.model.layers, *siglip.children()]
    shard(objective, [*blocks, vla.language_model.lm_head], world, precision)


def spatialvla_inputs(
    images: Tensor,
    text: SpatialVLATextBatch,
    actions: Tensor,
    *,
    cameras: Sequence[CameraIntrinsics],
    size: int,
    device: torch.device,
    seeds: Tensor | None = None,
    crop: bool = False,
    view_mask: Tensor | None = None,
) -> SpatialVLAInputs:
    """Inputs of the objective from what the data workers deliver.

    Args:
        images, size, seeds, crop: see `prepare_images`, which runs on `device`.
        text, actions, view_mask: as in `SpatialVLAInputs`, on the CPU.
        cameras: of the B pictures, whatever crop is drawn (the authors' choice).
    """
    pictures = prepare_images(moved(images, device), size, seeds, crop=crop).float() / 255
    intrinsics = torch.stack([camera.matrix(size) for camera in cameras])
    values = (moved(value, device) for value in (actions, view_mask))
    return SpatialVLAInputs(pictures, moved(intrinsics, device), text.to(device), *values)
