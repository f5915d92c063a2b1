"""FiLM: the instruction modulates every block of both vision towers (Perez et al., arXiv 1709.07871).

OpenVLA-OFT uses it for robots whose policies otherwise ignore the language. `add_film` wraps the vision backbone of a
model in place; trained wrappers are stored whole as `vision_backbone--*_checkpoint.pt` and read by
`load_film_backbone`.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from prismo.models.adapter_file import ADAPTER_FOLDER
from prismo.models.component_files import find_component, load_tensors, read_component
from prismo.models.folder import read_marker
from prismo.models.lora import LoraSpec, merged_weight, read_adapter_spec
from prismo.models.openvla import OpenVLAForActionPrediction
from prismo.models.openvla.vision import FiLMVisionBackbone


def add_film(
    model: OpenVLAForActionPrediction, *, identity_init: bool = False, exclude_padding: bool = False
) -> FiLMVisionBackbone:
    """Wrap the vision backbone of `model` in place; its LoRA layers, if any, stay where they are."""
    backbone = model.vision_backbone
    if isinstance(backbone, FiLMVisionBackbone):
        raise ValueError("the vision backbone already has FiLM; wrapping it twice would rename its weights")
    wrapped = FiLMVisionBackbone(backbone, model.llm_dim, identity_init=identity_init, exclude_padding=exclude_padding)
    model.vision_backbone = wrapped
    return wrapped


def load_film_backbone(model: OpenVLAForActionPrediction, folder: str | Path) -> Path:
    """Give `model` the trained FiLM backbone of a checkpoint folder, with its LoRA merged into the weights.

    The originals keep the LoRA layers of these files apart and pay for them in every prediction. The scaling comes from
    `lora_adapter/adapter_config.json` or `merge.json` if one is there, else from the recipe (`alpha = min(rank, 16)`).

    Returns:
        The file that was read.

    Raises:
        FileNotFoundError, ValueError: as `prismo.models.component_files.load_component`.
    """
    path = find_component(folder, "vision_backbone")
    state = _merge_lora(read_component(path), path)
    if not model.vision_backbone.film:
        add_film(model)
    load_tensors(model.vision_backbone, state, path)
    return path


def _merge_lora(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """`state` without LoRA tensors, their product added to the weights."""
    merged = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        module, found, parameter = name.partition(".base_layer.")
        if not found:
            merged[name] = value
        elif parameter == "weight" and f"{module}.lora_A.default.weight" in state:
            a, b = state[f"{module}.lora_A.default.weight"], state.get(f"{module}.lora_B.default.weight")
            if b is None or (len(b), *a.shape[1:], len(a)) != (*value.shape, b.shape[1]):
                raise ValueError(f"{path}: the LoRA factors of {module} do not fit its weight; copy it again")
            merged[f"{module}.weight"] = merged_weight(value, a, b, _lora_scale(path.parent, rank=len(a)))
        else:
            merged[f"{module}.{parameter}"] = value
    return merged


def _lora_scale(folder: Path, rank: int) -> float:
    """As the adapter beside the file says, or the record of its merge where the adapter stayed behind."""
    if (folder / ADAPTER_FOLDER).is_dir():
        return read_adapter_spec(folder / ADAPTER_FOLDER).scale
    marker = read_marker(folder)
    return LoraSpec(rank).scale if marker is None else marker.scale
