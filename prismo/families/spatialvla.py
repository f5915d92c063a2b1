"""SpatialVLA as a `Family`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismo.families import Family
from prismo.models.folder import CONFIG
from prismo.models.spatialvla import SpatialVLAForConditionalGeneration
from prismo.models.spatialvla.action_tokenizer import load_gaussians
from prismo.models.spatialvla.checkpoint import PROCESSOR_FILES, official_name
from prismo.models.spatialvla.modeling import read_config
from prismo.models.training_record import Count, TrainingRecord
from prismo.util.schema import JsonObject, read_json

_PROCESSOR = "processor_config.json"


@dataclass(frozen=True)
class _ProcessorFile:
    """processor_config.json, as far as settings go."""

    action_chunk_size: Count | None = None


def _merged_config(base: Path, checkpoint: Path) -> dict[str, Any]:
    """The base's; statistics and bins are in the run's processor_config.json."""
    if not (checkpoint / _PROCESSOR).is_file():
        raise FileNotFoundError(
            f"{checkpoint} has no {_PROCESSOR}, which holds the statistics and action bins of the run"
        )
    return read_json(base / CONFIG, JsonObject)


def _chunk(folder: Path, record: TrainingRecord) -> int | None:
    path = folder / _PROCESSOR
    return read_json(path, _ProcessorFile).action_chunk_size if path.is_file() else None


FAMILY = Family(
    model_type="spatialvla",
    alias="svla",
    title="SpatialVLA",
    license="gemma",
    terms="its language model is Gemma 2, so the Gemma Terms of Use apply",
    processor=PROCESSOR_FILES,
    statistics=(_PROCESSOR,),
    marker=_PROCESSOR,
    flags=frozenset(
        {
            *("freeze_llm_embed", "freeze_vision_tower", "adapt_emb", "adpt_feature", "min_sigma", "intrinsics"),
            *("adaptive_ensemble", "ensemble_alpha"),
        }
    ),
    check_given=lambda flags: flags.adapt_emb is None or load_gaussians(flags.adapt_emb),
    published={"adapt_emb": True, "adpt_feature": True, "vla_layers_align": 20}
    | {"scheduler": "LinearLR", "lr_warmup_steps": 50, "weight_decay": 0},
    settled=frozenset({"use_l1_regression", "use_diffusion", "action_head", "gain_feat_1move"}),
    lora_alpha=lambda rank: rank,
    read_config=read_config,
    build=SpatialVLAForConditionalGeneration.empty,
    stored_name=official_name,
    wrap=lambda model, checkpoint, keys: None,
    repeated={"language_model.model.embed_tokens.weight": "spatial_embed_tokens.weight"},
    merged_config=_merged_config,
    base_code=lambda checkpoint: True,
    check_files=lambda folder, record: None,
    chunk=_chunk,
    training="prismo.training.spatialvla:SPATIALVLA",
    policy="prismo.policies.spatialvla:SPATIALVLA",
    checks="prismo.verify.kinds.spatialvla:SpatialVLAFolder",
)
