"""Which model family a base checkpoint is of, by the `model_type` in its config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prismo.training.openvla import OPENVLA
from prismo.training.spatialvla import SPATIALVLA
from prismo.training.task import ModelFamily
from prismo.util.hub import local_folder
from prismo.util.schema import read_json

_FAMILIES = {"openvla": OPENVLA, "spatialvla": SPATIALVLA}


@dataclass(frozen=True)
class _Config:
    """What is looked at of a config.json."""

    model_type: str


def settings_folder(base: str) -> Path:
    """Folder with the small files of a base model; of a hub id only these are downloaded.

    Raises:
        FileNotFoundError: neither a folder nor a repository that could be fetched.
    """
    return local_folder(base, ("*.json", "tokenizer.model"))


def family_of(base: Path) -> ModelFamily:
    """The family of a base model by the `model_type` in its config.json.

    Raises:
        ValueError: none of ours.
    """
    config = base / "config.json"
    model_type = read_json(config, _Config).model_type
    if model_type not in _FAMILIES:
        known = " or ".join(map(repr, _FAMILIES))
        raise ValueError(f"{config} is of model_type {model_type!r}, expected {known}")
    return _FAMILIES[model_type]
