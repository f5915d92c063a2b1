"""SpatialVLA (spatialvla-4b-*): model, action tokeniser, processor and decoding."""

from prismo.models.spatialvla.action_tokenizer import ActionTokenizer
from prismo.models.spatialvla.configuration import SpatialVLAConfig
from prismo.models.spatialvla.decoding import AdaptiveEnsemble, TokenDecoder, predict_actions
from prismo.models.spatialvla.ego3d import LIBERO_AGENTVIEW, CameraIntrinsics
from prismo.models.spatialvla.modeling import LORA_TARGETS, SpatialVLAForConditionalGeneration, SpatialVLAOutput
from prismo.models.spatialvla.processing import SpatialVLAProcessor, SpatialVLATextBatch

__all__ = [
    "LIBERO_AGENTVIEW",
    "LORA_TARGETS",
    "ActionTokenizer",
    "AdaptiveEnsemble",
    "CameraIntrinsics",
    "SpatialVLAConfig",
    "SpatialVLAForConditionalGeneration",
    "SpatialVLAOutput",
    "SpatialVLAProcessor",
    "SpatialVLATextBatch",
    "TokenDecoder",
    "predict_actions",
]
