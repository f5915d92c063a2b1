"""Checks around `from_pretrained`: does config.json describe an OpenVLA, does every tensor fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le
from pydantic import FiniteFloat

from prismo.models.folder import Layers, Size
from prismo.models.openvla.configuration import OpenVLAConfig
from prismo.models.self_test import AttentionKind
from prismo.models.vit import ViTConfig
from prismo.models.vla import read_model_config
from prismo.util.schema import JsonObject


@dataclass(frozen=True)
class _Llama:
    """`text_config`; what a file leaves out is Llama's default."""

    vocab_size: Size = 1
    hidden_size: Size = 1
    intermediate_size: Size = 1
    num_hidden_layers: Layers = 1
    num_attention_heads: Size = 1
    num_key_value_heads: Size | None = None
    rms_norm_eps: Annotated[FiniteFloat, Gt(0)] = 1e-6


@dataclass(frozen=True)
class _OpenVLAFile:
    """config.json of an OpenVLA; what a file leaves out is the default of `OpenVLAConfig`."""

    vision_backbone_id: str = ""
    llm_backbone_id: str = ""
    arch_specifier: str = ""
    use_fused_vision_backbone: bool | None = None
    image_resize_strategy: str = ""
    text_config: _Llama | None = None
    llm_max_length: Size = 1
    pad_token_id: Annotated[int, Ge(0)] = 0
    pad_to_multiple_of: Size = 1
    norm_stats: JsonObject | None = None
    n_action_bins: Annotated[int, Ge(2), Le(1 << 16)] = 2
    vision_towers: list[ViTConfig] | None = None
    attention: AttentionKind = "bidirectional"


def read_config(folder: Path) -> OpenVLAConfig:
    """The configuration of a checkpoint folder; raises as `read_model_config` does."""
    return read_model_config(folder, OpenVLAConfig, _OpenVLAFile)


def check_loaded(path: str | Path, report: Any) -> None:
    """Refuse a model some of whose tensors were missing, unknown or of another shape in the files.

    transformers would go on with random weights in their place.
    """
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report.get(kind) or ())
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{kind.replace('_keys', '')}: {', '.join(names[:3])}{more}")
    if problems:
        raise ValueError(f"the weights in {path} do not fit OpenVLA ({'; '.join(problems)})")
