"""Official SpatialVLA tensors <-> our modules: names, strict loading, saving. Called by `modeling.py`.

Only ZoeDepth's backbone is named differently in today's transformers; every other module keeps the published name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prismo.models.folder import WEIGHTS_AND_SETTINGS, missing_of_model, weight_files
from prismo.util.files import atomic_write, write_json
from prismo.util.hub import local_folder

PROCESSOR_FILES = (("processor_config.json",), ("tokenizer.json",))
_LISTED = 8  # names per kind of problem in an error

# (our name, official name) inside a BEiT layer.
_BEIT_LAYER = (
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
    ("relative_position_bias", "attention.attention.relative_position_bias"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)
_OUR_LAYER = re.compile(r"^vision_zoe_model\.backbone\.beit\.layers\.(\d+)\.(.+)$")


def official_name(name: str) -> str:
    """Name in the published files of the parameter that `SpatialVLAForConditionalGeneration` calls `name`."""
    match = _OUR_LAYER.match(name)
    if not match:
        return name.replace("vision_zoe_model.backbone.beit.embeddings.", "vision_zoe_model.backbone.embeddings.", 1)
    index, rest = match.groups()
    for ours, theirs in _BEIT_LAYER:
        if rest.startswith(ours + "."):
            rest = theirs + rest[len(ours) :]
            break
    return f"vision_zoe_model.backbone.encoder.layer.{index}.{rest}"


def checkpoint_folder(path: str | Path) -> Path:
    """A local folder as it is; a hub id (`IPEC-COMMUNITY/spatialvla-4b-224-pt`) as its copy in the hub's cache."""
    return local_folder(
        path, WEIGHTS_AND_SETTINGS, missing=lambda folder: missing_of_model(folder, {"spatialvla": PROCESSOR_FILES})
    )


def load_weights(model: nn.Module, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Replace every parameter of `model` (which may be on the meta device) by the one stored in `folder`.

    Names and shapes are compared before a single weight is read; a tensor goes straight from the file to `device`.

    Raises:
        FileNotFoundError: the folder holds no safetensors weights.
        ValueError: tensors miss, are unknown or do not fit; names them.
    """
    parameters = {official_name(name): (name, parameter) for name, parameter in model.named_parameters()}
    files = weight_files(folder)
    found = {name: shape for file in files for name, shape in _headers(file).items()}
    _check({name: p.shape for name, (_, p) in parameters.items()}, found, folder)
    for file in files:
        with safe_open(file, framework="pt", device=str(device)) as stored:
            for official in stored.keys():  # noqa: SIM118 (not a dict)
                name, parameter = parameters[official]
                set_parameter(model, name, stored.get_tensor(official).to(dtype), parameter.requires_grad)


def set_parameter(model: nn.Module, name: str, value: Tensor, requires_grad: bool) -> None:
    """Put `value` in the place of the parameter called `name`."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=requires_grad))


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


def _headers(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or broken ({error}); download it again") from error


def _check(expected: Mapping[str, torch.Size], found: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != tuple(shape)
        ],
    }
    parts = [
        f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''}"
        for kind, names in problems.items()
        if names
    ]
    if parts:
        raise ValueError(f"the tensors in {folder} do not fit its config.json: {'; '.join(parts)}")
