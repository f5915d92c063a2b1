"""Which model family a base checkpoint is of, by the `model_type` in its config.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prismo.models.folder import CONFIG, missing_of_processor
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
    return local_folder(base, ("*.json",), missing=_missing_settings, optional=("tokenizer.model",))


def _missing_settings(folder: Path) -> str | None:
    """What a folder lacks to be described, as a sentence; None for nothing."""
    if not (folder / CONFIG).is_file():
        return f"{folder} has no {CONFIG}"
    lacking = missing_of_processor(folder, family_name(folder))
    return f"{folder} has no {', no '.join(lacking)}" if lacking else None


def family_of(base: Path) -> ModelFamily:
    """The family of a base model by the `model_type` in its config.json.

    Raises:
        ValueError: none of ours.
    """
    return _FAMILIES[family_name(base)]


def family_name(base: Path) -> str:
    """The `model_type` of a folder; raises as `family_of` does."""
    name = read_json(base / CONFIG, _Config).model_type
    if name not in _FAMILIES:
        known = " or ".join(map(repr, _FAMILIES))
        raise ValueError(f"{base / CONFIG} is of model_type {name!r}, expected {known}")
    return name
