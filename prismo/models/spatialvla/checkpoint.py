"""Official SpatialVLA tensors <-> our modules: names, saving. Called by `modeling.py`.

Only ZoeDepth's backbone is named differently in today's transformers; every other module keeps the published name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from prismo.models.folder import WEIGHTS_AND_SETTINGS, missing_of_model
from prismo.util.files import atomic_write, write_json
from prismo.util.hub import local_folder

PROCESSOR_FILES = (("processor_config.json",), ("tokenizer.json",))

# Modules of a BEiT layer: our name -> official name.
_BEIT_LAYER = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "relative_position_bias": "attention.attention.relative_position_bias",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_OUR_LAYER = re.compile(r"^vision_zoe_model\.backbone\.beit\.layers\.(\d+)\.(.*?)(\.?\w+)$")


def official_name(name: str) -> str:
    """Name in the published files of the parameter that `SpatialVLAForConditionalGeneration` calls `name`."""
    match = _OUR_LAYER.match(name)
    if not match:
        return name.replace("vision_zoe_model.backbone.beit.embeddings.", "vision_zoe_model.backbone.embeddings.", 1)
    index, module, leaf = match.groups()
    return f"vision_zoe_model.backbone.encoder.layer.{index}.{_BEIT_LAYER.get(module, module)}{leaf}"


def model_folder(path: str | Path) -> Path:
    """A local folder as it is; a hub id (`IPEC-COMMUNITY/spatialvla-4b-224-pt`) as its copy in the hub's cache."""
    return local_folder(
        path, WEIGHTS_AND_SETTINGS, missing=lambda folder: missing_of_model(folder, {"spatialvla": PROCESSOR_FILES})
    )


def save_weights(state: Mapping[str, Tensor], folder: Path, max_shard_size: str | int) -> None:
    """Write our parameters `state` under their official names, in shards with an index when they exceed one."""
    tensors = {official_name(name): tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    embeddings, actions = "language_model.model.embed_tokens.weight", "spatial_embed_tokens.weight"
    # The official code keeps a copy of the action table in the last rows of the text table. Ours never reads them, but
    # whoever loads the file must not find two versions.
    tensors[embeddings] = torch.cat((tensors[embeddings][: -len(tensors[actions])], tensors[actions]))
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        with atomic_write(folder / file) as temporary:
            save_file({name: tensors[name] for name in names}, temporary, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
