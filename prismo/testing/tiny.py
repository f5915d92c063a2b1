"""Tiny checkpoints in the official layouts: complete, random, a few MB, written in seconds without network.

Tests, examples and dry runs use them in place of openvla-7b, of a fine-tuned policy and of VGGT-1B
(`prismo tiny --output DIR`). Only sizes differ from the published files; names, layouts and
file formats are the same.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prismo.align.vggt import VGGTAggregator, VGGTConfig
from prismo.data.normalize import DatasetStats, FieldStats, dump_statistics, statistics_to_json
from prismo.embodiment import Embodiment, embodiment_for
from prismo.models.component_files import save_component
from prismo.models.heads import HEADS, HeadSizes
from prismo.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction, PrismaticImageProcessor
from prismo.models.openvla.prediction import ActionModules
from prismo.models.projectors import ProprioProjector
from prismo.models.random_weights import fill_random
from prismo.models.vit import ViTConfig
from prismo.testing.tiny_tokenizer import write_tiny_tokenizer
from prismo.util.files import atomic_write

# openvla-7b's statistics: ImageNet's, rounded to bfloat16 (see `PrismaticImageProcessor`), then SigLIP's.
_NORMALIZE = [
    {"inplace": False, "mean": [0.484375, 0.455078125, 0.40625], "std": [0.228515625, 0.2236328125, 0.224609375]},
    {"inplace": False, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
]
_WIDTH = 32  # of the language model
_VGGT_HEADS = ("camera_head", "depth_head", "point_head", "track_head")


def tiny_openvla_config(dataset: str = "bridge_orig", hidden_size: int = _WIDTH, layers: int = 4) -> OpenVLAConfig:
    """Configuration of the tiny model: two towers of three blocks, a Llama of `layers` layers with the full vocabulary.

    Args:
        dataset: the only entry of `norm_stats`; its name decides the robot (`prismo.embodiment`).
        hidden_size: width of the language model, a multiple of 16.
        layers: decoder layers.
    """
    towers = (
        ViTConfig(32, 3, 2, 64, cls_token=True, registers=4, layer_scale="scale_factor"),
        ViTConfig(48, 3, 3, 80, attention_pool=True),
    )
    return OpenVLAConfig(
        text_config={
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden_size // 16,
            "num_key_value_heads": hidden_size // 16,
        },
        norm_stats=statistics_to_json({dataset: tiny_statistics(embodiment_for(dataset))}),
        vision_towers=[asdict(tower) for tower in towers],
    )


def tiny_statistics(embodiment: Embodiment) -> DatasetStats:
    """Plain symmetric statistics: actions within [-1, 1], proprio within [-3.5, 3.5]."""

    def field(dim: int, bound: float, mask: np.ndarray | None = None) -> FieldStats:
        ones = np.ones(dim)
        return FieldStats(
            0 * ones, 0.3 * ones, -bound * ones, bound * ones, -0.9 * bound * ones, 0.9 * bound * ones, mask
        )

    scaled = np.ones(embodiment.action_dim, dtype=bool)
    scaled[list(embodiment.gripper_dims)] = False
    return DatasetStats(field(embodiment.action_dim, 1.0, scaled), field(embodiment.proprio_dim, 3.5), 1000, 10)


def make_tiny_openvla(
    folder: str | Path,
    seed: int = 0,
    *,
    dataset: str = "bridge_orig",
    dtype: torch.dtype = torch.bfloat16,
    hidden_size: int = _WIDTH,
    layers: int = 4,
) -> Path:
    """Write a base model as openvla-7b is published: config, sharded safetensors, preprocessor and tokenizer files.

    Args:
        folder: created if need be.
        seed: of the weights.
        dataset, hidden_size, layers: see `tiny_openvla_config`.
        dtype: of the weights on disk.

    Returns:
        The folder.
    """
    folder = Path(folder)
    model = OpenVLAForActionPrediction(tiny_openvla_config(dataset, hidden_size, layers))
    fill_random(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size="3MB")
    PrismaticImageProcessor(tvf_normalize_params=_NORMALIZE).save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder


def make_tiny_policy(
    folder: str | Path,
    seed: int = 0,
    *,
    dataset: str = "libero_spatial_no_noops",
    head: str = "l1",
    proprio: bool = True,
    layers: int = 4,
) -> Path:
    """Write a fine-tuned policy with merged weights as OpenVLA-OFT and Spatial-Forcing publish them.

    On top of `make_tiny_openvla`: `dataset_statistics.json` and the side modules that `head` and `proprio` ask for.
    """
    folder = make_tiny_openvla(folder, seed, dataset=dataset, layers=layers)
    robot = embodiment_for(dataset)
    dump_statistics({dataset: tiny_statistics(robot)}, folder / "dataset_statistics.json")
    built = HEADS[head].build(HeadSizes(_WIDTH, robot.action_dim, robot.chunk))
    modules = ActionModules(built, ProprioProjector(_WIDTH, robot.proprio_dim) if proprio else None)
    for stem, module in modules.by_stem().items():
        fill_random(module, seed)
        save_component(module, folder, stem, "latest")
    return folder


def make_tiny_vggt(path: str | Path, seed: int = 0, *, width: int = 64, depth: int = 2, image_size: int = 252) -> Path:
    """Write a VGGT `model.pt`: the aggregator under its published names, and one tensor per task head.

    Args:
        path: file to write, e.g. `model.pt`.
        seed: of the weights.
        width: channels, a multiple of 64 (heads are 64 wide).
        depth: frame/global block pairs, and blocks of the patch embedder.
        image_size: pixels per side that images are resized to, a multiple of 14 (VGGT-1B: 518).
    """
    config = VGGTConfig(width=width, depth=depth, patch_depth=depth, mlp_width=4 * width, image_size=image_size)
    aggregator = VGGTAggregator(config)
    fill_random(aggregator, seed)
    state: dict[str, Tensor] = {f"aggregator.{name}": value for name, value in aggregator.state_dict().items()}
    state |= {f"{head}.placeholder": torch.zeros(1) for head in _VGGT_HEADS}
    with atomic_write(path) as temporary:
        torch.save(state, temporary)
    return Path(path)
