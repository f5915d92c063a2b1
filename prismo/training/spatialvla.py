"""SpatialVLA as a `ModelFamily`, called by `prismo.training.run`: flags, inputs, checkpoints. The loss is in
`prismo.training.spatialvla_objective`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from prismo.align.spatial_forcing import AlignProjector
from prismo.data.dataset import Sample
from prismo.data.loader import Batch
from prismo.data.normalize import DatasetStats, dump_statistics
from prismo.embodiment import Embodiment
from prismo.merging.merge import MergeReport, merge
from prismo.models.component_files import Step, find_component, read_component, save_component
from prismo.models.lora import LoraSpec, save_adapter
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
from prismo.models.weight_files import fingerprint, full_fingerprint, stored_tensors
from prismo.policies.flags import Intrinsics
from prismo.training.build import recompute_activations
from prismo.training.config import FinetuneAlignConfig, FinetuneConfig
from prismo.training.distributed import World
from prismo.training.openvla import load_alignment, views_present
from prismo.training.preview import trained_parameters
from prismo.training.sharding import check_torch, is_sharded, local, scatter
from prismo.training.spatialvla_objective import (
    SpatialVLAInputs,
    SpatialVLAObjective,
    build_objective,
    policy_inputs,
    shard_objective,
)
from prismo.training.task import C, ModelFamily, Outline, TrainingTask
from prismo.util.text import did_you_mean

_LOG = logging.getLogger(__name__)
_CROP_AREA = 0.9  # of the random crops
_PROMPT_TOKENS = 20  # of a LIBERO instruction
_USUAL_FULL_RATE = 2e-5


def settle(config: C, base: Path, processes: int) -> C:
    """The flags as SpatialVLA means them: action tokens, alpha = rank, no shift of the image tokens.

    Raises:
        ValueError: a flag whose value cannot be.
    """
    if config.num_images_in_input != 1:
        raise ValueError(f"SpatialVLA takes one image; leave out --num_images_in_input {config.num_images_in_input}")
    if config.intrinsics not in get_args(Intrinsics):
        raise ValueError(did_you_mean("value of --intrinsics", config.intrinsics, get_args(Intrinsics)))
    if config.adpt_feature and config.adapt_emb is None:
        raise ValueError("--adpt_feature True needs --adapt_emb, a file of `prismo data gaussians`")
    if not config.use_lora and processes > 1:
        check_torch()
    if not config.use_lora and processes > 1 and config.use_val_set:
        raise ValueError(
            "--use_val_set True: a sharded model is validated on one process only; leave the flag out and evaluate the "
            "checkpoints"
        )
    if not config.use_lora and config.learning_rate > 10 * _USUAL_FULL_RATE:
        _LOG.warning(
            "--learning_rate %g with --use_lora False; full fine-tuning uses about %g",
            config.learning_rate,
            _USUAL_FULL_RATE,
        )
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
    grid = ActionTokenizer.from_gaussians(
        load_gaussians(config.adapt_emb), config.min_sigma, processor.action_tokenizer.bins
    )
    return replace(processor, action_tokenizer=grid)


def _lora(config: FinetuneConfig) -> LoraSpec | None:
    """The authors' "linear" set; with moved embeddings these are trained, too (their `modules_to_save`)."""
    if not config.use_lora:
        return None
    saved = ("spatial_embed_tokens",) if config.adpt_feature else ()
    return LoraSpec(config.lora_rank, config.lora_alpha, config.lora_dropout, LORA_TARGETS["linear"], saved)


@dataclass(frozen=True)
class CollateText:
    """Runs in the data workers: token ids of a batch, and which pictures are missing."""

    processor: SpatialVLAProcessor

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        actions = torch.stack([sample.actions for sample in samples]).numpy()
        is_pad = ~torch.stack([sample.action_mask for sample in samples]).numpy()
        text = self.processor.training_text([sample.instruction for sample in samples], actions, is_pad)
        there = views_present(samples)
        return vars(text) | ({} if there.all() else {"view_mask": there})


class SpatialVLATask:
    """What the trainer does with the objective; `build_task` binds its methods into a `TrainingTask`.

    Args:
        objective: of `build_objective`.
        config: the run's flags, settled.
        processor: with the run's action grid, statistics and cameras, as it is saved.
        statistics: of the datasets by name.
        base: folder of the base model.
        world: the processes of the run.
    """

    def __init__(
        self,
        objective: SpatialVLAObjective,
        config: FinetuneConfig,
        processor: SpatialVLAProcessor,
        statistics: Mapping[str, DatasetStats],
        base: Path,
        world: World,
    ) -> None:
        self.objective, self.config, self.processor, self.statistics = objective, config, processor, statistics
        self.base, self.device = base, world.device
        self.cameras = {name: processor.camera(unnorm_key(name)) for name in statistics}
        self.stored_dtype = read_config(base).stored_dtype
        tensors = stored_tensors(base)
        self.base_fingerprint = fingerprint(tensors)
        self.base_full_fingerprint = full_fingerprint(tensors) if world.is_main else None  # that process writes it

    def inputs(self, batch: Batch, train: bool) -> SpatialVLAInputs:
        augmented = train and self.config.image_aug
        return policy_inputs(
            batch.images,
            _text(batch),
            batch.actions,
            cameras=[self.cameras[name] for name in batch.dataset_names],
            size=self.processor.config.image_pixels,
            device=self.device,
            seeds=batch.seeds if augmented else None,
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

    def cosine_map(self, inputs: SpatialVLAInputs) -> Tensor:
        return self.objective(inputs, with_map=True).align_map

    def write(self, folder: Path, step: Step, weights: Mapping[str, Tensor]) -> None:
        vla = self.objective.vla
        lora = _lora(self.config)
        if lora is not None:
            base = str(self.base.resolve()) if Path(self.config.vla_path).is_dir() else self.config.vla_path
            known = {"base_fingerprint": self.base_fingerprint, "base_full_fingerprint": self.base_full_fingerprint}
            save_adapter(vla, folder, lora, base=base, **known)
        else:
            self._write_model(folder, weights)
        if self.objective.alignment is not None:
            alignment = self.objective.alignment
            with torch.device("meta"):
                norm = alignment.recipe.use_vlm_norm
                projector = AlignProjector(vla.llm_dim, alignment.teacher.width, use_vlm_norm=norm)
            projector.load_state_dict(_below(weights, "alignment.projector."), assign=True)
            save_component(projector, folder, "align_projector", step)
        self.processor.save_pretrained(folder)
        dump_statistics(self.statistics, folder / "dataset_statistics.json")

    def _write_model(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """The complete model in the official layout, in the base's dtype."""
        vla, trained = self.objective.vla, _below(weights, "vla.")
        state = {
            name: trained.get(name, parameter.detach()).to("cpu", self.stored_dtype)
            for name, parameter in vla.named_parameters()
        }
        vla.save_pretrained(folder, state_dict=state)
        if (self.base / "generation_config.json").is_file():
            shutil.copyfile(self.base / "generation_config.json", folder / "generation_config.json")

    def merge(self, folder: Path) -> MergeReport:
        return merge(self.base, folder, overwrite=True)

    def load_modules(self, folder: Path, step: int) -> list[str]:
        """The align projector of a checkpoint; the policy itself is in the model that the run starts from."""
        if self.objective.alignment is None:
            return []
        named = any(folder.glob(f"*--{step}_checkpoint.pt"))
        path = find_component(folder, "align_projector", step if named else None)
        stored = read_component(path)
        for name, parameter in self.objective.alignment.projector.named_parameters():
            local(parameter.detach()).copy_(scatter(stored[name], parameter))
        return [path.name]


def unnorm_key(dataset: str) -> str:
    """Key of a dataset's statistics in the processor: with a version, as the authors have them."""
    return dataset if "/" in dataset else f"{dataset}/1.0.0"


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _text(batch: Batch) -> SpatialVLATextBatch:
    return SpatialVLATextBatch(*(batch.text[f] for f in ("input_ids", "attention_mask", "token_type_ids", "labels")))


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
    return LIBERO_AGENTVIEW.center_cropped(_CROP_AREA) if config.image_aug else LIBERO_AGENTVIEW


def build_task(
    config: FinetuneConfig, base: Path, robot: Embodiment, statistics: Mapping[str, DatasetStats], world: World
) -> TrainingTask:
    """Load the model and the teacher and put together what is trained."""
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
    objective = build_objective(
        vla,
        processor.action_tokenizer,
        _lora(config),
        load_alignment(config, vla.llm_dim, world),
        freeze_llm_embed=config.freeze_llm_embed,
        freeze_vision_tower=config.freeze_vision_tower,
        autocast=precision != torch.float32,
    )
    if not config.use_lora and world.size > 1:
        shard_objective(objective, world, precision)
    task = SpatialVLATask(objective, config, processor, statistics, base, world)
    # A sharded forward pass needs all processes, and only the main one draws maps.
    draws = objective.alignment is not None and not is_sharded(objective)
    return TrainingTask(
        objective=objective,
        robot=robot,
        inputs=task.inputs,
        predict=task.predict,
        write=task.write,
        merge=task.merge if config.use_lora and config.merge_lora_during_training else None,
        load_modules=task.load_modules,
        cosine_map=task.cosine_map if draws else None,
        pictures=lambda inputs: inputs.images,
        base_fingerprint=task.base_fingerprint,
    )


def outline(config: FinetuneConfig, base: Path, robot: Embodiment) -> Outline:
    """Sizes of a run, see `ModelFamily`."""
    model: SpatialVLAConfig = read_config(base)
    with torch.device("meta"):
        objective = build_objective(
            SpatialVLAForConditionalGeneration.empty(model),
            SpatialVLAProcessor.from_pretrained(base).action_tokenizer,
            _lora(config),
            freeze_llm_embed=config.freeze_llm_embed,
            freeze_vision_tower=config.freeze_vision_tower,
        )
    frozen = sum(parameter.numel() for parameter in objective.parameters() if not parameter.requires_grad)
    tokens = model.num_image_tokens + _PROMPT_TOKENS + robot.chunk * TOKENS_PER_ACTION
    return Outline(frozen, trained_parameters(objective, "model"), model.text_config, tokens)


def pictures(config: FinetuneConfig, base: Path, batch: Batch) -> Tensor:
    """What the model sees of a batch [B, 1, 3, 224, 224] in [0, 1]."""
    processor = SpatialVLAProcessor.from_pretrained(base)
    inputs = policy_inputs(
        batch.images,
        _text(batch),
        batch.actions,
        cameras=[processor.camera()] * len(batch),
        size=processor.config.image_pixels,
        device=torch.device("cpu"),
        seeds=batch.seeds if config.image_aug else None,
    )
    return inputs.images


SPATIALVLA = ModelFamily(
    settle=settle,
    chunk=lambda base: SpatialVLAProcessor.from_pretrained(base).chunk,
    image_size=lambda base: read_config(base).image_pixels,
    hidden_states=lambda base: read_config(base).text_config.num_hidden_layers + 1,
    load_collate=lambda config, base: CollateText(_processor(config, base)),
    build_task=build_task,
    outline=outline,
    pictures=pictures,
    prompt=lambda instruction: f"{instruction.lower()}\n",  # no template, see `prompt_ids`
    usual_batch=256,
)
