"""OpenVLA as a `ModelFamily`, called by `prismo.training.run`. Another model family brings such a file, too."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prismo.align import SpatialForcing, load_teacher
from prismo.data.dataset import Sample
from prismo.data.loader import Batch
from prismo.data.normalize import DatasetStats, dump_statistics
from prismo.embodiment import Embodiment
from prismo.merging.merge import MergeReport, merge
from prismo.models.component_files import Step, load_component, save_component
from prismo.models.lora import save_adapter
from prismo.models.openvla import (
    BinTokenizer as ActionTokenizer,
)
from prismo.models.openvla import (
    OpenVLAConfig,
    OpenVLAForActionPrediction,
    PrismaticProcessor,
    TextBatch,
)
from prismo.models.openvla.prediction import predict_normalized as predict_actions
from prismo.models.openvla.processing import prompt_text
from prismo.models.weight_files import fingerprint, full_fingerprint, stored_tensors
from prismo.training.build import build_objective, compile_blocks, policy_inputs, recompute_activations
from prismo.training.config import FinetuneAlignConfig, FinetuneConfig
from prismo.training.distributed import World
from prismo.training.objective import OpenVLAObjective, TrainingInputs
from prismo.training.preview import trained_parameters
from prismo.training.task import C, ModelFamily, Outline, TrainingTask

_TEXT_TOKENS = 95  # prompt, actions and stop token of a LIBERO sample
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True)
class CollateText:
    """Runs in the data workers: token ids of a batch, and which camera views are missing.

    Datasets store a missing view as a black picture; such views take no part in the alignment.
    """

    processor: PrismaticProcessor
    tokens: ActionTokenizer

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        actions = torch.stack([sample.actions for sample in samples]).numpy()
        text = self.processor.training_text([sample.instruction for sample in samples], actions, self.tokens)
        result = {"input_ids": text.input_ids, "labels": text.labels}
        if text.attention_mask is not None:
            result["attention_mask"] = text.attention_mask
        there = views_present(samples)
        return result if there.all() else result | {"view_mask": there}


def views_present(samples: Sequence[Sample]) -> Tensor:
    """bool [B, V], False at views that are missing: datasets store them as black pictures."""
    return torch.tensor([[_has_content(view) for view in sample.images] for sample in samples])


def _has_content(view: Tensor) -> bool:
    return bool(view[:, ::16, ::16].any()) or bool(view.any())  # almost always the first, which is quick


def settle(config: C, base: Path, processes: int) -> C:
    """Refuse what OpenVLA cannot.

    Raises:
        ValueError: naming the flag.
    """
    if not config.use_lora:
        raise ValueError("--use_lora False: OpenVLA is trained through adapters here; leave the flag out")
    return config


def load_collate(config: FinetuneConfig, base: Path) -> CollateText:
    """Tokeniser and action tokens of a base model, without its weights."""
    model = OpenVLAConfig.from_pretrained(base)
    return CollateText(
        PrismaticProcessor.from_pretrained(base), ActionTokenizer(model.token_vocab_size, model.n_action_bins)
    )


def load_base(base: Path, world: World, precision: torch.dtype) -> OpenVLAForActionPrediction:
    """The frozen model on this process's device, straight from the files."""
    placement: dict[str, Any] = {} if world.device.type == "cpu" else {"device_map": {"": world.device}}
    return OpenVLAForActionPrediction.from_pretrained(base, dtype=precision, attention="bidirectional", **placement)


def load_alignment(config: FinetuneConfig, llm_dim: int, world: World) -> SpatialForcing | None:
    """Teacher and projector, if the run has them."""
    recipe = config.align_recipe
    if recipe is None or not isinstance(config, FinetuneAlignConfig):
        return None
    teacher = load_teacher(
        config.teacher,
        config.teacher_path,
        dtype=config.teacher_precision(world.device),
        device=world.device,
        compile=config.compile_vggt,
    )
    return SpatialForcing(teacher, llm_dim, recipe)


class OpenVLATask:
    """What the trainer does with an OpenVLA objective; `build_task` binds its methods into a `TrainingTask`.

    Args:
        objective: of `build_objective`.
        config: the run's flags.
        robot: sizes of actions and state.
        statistics: of the datasets, for the checkpoints.
        base: folder of the base model.
        world: the processes of the run.
    """

    def __init__(
        self,
        objective: OpenVLAObjective,
        config: FinetuneConfig,
        robot: Embodiment,
        statistics: Mapping[str, DatasetStats],
        base: Path,
        world: World,
    ) -> None:
        self.objective, self.config, self.robot, self.statistics = objective, config, robot, statistics
        self.base, self.device = base, world.device
        self.precision = config.precision(world.device)
        self.images = PrismaticProcessor.from_pretrained(base).image_processor
        tensors = stored_tensors(base)
        self.base_fingerprint = fingerprint(tensors)
        self.base_full_fingerprint = full_fingerprint(tensors) if world.is_main else None  # that process writes it

    def inputs(self, batch: Batch, train: bool) -> TrainingInputs:
        text = TextBatch(batch.text["input_ids"], batch.text.get("attention_mask"), batch.text["labels"])
        augmented = train and self.config.image_aug
        return policy_inputs(
            batch.images,
            text,
            batch.actions,
            processor=self.images,
            size=self.objective.vla.config.towers[0].image_size,
            device=self.device,
            dtype=self.precision,
            seeds=batch.seeds if augmented else None,
            crop=self.config.image_aug and not train,
            action_mask=batch.action_mask if self.config.use_tail else None,
            proprio=batch.proprio if self.config.use_proprio else None,
            view_mask=batch.text.get("view_mask"),
        )

    def predict(self, inputs: TrainingInputs) -> Tensor:
        return predict_actions(
            self.objective.vla,
            self.objective.policy,
            inputs.text,
            inputs.pixel_values,
            self.robot,
            proprio=inputs.proprio,
            diffusion_steps=self.config.num_diffusion_steps_train,
        )

    def cosine_map(self, inputs: TrainingInputs) -> Tensor:
        return self.objective(inputs, with_map=True).align_map

    def pictures(self, inputs: TrainingInputs) -> Tensor:
        return self.images.denormalize(inputs.pixel_values).clamp(0, 1)

    def write(self, folder: Path, step: Step) -> None:
        vla = self.objective.vla
        base = str(self.base.resolve()) if Path(self.config.vla_path).is_dir() else self.config.vla_path
        spec = self.config.policy_options.lora
        known = {"base_fingerprint": self.base_fingerprint, "base_full_fingerprint": self.base_full_fingerprint}
        save_adapter(vla, folder, spec, base=base, **known)
        # Published action heads are bf16, the projectors fp32.
        head_dtype = torch.bfloat16 if self.precision == torch.bfloat16 else None
        for stem, module in self.components().items():
            save_component(module, folder, stem, step, dtype=head_dtype if stem == "action_head" else None)
        if vla.vision_backbone.film:
            save_component(vla.vision_backbone, folder, "vision_backbone", step)
        for name in _PROCESSOR_FILES:
            if (self.base / name).is_file():
                shutil.copyfile(self.base / name, folder / name)
        dump_statistics(self.statistics, folder / "dataset_statistics.json")

    def merge(self, folder: Path) -> MergeReport:
        return merge(self.base, folder, overwrite=True)

    def load_modules(self, folder: Path, step: int) -> list[str]:
        """Side modules of a published checkpoint; its adapters are already in the merged weights."""
        named = any(folder.glob(f"*--{step}_checkpoint.pt"))
        files = [
            load_component(module, folder, stem, step if named else None) for stem, module in self.components().items()
        ]
        return [path.name for path in files]

    def components(self) -> dict[str, nn.Module]:
        """Side modules by the stem of their files."""
        alignment = self.objective.alignment
        trained: dict[str, nn.Module] = {} if alignment is None else {"align_projector": alignment.projector}
        return self.objective.policy.by_stem() | trained


def build_task(
    config: FinetuneConfig, base: Path, robot: Embodiment, statistics: Mapping[str, DatasetStats], world: World
) -> TrainingTask:
    """Load the model and the teacher and put together what is trained."""
    precision = config.precision(world.device)
    vla = load_base(base, world, precision)
    if config.gradient_checkpointing:
        recompute_activations(vla)
    torch.manual_seed(config.seed)  # of every new weight; the same on every process
    alignment = load_alignment(config, vla.llm_dim, world)
    autocast = precision != torch.float32
    objective = build_objective(vla, robot, config.policy_options, alignment, autocast=autocast)
    if config.compile:
        compile_blocks(vla)
    task = OpenVLATask(objective, config, robot, statistics, base, world)
    return TrainingTask(
        objective=objective,
        robot=robot,
        inputs=task.inputs,
        predict=task.predict,
        write=lambda folder, step, _: task.write(folder, step),
        merge=task.merge if config.merge_lora_during_training else None,
        load_modules=task.load_modules,
        cosine_map=None if alignment is None else task.cosine_map,
        pictures=task.pictures,
        base_fingerprint=task.base_fingerprint,
    )


def outline(config: FinetuneConfig, base: Path, robot: Embodiment) -> Outline:
    """Sizes of a run, see `ModelFamily`."""
    model = OpenVLAConfig.from_pretrained(base)
    with torch.device("meta"):
        vla = OpenVLAForActionPrediction(model)
        frozen = sum(parameter.numel() for parameter in vla.parameters())
        objective = build_objective(vla, robot, config.policy_options)
    tokens = config.num_images_in_input * model.patches_per_view + _TEXT_TOKENS
    return Outline(frozen, trained_parameters(objective, "FiLM"), model.text_config, tokens)


def pictures(config: FinetuneConfig, base: Path, batch: Batch) -> Tensor:
    """What the model sees of a batch [B, V, 3, H, W]: normalised for the towers and back."""
    processor = PrismaticProcessor.from_pretrained(base).image_processor
    inputs = policy_inputs(
        batch.images,
        TextBatch(batch.text["input_ids"], batch.text.get("attention_mask"), batch.text["labels"]),
        batch.actions,
        processor=processor,
        size=_image_size(base),
        device=torch.device("cpu"),
        dtype=torch.float32,
        seeds=batch.seeds if config.image_aug else None,
    )
    return processor.denormalize(inputs.pixel_values).clamp(0, 1)


def _image_size(base: Path) -> int:
    return OpenVLAConfig.from_pretrained(base).towers[0].image_size


OPENVLA = ModelFamily(
    settle=settle,
    chunk=lambda base: None,
    image_size=_image_size,
    hidden_states=lambda base: OpenVLAConfig.from_pretrained(base).text_config.num_hidden_layers + 1,
    load_collate=load_collate,
    build_task=build_task,
    outline=outline,
    pictures=pictures,
    prompt=prompt_text,
    usual_batch=64,
)
