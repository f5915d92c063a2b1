"""Which model family a base checkpoint is of, by the `model_type` in its config.json."""

from __future__ import annotations

from pathlib import Path

from prismo.training.openvla import OPENVLA
from prismo.training.spatialvla import SPATIALVLA
from prismo.training.task import ModelFamily
from prismo.util.schema import JsonObject, read_json

_FAMILIES = {"openvla": OPENVLA, "spatialvla": SPATIALVLA}


def family_of(base: Path) -> ModelFamily:
    """The family of a base folder that `prismo.models.merge.resolve_base` has accepted."""
    return _FAMILIES[read_json(base / "config.json", JsonObject)["model_type"]]
