"""From a base model to an objective, and from pictures and text to its inputs; without flags, files or data sets.

`prismo.training.openvla` and `scripts/bench_train.py` call it.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from prismo.align import SpatialForcing
from prismo.data.images import center_crop, prepare_images
from prismo.embodiment import Embodiment
from prismo.models.film import add_film
from prismo.models.heads import HEADS, HeadSizes
from prismo.models.lora import add_lora, freeze_never_used
from prismo.models.openvla import OpenVLAForActionPrediction, PrismaticImageProcessor, TextBatch
from prismo.models.openvla.prediction import ActionModules
from prismo.models.projectors import ProprioProjector
from prismo.training.objective import OpenVLAObjective, TrainingInputs
from prismo.training.options import PolicyOptions


def build_modules(llm_dim: int, robot: Embodiment, options: PolicyOptions) -> ActionModules:
    """New side modules in fp32 on the CPU, with the original's initialisation."""
    head = HEADS[options.head].build(HeadSizes(llm_dim, robot.action_dim, robot.chunk, options.diffusion_steps))
    return ActionModules(head, ProprioProjector(llm_dim, robot.proprio_dim) if options.use_proprio else None)


def build_objective(
    vla: OpenVLAForActionPrediction,
    robot: Embodiment,
    options: PolicyOptions,
    alignment: SpatialForcing | None = None,
    *,
    autocast: bool = False,
) -> OpenVLAObjective:
    """Freeze `vla`, add what is trained (all of it in fp32) and put everything on the model's device.

    Args:
        vla: the base model; it is changed in place.
        robot: sizes of actions and state.
        options: what is trained.
        alignment: None trains without a teacher.
        autocast: the objective will run under bf16 autocast.
    """
    if options.use_film:
        add_film(vla, identity_init=options.film_identity_init, exclude_padding=options.film_exclude_padding)
    add_lora(vla, options.lora)
    freeze_never_used(vla, lm_head_used=HEADS[options.head].uses_lm_head)
    if autocast:
        for module in vla.modules():
            if isinstance(module, LoraLayer):
                # peft would turn every activation into fp32 first, only for autocast to turn it back into bf16.
                module.cast_input_dtype_enabled = False
    modules = build_modules(vla.llm_dim, robot, options)
    return OpenVLAObjective(vla, modules, alignment).to(vla.device)


def policy_inputs(
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
) -> TrainingInputs:
    """Inputs of the objective from what the data workers deliver; resize and augmentation run on `device`.

    Args:
        images: uint8 [B, V, 3, H, W] as stored.
        text, actions, action_mask, proprio, view_mask: as in `TrainingInputs`, on the CPU.
        processor: normalisation of the towers.
        size: pixels per side that the towers take.
        dtype: of `pixel_values`.
        seeds: augmentation seed of each sample [B], on the CPU; None = no augmentation.
        crop: center crop, as at evaluation.
    """

    def move(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device, non_blocking=True)

    pictures = prepare_images(images.to(device, non_blocking=True), size, seeds)
    if crop:
        pictures = center_crop(pictures)
    return TrainingInputs(
        images=pictures.float() / 255,
        pixel_values=processor.normalize(pictures, dtype),
        text=text.to(device),
        actions=actions.to(device, non_blocking=True),
        action_mask=move(action_mask),
        proprio=move(proprio),
        view_mask=move(view_mask),
    )


def recompute_activations(vla: PreTrainedModel) -> None:
    """Keep only the inputs of each block for the backward pass and compute the rest again."""
    # transformers renamed the method; non-reentrant, because the re-entrant kind detaches the hidden states to align.
    enable = getattr(vla, "activation_checkpointing_enable", None) or vla.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def compile_blocks(vla: OpenVLAForActionPrediction) -> None:
    """Compile each transformer block; blocks of a kind share one compiled function, so that the start takes a minute.

    Sequence lengths differ between batches, hence `dynamic`: without it every new length would compile again.
    """
    for layer in vla.language_model.model.layers:
        layer.compile(dynamic=True)
    for tower in vla.vision_backbone.towers:
        for block in tower.blocks[: tower.config.depth - 1]:
            block.compile(dynamic=False)
