"""OpenVLA, OpenVLA-OFT and Spatial Forcing as a `Family`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from prismo.data.normalize import load_statistics, statistics_to_json
from prismo.families import Family
from prismo.models.component_files import find_component
from prismo.models.folder import CONFIG
from prismo.models.openvla import OpenVLAForActionPrediction
from prismo.models.openvla.loading import read_config
from prismo.models.self_test import AttentionKind
from prismo.models.training_record import attention_kind, check_modules, read_training_record
from prismo.util.schema import JsonObject, read_json


def _merged_config(base: Path, checkpoint: Path) -> dict[str, Any]:
    """The base's, with the statistics of the run and how it attends."""
    statistics = load_statistics(checkpoint / "dataset_statistics.json")
    config = read_json(base / CONFIG, JsonObject) | {"norm_stats": statistics_to_json(statistics)}
    config.pop("attention", None)  # the base's own
    kind = _attention(checkpoint)
    return config | ({"attention": kind} if kind else {})


def _attention(checkpoint: Path) -> AttentionKind | None:
    record = read_training_record(checkpoint)
    check_modules(checkpoint, record)
    return attention_kind(checkpoint, record, {})[0]


def _wrap(model: nn.Module, checkpoint: Path, keys: Sequence[str]) -> None:
    """FiLM, whose towers are stored whole, with their LoRA."""
    if any(key.startswith("base_model.model.vision_backbone.vision_backbone.") for key in keys):
        from prismo.models.film import add_film  # noqa: PLC0415 (imports peft)

        find_component(checkpoint, "vision_backbone")
        add_film(cast(OpenVLAForActionPrediction, model))


FAMILY = Family(
    model_type="openvla",
    alias="openvla",
    title="OpenVLA",
    license="llama2",
    terms="its language model is Llama 2, so the Llama 2 Community License applies",
    processor=(("preprocessor_config.json",), ("tokenizer.json", "tokenizer.model")),
    statistics=("dataset_statistics.json", "config.json"),
    marker=None,
    flags=frozenset(
        {
            *("use_diffusion", "use_film", "use_proprio", "compile", "action_head"),
            *("num_diffusion_steps_train", "num_diffusion_steps_inference", "attention"),
            *("load_in_8bit", "load_in_4bit"),
        }
    ),
    check_given=lambda flags: None,
    published={"num_images_in_input": 2, "use_proprio": True, "vla_layers_align": 24},
    settled=frozenset(),
    lora_alpha=lambda rank: min(rank, 16),
    read_config=read_config,
    build=OpenVLAForActionPrediction,
    stored_name=str,
    wrap=_wrap,
    repeated={},
    merged_config=_merged_config,
    base_code=lambda checkpoint: _attention(checkpoint) == "causal",
    check_files=check_modules,
    chunk=lambda folder, record: record.chunk,
    training="prismo.training.openvla:OPENVLA",
    policy="prismo.policies.openvla:OPENVLA",
    checks="prismo.verify.kinds.openvla:OpenVLAFolder",
)
