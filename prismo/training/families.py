"""What trains a base model: the `ModelFamily` that its family names, and the small files that it looks at."""

from __future__ import annotations

from pathlib import Path

from prismo.families import family_of
from prismo.models.folder import CONFIG, missing_files
from prismo.training.task import ModelFamily
from prismo.util.hub import local_folder


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
    lacking = missing_files(folder, family_of(folder).processor)
    return f"{folder} has no {', no '.join(lacking)}" if lacking else None


def model_family(base: Path) -> ModelFamily:
    """What the trainer must know of the family of a base model.

    Raises:
        ValueError: config.json is of none of ours.
    """
    family = family_of(base)
    return family.load(family.training)
