"""OpenVLA as a `ModelFamily`, called by `prismo.training.run`. Another model family brings such a file, too."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prismo.align.auxiliary import load_auxiliaries
from prismo.data.loader import Batch
from prismo.data.normalize import DatasetStats
from prismo.embodiment import Embodiment
from prismo.models.bin_tokenizer import BinTokenizer
from prismo.models.component_files import Step, save_component
from prismo.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction, PrismaticProcessor, TextBatch
from prismo.models.openvla.prediction import predict_normalized
from prismo.models.openvla.processing import prompt_text
from prismo.training.build import Tokenise, recompute_activations, text_of
from prismo.training.config import FinetuneConfig
from prismo.training.distributed import World
from prismo.training.openvla_objective import (
    OpenVLAInputs,
    OpenVLAObjective,
    build_openvla_objective,
    compile_blocks,
    openvla_inputs,
)
from prismo.training.policy_task import PolicyTask
from prismo.training.preview import trained_parameters
from prismo.training.task import C, ModelFamily, RunSizes

_TEXT_TOKENS = 95  # prompt, actions and stop token of a LIBERO sample
_PROCESSOR_FILES = (
    *("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json"),
)


def _check_flags(config: C, base: Path, processes: int) -> C:
    """Refuse what OpenVLA cannot.

    Raises:
        ValueError: naming the flag.
    """
    if not config.use_lora:
        raise ValueError("--use_lora False: OpenVLA is trained through adapters here; leave the flag out")
    return config


def _text(
    processor: PrismaticProcessor, tokens: BinTokenizer, instructions: list[str], actions: np.ndarray, _: np.ndarray
) -> TextBatch:
    return processor.training_text(instructions, actions, tokens)


def _load_collate(config: FinetuneConfig, base: Path) -> Tokenise:
    """Tokeniser and action tokens of a base model, without its weights."""
    model = OpenVLAConfig.from_pretrained(base)
    tokens = BinTokenizer(model.token_vocab_size, model.n_action_bins)
    return Tokenise(partial(_text, PrismaticProcessor.from_pretrained(base), tokens))


@dataclass(eq=False)
class OpenVLATask(PolicyTask[OpenVLAObjective]):
    """What the trainer does with an OpenVLA objective, a `prismo.training.task.TrainingTask`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.images = PrismaticProcessor.from_pretrained(self.base).image_processor

    def inputs(self, batch: Batch, train: bool) -> OpenVLAInputs:
        return openvla_inputs(
            batch.images,
            text_of(batch.text, TextBatch),
            batch.actions,
            processor=self.images,
            size=self.objective.vla.config.towers[0].image_size,
            device=self.device,
            dtype=self.precision,
            seeds=batch.seeds if train and self.config.image_aug else None,
            crop=self.config.image_aug and not train,
            action_mask=batch.action_mask if self.config.use_tail else None,
            proprio=batch.proprio if self.config.use_proprio else None,
            view_mask=batch.text.get("view_mask"),
        )

    def predict(self, inputs: OpenVLAInputs) -> Tensor:
        return predict_normalized(
            self.objective.vla,
            self.objective.policy,
            inputs.text,
            inputs.pixel_values,
            self.robot,
            proprio=inputs.proprio,
            diffusion_steps=self.config.num_diffusion_steps_train,
        )

    def write(self, folder: Path, step: Step, weights: Mapping[str, Tensor]) -> None:
        super().write(folder, step, weights)
        if self.objective.vla.vision_backbone.film:
            save_component(self.objective.vla.vision_backbone, folder, "vision_backbone", step)
        for name in _PROCESSOR_FILES:
            if (self.base / name).is_file():
                shutil.copyfile(self.base / name, folder / name)


def _load_task(
    config: FinetuneConfig, base: Path, robot: Embodiment, statistics: Mapping[str, DatasetStats], world: World
) -> OpenVLATask:
    """Load the model and the auxiliary losses and put together what is trained."""
    precision = config.precision(world.device)
    placement: dict[str, Any] = {} if world.device.type == "cpu" else {"device_map": {"": world.device}}
    vla = OpenVLAForActionPrediction.from_pretrained(base, dtype=precision, attention="bidirectional", **placement)
    if config.gradient_checkpointing:
        recompute_activations(vla)
    torch.manual_seed(config.seed)  # of every new weight; the same on every process
    auxiliaries = load_auxiliaries(config, vla.llm_dim, world.device)
    objective = build_openvla_objective(vla, robot, config, auxiliaries, autocast=precision != torch.float32)
    if config.compile:
        compile_blocks(vla)
    return OpenVLATask(objective, config, robot, statistics, base, world, config.lora)


def _sizes(config: FinetuneConfig, base: Path, robot: Embodiment) -> RunSizes:
    """Sizes of a run, see `ModelFamily`."""
    model = OpenVLAConfig.from_pretrained(base)
    auxiliaries = load_auxiliaries(config, model.text_config.hidden_size, torch.device("meta"))
    with torch.device("meta"):
        vla = OpenVLAForActionPrediction(model)
        frozen = sum(parameter.numel() for parameter in vla.parameters())
        objective = build_openvla_objective(vla, robot, config, auxiliaries)
    tokens = config.num_images_in_input * model.patches_per_view + _TEXT_TOKENS
    return RunSizes(frozen, trained_parameters(objective, "FiLM"), model.text_config, tokens)


OPENVLA = ModelFamily(
    check_flags=_check_flags,
    chunk=lambda base: None,
    image_size=lambda base: OpenVLAConfig.from_pretrained(base).towers[0].image_size,
    hidden_states=lambda base: OpenVLAConfig.from_pretrained(base).text_config.num_hidden_layers + 1,
    load_collate=_load_collate,
    load_task=_load_task,
    sizes=_sizes,
    prompt=prompt_text,
    usual_batch=64,
)
