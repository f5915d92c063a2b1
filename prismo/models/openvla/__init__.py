"""OpenVLA, OpenVLA-OFT and Spatial-Forcing checkpoints: configuration, processor, model."""

from prismo.models.openvla.action_tokenizer import IGNORE_INDEX, BinTokenizer
from prismo.models.openvla.configuration import AttentionKind, OpenVLAConfig
from prismo.models.openvla.modeling import OpenVLAForActionPrediction, OpenVLAOutput
from prismo.models.openvla.processing import PrismaticImageProcessor, PrismaticProcessor, TextBatch
from prismo.models.openvla.self_test import SelfTestError

__all__ = [
    "IGNORE_INDEX",
    "AttentionKind",
    "BinTokenizer",
    "OpenVLAConfig",
    "OpenVLAForActionPrediction",
    "OpenVLAOutput",
    "PrismaticImageProcessor",
    "PrismaticProcessor",
    "SelfTestError",
    "TextBatch",
]
