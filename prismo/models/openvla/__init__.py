"""OpenVLA, OpenVLA-OFT and Spatial-Forcing checkpoints: configuration, processor, model."""

from prismo.models.openvla.configuration import OpenVLAConfig
from prismo.models.openvla.modeling import OpenVLAForActionPrediction, OpenVLAOutput
from prismo.models.openvla.processing import PrismaticImageProcessor, PrismaticProcessor, TextBatch

__all__ = [
    "OpenVLAConfig",
    "OpenVLAForActionPrediction",
    "OpenVLAOutput",
    "PrismaticImageProcessor",
    "PrismaticProcessor",
    "TextBatch",
]
