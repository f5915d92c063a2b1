"""OpenVLA's training objective and its inputs; without files or data sets.

`prismo.training.openvla` builds it for the trainer, `scripts/bench_train.py` for measuring.

Shape legend: B batch, V views, K actions per chunk, A numbers per action.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prismo.align.auxiliary import Auxiliary, ForwardPass
from prismo.data.images import prepare_images
from prismo.embodiment import Embodiment
from prismo.models.film import add_film
from prismo.models.heads import HEADS, HeadLoss, HeadSizes
from prismo.models.lora import add_lora, freeze_never_used
from prismo.models.openvla import OpenVLAForActionPrediction, PrismaticImageProcessor, TextBatch
from prismo.models.openvla.prediction import ActionModules, OpenVLARun
from prismo.models.projectors import ProprioProjector
from prismo.training.build import keep_input_dtypes, moved
from prismo.training.config import FinetuneConfig
from prismo.training.objective import Objective


@dataclass(frozen=True)
class OpenVLAInputs:
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


class OpenVLAObjective(Objective[OpenVLAForActionPrediction]):
    """Action loss of OpenVLA-OFT plus auxiliary losses; see `Objective`."""

    def __init__(
        self,
        vla: OpenVLAForActionPrediction,
        modules: ActionModules,
        auxiliaries: Mapping[str, Auxiliary] | None = None,
    ) -> None:
        super().__init__(vla, modules.by_stem(), auxiliaries)
        self.policy = modules

    def main_loss(self, batch: OpenVLAInputs) -> tuple[HeadLoss, ForwardPass]:
        run = OpenVLARun(
            self.vla,
            self.policy,
            batch.text,
            batch.pixel_values,
            (batch.actions.shape[1], batch.actions.shape[2]),
            proprio=batch.proprio,
            hidden_layers=self.hidden_layers,
        )
        loss = self.policy.head.loss(run, batch.actions, batch.action_mask)
        out = run.output
        # The first patch stands behind BOS.
        return loss, ForwardPass(out.hidden_states, 1, out.vision_tokens, batch.images, batch.view_mask)


def build_openvla_objective(
    vla: OpenVLAForActionPrediction,
    robot: Embodiment,
    config: FinetuneConfig,
    auxiliaries: Mapping[str, Auxiliary] | None = None,
    *,
    autocast: bool = False,
) -> OpenVLAObjective:
    """Freeze `vla`, add what is trained (all of it in fp32) and put everything on the model's device.

    Args:
        vla: the base model; it is changed in place.
        robot: sizes of actions and state.
        config: what is trained.
        autocast: the objective will run under bf16 autocast.
    """
    if config.use_film:
        add_film(vla, identity_init=config.film_identity_init, exclude_padding=config.film_exclude_padding)
    add_lora(vla, config.lora)
    freeze_never_used(vla, lm_head_used=HEADS[config.head].uses_lm_head)
    if autocast:
        keep_input_dtypes(vla)
    sizes = HeadSizes(vla.llm_dim, robot.action_dim, robot.chunk, config.num_diffusion_steps_train)
    head = HEADS[config.head].build(sizes)
    proprio = ProprioProjector(vla.llm_dim, robot.proprio_dim) if config.use_proprio else None
    return OpenVLAObjective(vla, ActionModules(head, proprio), auxiliaries).to(vla.device)


def openvla_inputs(
    images: Tensor,
    text: TextBatch,
    actions: Tensor,
    *,
    processor: PrismaticImageProcessor,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    seeds: Tensor | None = None,
    crop: bool = False,
    action_mask: Tensor | None = None,
    proprio: Tensor | None = None,
    view_mask: Tensor | None = None,
) -> OpenVLAInputs:
    """Inputs of the objective from what the data workers deliver.

    Args:
        images, size, seeds, crop: see `prepare_images`, which runs on `device`.
        text, actions, action_mask, proprio, view_mask: as in `OpenVLAInputs`, on the CPU.
        processor: normalisation of the towers.
        dtype: of `pixel_values`.
    """
    pictures = prepare_images(moved(images, device), size, seeds, crop=crop)
    pixels = processor.normalize(pictures, dtype)
    values = (moved(value, device) for value in (actions, action_mask, proprio, view_mask))
    return OpenVLAInputs(pictures.float() / 255, pixels, text.to(device), *values)


def compile_blocks(vla: OpenVLAForActionPrediction) -> None:
    """Compile each transformer block; blocks of a kind share one compiled function, so that the start takes a minute.

    Sequence lengths differ between batches, hence `dynamic`: without it every new length would compile again.
    """
    for layer in vla.language_model.model.layers:
        layer.compile(dynamic=True)
    for tower in vla.vision_backbone.towers:
        for block in tower.blocks[: tower.config.depth - 1]:
            block.compile(dynamic=False)
