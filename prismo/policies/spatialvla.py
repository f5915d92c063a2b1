"""SpatialVLA checkpoints as policies: one camera, chunks of four actions, the adaptive ensemble over them.

`resolve_spatialvla_settings` and `load_spatialvla_policy` are to SpatialVLA what their namesakes are to OpenVLA.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prismo.data.images import CROP_AREA, observation_image
from prismo.data.normalize import UnknownKeyError
from prismo.embodiment import Embodiment
from prismo.models.spatialvla import (
    LIBERO_AGENTVIEW,
    AdaptiveEnsemble,
    CameraIntrinsics,
    SpatialVLAForConditionalGeneration,
    SpatialVLAProcessor,
    TokenDecoder,
    predict_actions,
)
from prismo.models.spatialvla.modeling import read_config
from prismo.policies.base import LoadedPolicy, PolicyFamily, PolicyInput
from prismo.policies.checkpoint import Checkpoint, fold_adapter, weights_folder
from prismo.policies.flags import PolicyFlags
from prismo.policies.settings import otherwise_trained, refuse, statistics_key

_LOG = logging.getLogger(__name__)

_FRANKA_KEY = "droid/1.0.0"  # the published checkpoints' statistics of the arm that LIBERO simulates


@dataclass(frozen=True)
class SpatialVLASettings:
    """Resolved settings.

    Attributes:
        unnorm_key: whose statistics scale the actions.
        chunk: actions per answer: 1 with the ensemble (which asks at every step), else the model's chunk.
        center_crop: crop as in training, whose random crops keep 90 % of the area.
        adaptive_ensemble: average the chunks of the last steps (CogACT, arXiv 2411.19650).
        ensemble_alpha: its sharpness.
        intrinsics: "checkpoint" (what the authors used, a WidowX camera) or "libero" (the true one).
        num_images: always 1.
    """

    unnorm_key: str
    chunk: int
    center_crop: bool
    adaptive_ensemble: bool
    ensemble_alpha: float
    intrinsics: str
    num_images: int = 1


class SpatialVLAPolicy(LoadedPolicy):
    """A loaded SpatialVLA; see `prismo.policies.base.Policy`."""

    def __init__(
        self,
        model: SpatialVLAForConditionalGeneration,
        processor: SpatialVLAProcessor,
        checkpoint: Checkpoint,
        settings: SpatialVLASettings,
        robot: Embodiment,
    ) -> None:
        super().__init__(model, checkpoint.family, checkpoint.source, settings, robot)
        self._processor = processor
        self._decoder = TokenDecoder(model, processor.action_tokenizer.slots, processor.action_tokens)
        self._camera = _camera(processor, settings)
        self._ensembles: dict[int, AdaptiveEnsemble] = {}

    def start_episode(self, slot: int, seed: int) -> None:
        # A new object: chunks of the last episode would steer the first steps of this one.
        self._ensembles[slot] = AdaptiveEnsemble(self._processor.chunk, self._settings.ensemble_alpha)

    def predict(self, inputs: Sequence[PolicyInput], slots: Sequence[int]) -> np.ndarray:
        chunks = predict_actions(
            self._decoder,
            self._processor,
            self.images(inputs),
            [item.instruction for item in inputs],
            self._settings.unnorm_key,
            camera=self._camera,
        )
        self._finite(chunks)
        if not self._settings.adaptive_ensemble:
            return chunks
        return np.stack([self._ensembles[slot](chunk) for slot, chunk in zip(slots, chunks, strict=True)])[:, None]

    def images(self, inputs: Sequence[PolicyInput]) -> list[np.ndarray]:
        """What the model sees: uint8 [224, 224, 3] after JPEG round trip, lanczos3 and center crop.

        Raises:
            ValueError: an observation has not exactly one image.
        """
        size = self._processor.config.image_pixels
        for item in inputs:
            if len(item.images) != 1:
                raise ValueError(f"this policy takes 1 camera image, found {len(item.images)}")
        crop = self._settings.center_crop
        frames = [observation_image(item.images[0], size, crop=crop) for item in inputs]
        return [frame.permute(1, 2, 0).numpy() for frame in frames]


def resolve_spatialvla_settings(
    flags: PolicyFlags, checkpoint: Checkpoint, robot: Embodiment, default_key: str | None = None
) -> SpatialVLASettings:
    """Settings of a SpatialVLA checkpoint.

    Raises:
        ValueError: an unknown unnorm_key, flags of another model family, or flags that contradict the checkpoint.
    """
    _refuse(flags)
    key = _unnorm_key(flags, checkpoint, default_key)
    # The camera "checkpoint" always fits: it is that of the training pictures.
    trained = checkpoint.record.intrinsics if flags.intrinsics == "libero" else None
    refuse(otherwise_trained(flags, checkpoint, intrinsics=trained), flags, checkpoint)
    ensemble = True if flags.adaptive_ensemble is None else flags.adaptive_ensemble
    crop = flags.center_crop if flags.center_crop is not None else checkpoint.center_crop
    return SpatialVLASettings(
        unnorm_key=key,
        chunk=1 if ensemble else checkpoint.chunk or 4,
        center_crop=True if crop is None else crop,
        adaptive_ensemble=ensemble,
        ensemble_alpha=flags.ensemble_alpha,
        intrinsics=flags.intrinsics or "checkpoint",
    )


def _refuse(flags: PolicyFlags) -> None:
    wrong = ["--use_l1_regression True"] if flags.use_l1_regression else []
    wrong += (
        [f"--num_images_in_input {flags.num_images_in_input}"] if flags.num_images_in_input not in (None, 1) else []
    )
    if wrong:
        raise ValueError(
            f"SpatialVLA takes one image and an instruction and predicts action tokens; leave out {', '.join(wrong)}"
        )


def load_spatialvla_policy(
    checkpoint: Checkpoint,
    settings: SpatialVLASettings,
    robot: Embodiment,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> SpatialVLAPolicy:
    """Load model and processor, and fold an unmerged adapter in.

    Raises:
        FileNotFoundError, ValueError: a file is missing or does not fit.
    """
    processor = SpatialVLAProcessor.from_pretrained(checkpoint.folder, read_config(weights_folder(checkpoint)))
    if checkpoint.adapter is None:
        model = SpatialVLAForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=dtype, device=device)
    else:  # merged in the stored dtype, as merging to disk does
        model = SpatialVLAForConditionalGeneration.from_pretrained(weights_folder(checkpoint), device=device)
        fold_adapter(model, checkpoint).to(dtype)
    return SpatialVLAPolicy(model.eval(), processor, checkpoint, settings, robot)


def _unnorm_key(flags: PolicyFlags, checkpoint: Checkpoint, default_key: str | None) -> str:
    """The user's key, else the suite's."""
    try:
        key = statistics_key(flags, checkpoint, default_key)
    except UnknownKeyError as error:
        if flags.unnorm_key or _FRANKA_KEY not in checkpoint.statistics:
            raise
        raise ValueError(
            f"{error}. --unnorm_key {_FRANKA_KEY} evaluates it zero-shot with the statistics of the same arm, which "
            "scores about 0 %"
        ) from error
    if key == _FRANKA_KEY and flags.unnorm_key and default_key:
        _LOG.warning(
            "%s: zero-shot with the statistics of %s, not fine-tuned on %s; such runs score about 0 %% in LIBERO, so a "
            "low number here is no fault of the set-up",
            checkpoint.source,
            key,
            default_key,
        )
    return key


def _camera(processor: SpatialVLAProcessor, settings: SpatialVLASettings) -> CameraIntrinsics:
    if settings.intrinsics == "checkpoint":
        return processor.camera(settings.unnorm_key)  # not changed by the crop, as the authors leave it in training
    return LIBERO_AGENTVIEW.center_cropped(CROP_AREA) if settings.center_crop else LIBERO_AGENTVIEW


SPATIALVLA = PolicyFamily(resolve_spatialvla_settings, load_spatialvla_policy)
