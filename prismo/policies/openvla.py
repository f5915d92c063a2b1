"""OpenVLA, OpenVLA-OFT and Spatial-Forcing checkpoints as policies: parallel or causal decoding, merged or adapter.

`load_openvla_policy` assembles the parts, `OpenVLAPolicy` runs them. Images take the path of the training data
(`prismo.data.images`), and only when the policy is asked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prismo.data.images import observation_image
from prismo.data.normalize import normalize, unnormalize
from prismo.embodiment import Embodiment
from prismo.models.component_files import find_component, load_component, read_component
from prismo.models.folder import missing_files
from prismo.models.heads import HEADS, HeadSizes
from prismo.models.openvla import OpenVLAForActionPrediction, PrismaticProcessor
from prismo.models.openvla.prediction import ActionModules, predict_normalized
from prismo.models.projectors import ProprioProjector
from prismo.policies.base import LoadedPolicy, PolicyFamily, PolicyInput
from prismo.policies.checkpoint import Checkpoint, fold_adapter, weights_folder
from prismo.policies.settings import PolicySettings, Quantization, resolve_settings


class OpenVLAPolicy(LoadedPolicy):
    """A loaded model of the OpenVLA family; see `prismo.policies.base.Policy`.

    Args:
        vla: the model, in eval mode on its device.
        modules: action head and projectors on the same device.
        processor: of the checkpoint.
        checkpoint, settings, robot: see `load_openvla_policy`.
    """

    def __init__(
        self,
        vla: OpenVLAForActionPrediction,
        modules: ActionModules,
        processor: PrismaticProcessor,
        checkpoint: Checkpoint,
        settings: PolicySettings,
        robot: Embodiment,
    ) -> None:
        super().__init__(vla, checkpoint.family, checkpoint.source, settings, robot)
        self._vla, self._modules, self._processor = vla, modules, processor
        self._stats = checkpoint.statistics[settings.unnorm_key]
        self._image_size = processor.image_processor.input_sizes[0][-1]
        self._noise: dict[int, torch.Generator] = {}

    def start_episode(self, slot: int, seed: int) -> None:
        # On the CPU, so that an episode's noise depends neither on the device nor on its neighbours in the batch.
        self._noise[slot] = torch.Generator().manual_seed(seed)

    def predict(self, inputs: Sequence[PolicyInput], slots: Sequence[int]) -> np.ndarray:
        text = self._text([item.instruction for item in inputs]).to(self._vla.device)
        normalised = predict_normalized(
            self._vla,
            self._modules,
            text,
            self.pixel_values(inputs),
            self._robot,
            proprio=self._proprio(inputs),
            diffusion_steps=self._settings.diffusion_steps_inference,
            start=self._start_noise(slots),
        )
        actions = unnormalize(normalised.cpu().numpy(), self._stats.action, self._robot.normalization)
        return self._finite(actions)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"attention_kernel": self._vla.config.text_config._attn_implementation}

    def pixel_values(self, inputs: Sequence[PolicyInput]) -> Tensor:
        """What the vision towers see [B, V * 6, H, W]: JPEG round trip, lanczos3, center crop, normalisation.

        Raises:
            ValueError: another number of images than the checkpoint takes.
        """
        for item in inputs:
            if len(item.images) != self.num_images:
                raise ValueError(f"this policy takes {self.num_images} camera images, found {len(item.images)}")
        frames = [
            observation_image(image, self._image_size, crop=self._settings.center_crop)
            for item in inputs
            for image in item.images
        ]
        images = torch.stack(frames).unflatten(0, (len(inputs), -1)).to(self._vla.device)
        return self._processor.image_processor.normalize(images, self._vla.dtype)

    def _text(self, instructions: Sequence[str]) -> Any:
        if self._settings.attention == "causal":
            return self._processor.prompt_batch(instructions)
        return self._processor.query_text(instructions, self._robot.action_tokens, self._vla.action_tokenizer)

    def _proprio(self, inputs: Sequence[PolicyInput]) -> Tensor | None:
        if not self._settings.proprio:
            return None
        states = [item.state for item in inputs if item.state is not None]
        if len(states) < len(inputs):
            raise ValueError("this policy takes the proprioceptive state; an observation has none")
        scaled = normalize(np.stack(states), self._stats.of_proprio(), self._robot.normalization, rule="evaluation")
        return torch.from_numpy(scaled).to(self._vla.device, self._vla.dtype)

    def _start_noise(self, slots: Sequence[int]) -> Tensor | None:
        """Noise [B, K, A] for a head that takes some, from each slot's own generator."""
        if not self._modules.head.from_noise:
            return None
        shape = (self._robot.chunk, self._robot.action_dim)
        draws = [torch.randn(shape, generator=self._noise[slot]) for slot in slots]
        return torch.stack(draws).to(self._vla.device)


def load_openvla_policy(
    checkpoint: Checkpoint,
    settings: PolicySettings,
    robot: Embodiment,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> OpenVLAPolicy:
    """Load every part of a policy and check that it attends as it must.

    Args:
        checkpoint, settings: what the files and the user say.
        robot: what the actions are for.
        device, dtype: of the weights; the published figures are bfloat16 on a GPU.

    Raises:
        FileNotFoundError, ValueError: a file is missing or does not fit.
        SelfTestError: the model does not behave as its attention kind demands.
    """
    device = torch.device(device)
    processor = PrismaticProcessor.from_pretrained(processor_folder(checkpoint))
    vla = _load_vla(checkpoint, settings, device, dtype)
    modules = _load_modules(checkpoint, settings, vla.llm_dim, robot)
    for module in modules.by_stem().values():
        module.to(device, dtype).eval()
    vla.eval()
    vla.self_test()
    return OpenVLAPolicy(vla, modules, processor, checkpoint, settings, robot)


def _load_vla(
    checkpoint: Checkpoint, settings: PolicySettings, device: torch.device, dtype: torch.dtype
) -> OpenVLAForActionPrediction:
    """The model, with its adapter merged in memory and its FiLM towers in place."""
    folder = weights_folder(checkpoint)
    # An adapter is merged in the dtype of the stored weights, so that it gives the weights that merging to disk gives.
    arguments: dict[str, Any] = {"dtype": dtype if checkpoint.adapter is None else "auto"}
    if settings.quantization is not None:
        arguments["quantization_config"] = _quantization_config(settings.quantization, device, dtype)
    if device.type != "cpu":
        arguments["device_map"] = {"": device}  # straight from the files to the device
    vla = OpenVLAForActionPrediction.from_pretrained(folder, attention=settings.attention, self_test=False, **arguments)
    if settings.film:  # before the adapter, whose names contain the wrapper
        from prismo.models.film import add_film, load_film_backbone  # noqa: PLC0415 (imports peft)

        # Without padding in the language mean a prediction does not depend on the other prompts of its batch, and
        # equals the original's, whose batches hold one prompt.
        add_film(vla, exclude_padding=True)
    if checkpoint.adapter is not None:
        fold_adapter(vla, checkpoint).to(dtype)
    if settings.film:
        load_film_backbone(vla, checkpoint.folder)
    if settings.quantization is None:
        vla.to(device, dtype)
    return vla


def _load_modules(checkpoint: Checkpoint, settings: PolicySettings, width: int, robot: Embodiment) -> ActionModules:
    """Action head and projectors, strictly."""
    kind, shapes = HEADS[settings.head], None
    if kind.mark is not None:
        stored = read_component(find_component(checkpoint.folder, "action_head"))
        shapes = {name: tuple(value.shape) for name, value in stored.items()}
    head = kind.build(HeadSizes(width, robot.action_dim, settings.chunk, settings.diffusion_steps_train), shapes)
    head.check_steps(settings.diffusion_steps_inference)
    modules = ActionModules(head, ProprioProjector(width, robot.proprio_dim) if settings.proprio else None)
    for stem, module in modules.by_stem().items():
        load_component(module, checkpoint.folder, stem)
    return modules


def processor_folder(checkpoint: Checkpoint) -> Path:
    """Trainers copy the processor into their checkpoints; one without it has its base model's."""
    if checkpoint.adapter is None or not missing_files(checkpoint.folder, checkpoint.kind.processor):
        return checkpoint.folder
    return weights_folder(checkpoint)


def _quantization_config(kind: Quantization, device: torch.device, dtype: torch.dtype) -> Any:
    flag = f"--load_in_{kind} True"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{flag} needs bitsandbytes: pip install bitsandbytes (or leave the flag out)")
    if device.type != "cuda":
        raise ValueError(f"{flag} needs an NVIDIA GPU; found device {device}. Leave the flag out to run in {dtype}")
    from transformers import BitsAndBytesConfig  # noqa: PLC0415 (only here)

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)


OPENVLA = PolicyFamily(resolve_settings, load_openvla_policy)
