"""SpatialVLA as a `ModelFamily`, called by `prismo.training.run`: flags, inputs, checkpoints. The loss is in
`prismo.training.spatialvla_objective`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from prismo.align.auxiliary import Auxiliary, load_auxiliaries
from prismo.data.images import CROP_AREA
from prismo.data.loader import Batch
from prismo.data.normalize import DatasetStats
from prismo.embodiment import Camera, Embodiment
from prismo.models.component_files import Step
from prismo.models.lora import LoraSpec
from prismo.models.spatialvla import (
    LIBERO_AGENTVIEW,
    LORA_TARGETS,
    ActionTokenizer,
    CameraIntrinsics,
    SpatialVLAConfig,
    SpatialVLAForConditionalGeneration,
    SpatialVLAProcessor,
    SpatialVLATextBatch,
    TokenDecoder,
)
from prismo.models.spatialvla.action_tokenizer import TOKENS_PER_ACTION, load_gaussians
from prismo.models.spatialvla.modeling import read_config
from prismo.models.spatialvla.rediscretize import rediscretize
from prismo.training.build import Tokenise, recompute_activations, text_of
from prismo.training.config import FinetuneAlignConfig, FinetuneConfig
from prismo.training.distributed import World
from prismo.training.policy_task import PolicyTask, below
from prismo.training.preview import trained_parameters
from prismo.training.sharding import check_torch
from prismo.training.spatialvla_objective import (
    SpatialVLAInputs,
    SpatialVLAObjective,
    build_spatialvla_objective,
    shard_objective,
    spatialvla_inputs,
)
from prismo.training.task import C, ModelFamily, RunSizes
from prismo.util.text import did_you_mean

_LOG = logging.getLogger(__name__)
_PROMPT_TOKENS = 20  # of a LIBERO instruction
_USUAL_FULL_RATE = 2e-5


def _check_flags(config: C, base: Path, processes: int) -> C:
    """The flags as SpatialVLA means them: action tokens, alpha = rank, no shift of the image tokens.

    Raises:
        ValueError: a flag whose value cannot be.
    """
    if config.num_images_in_input != 1:
        raise ValueError(f"SpatialVLA takes one image; leave out --num_images_in_input {config.num_images_in_input}")
    if config.intrinsics not in get_args(Camera):
        raise ValueError(did_you_mean("value of --intrinsics", config.intrinsics, get_args(Camera)))
    if config.adpt_feature and config.adapt_emb is None:
        raise ValueError("--adpt_feature True needs --adapt_emb, a file of `prismo data gaussians`")
    if not config.use_lora and processes > 1:
        check_torch()
        if config.use_val_set:
            raise ValueError(
                "--use_val_set True: a sharded model is validated on one process only; leave the flag out and evaluate "
                "the checkpoints"
            )
    if not config.use_lora and (rate := config.learning_rate) > 10 * _USUAL_FULL_RATE:
        usual = f"full fine-tuning uses about {_USUAL_FULL_RATE:g}"
        _LOG.warning("--learning_rate %g with --use_lora False; %s", rate, usual)
    _processor(config, base)  # every file that it needs is there and whole
    changes: dict[str, Any] = {"use_l1_regression": False}
    if config.use_lora and config.lora_alpha is None:
        changes["lora_alpha"] = config.lora_rank
    if isinstance(config, FinetuneAlignConfig):
        changes["gain_feat_1move"] = False  # there is no token in front of the image tokens that could shift them
    return replace(config, **changes)


def _processor(config: FinetuneConfig, base: Path) -> SpatialVLAProcessor:
    """The base's processor with the run's action grid."""
    processor = SpatialVLAProcessor.from_pretrained(base)
    if config.adapt_emb is None:
        return processor
    gaussians, bins = load_gaussians(config.adapt_emb), processor.action_tokenizer.bins
    return replace(processor, action_tokenizer=ActionTokenizer.from_gaussians(gaussians, config.min_sigma, bins))


def _lora(config: FinetuneConfig) -> LoraSpec | None:
    """The authors' "linear" set; with moved embeddings these are trained, too (their `modules_to_save`)."""
    if not config.use_lora:
        return None
    saved = ("spatial_embed_tokens",) if config.adpt_feature else ()
    return LoraSpec(config.lora_rank, config.lora_alpha, config.lora_dropout, LORA_TARGETS["linear"], saved)


@dataclass(eq=False)
class SpatialVLATask(PolicyTask[SpatialVLAObjective]):
    """What the trainer does with the objective, a `prismo.training.task.TrainingTask`.

    Attributes:
        processor: with the run's action grid, statistics and cameras, as it is saved.
    """

    processor: SpatialVLAProcessor

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cameras = {name: self.processor.camera(unnorm_key(name)) for name in self.statistics}

    def inputs(self, batch: Batch, train: bool) -> SpatialVLAInputs:
        return spatialvla_inputs(
            batch.images,
            text_of(batch.text, SpatialVLATextBatch),
            batch.actions,
            cameras=[self.cameras[name] for name in batch.dataset_names],
            size=self.processor.config.image_pixels,
            device=self.device,
            seeds=batch.seeds if train and self.config.image_aug else None,
            crop=self.config.image_aug and not train,
            view_mask=batch.text.get("view_mask"),
        )

    def predict(self, inputs: SpatialVLAInputs) -> Tensor:
        """Normalised actions [B, K, 7] by greedy decoding, token by token."""
        slots, count = self.processor.action_tokenizer.slots, self.processor.action_tokens
        # No graph: it would be recorded anew for every batch, as the decoder does not outlive it.
        decoder = TokenDecoder(self.objective.vla, slots, count, cuda_graph=False)
        ids = decoder(_prompts(inputs.text), inputs.images[:, 0], inputs.intrinsics)
        return torch.from_numpy(self.processor.normalized_actions(ids)).float().to(self.device)

    def write(self, folder: Path, step: Step, weights: Mapping[str, Tensor]) -> None:
        if self.lora is None:
            self._write_model(folder, weights)
        super().write(folder, step, weights)
        self.processor.save_pretrained(folder)

    def _write_model(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """The complete model in the official layout, in the base's dtype."""
        vla, trained, dtype = self.objective.vla, below(weights, "vla."), read_config(self.base).stored_dtype
        state = {
            name: trained.get(name, parameter.detach()).to("cpu", dtype) for name, parameter in vla.named_parameters()
        }
        vla.save_pretrained(folder, state_dict=state)
        if (self.base / "generation_config.json").is_file():
            shutil.copyfile(self.base / "generation_config.json", folder / "generation_config.json")


def unnorm_key(dataset: str) -> str:
    """Key of a dataset's statistics in the processor: with a version, as the authors have them."""
    return dataset if "/" in dataset else f"{dataset}/1.0.0"


def _prompts(text: SpatialVLATextBatch) -> SpatialVLATextBatch:
    """Training text without its action tokens, for prediction."""
    is_prompt = (text.attention_mask != 0) & (text.token_type_ids == 0)
    length = int(is_prompt.sum(dim=1).max())
    mask = is_prompt[:, :length].long()
    ids = text.input_ids[:, :length] * mask  # padding is token 0
    return SpatialVLATextBatch(ids, mask, 1 - mask, torch.full_like(ids, -100))


def _camera(config: FinetuneConfig) -> CameraIntrinsics | None:
    """What the run stores for its datasets; None = the base's choice."""
    if config.intrinsics == "checkpoint":
        return None
    return LIBERO_AGENTVIEW.center_cropped(CROP_AREA) if config.image_aug else LIBERO_AGENTVIEW


def _load_task(
    config: FinetuneConfig, base: Path, robot: Embodiment, statistics: Mapping[str, DatasetStats], world: World
) -> SpatialVLATask:
    """Load the model and the auxiliary losses and put together what is trained."""
    precision = config.precision(world.device)
    vla = SpatialVLAForConditionalGeneration.from_pretrained(base, dtype=precision, device=world.device)
    processor = _processor(config, base)
    for name, stats in statistics.items():
        processor = processor.for_dataset(unnorm_key(name), stats, _camera(config))
    if config.adpt_feature:
        rediscretize(vla, SpatialVLAProcessor.from_pretrained(base).action_tokenizer, processor.action_tokenizer)
    if config.gradient_checkpointing:
        recompute_activations(vla)
    torch.manual_seed(config.seed)  # of every new weight; the same on every process
    auxiliaries = load_auxiliaries(config, vla.llm_dim, world.device)
    autocast = precision != torch.float32
    objective = _objective(config, vla, processor.action_tokenizer, auxiliaries, autocast)
    if not config.use_lora and world.size > 1:
        shard_objective(objective, world, precision)
    return SpatialVLATask(objective, config, robot, statistics, base, world, _lora(config), processor)


def _objective(
    config: FinetuneConfig,
    vla: SpatialVLAForConditionalGeneration,
    grid: ActionTokenizer,
    auxiliaries: Mapping[str, Auxiliary],
    autocast: bool = False,
) -> SpatialVLAObjective:
    frozen = {"freeze_llm_embed": config.freeze_llm_embed, "freeze_vision_tower": config.freeze_vision_tower}
    return build_spatialvla_objective(vla, grid, auxiliaries, lora=_lora(config), autocast=autocast, **frozen)


def _sizes(config: FinetuneConfig, base: Path, robot: Embodiment) -> RunSizes:
    """Sizes of a run, see `ModelFamily`."""
    model: SpatialVLAConfig = read_config(base)
    auxiliaries = load_auxiliaries(config, model.text_config.hidden_size, torch.device("meta"))
    with torch.device("meta"):
        vla = SpatialVLAForConditionalGeneration.empty(model)
        objective = _objective(config, vla, SpatialVLAProcessor.from_pretrained(base).action_tokenizer, auxiliaries)
    frozen = sum(parameter.numel() for parameter in objective.parameters() if not parameter.requires_grad)
    tokens = model.num_image_tokens + _PROMPT_TOKENS + robot.chunk * TOKENS_PER_ACTION
    return RunSizes(frozen, trained_parameters(objective, "model"), model.text_config, tokens)


SPATIALVLA = ModelFamily(
    check_flags=_check_flags,
    chunk=lambda base: SpatialVLAProcessor.from_pretrained(base).chunk,
    image_size=lambda base: read_config(base).image_pixels,
    hidden_states=lambda base: read_config(base).text_config.num_hidden_layers + 1,
    load_collate=lambda config, base: Tokenise(_processor(config, base).training_text),
    load_task=_load_task,
    sizes=_sizes,
    prompt=lambda instruction: f"{instruction.lower()}\n",  # no template, see `prompt_ids`
    usual_batch=256,
)
