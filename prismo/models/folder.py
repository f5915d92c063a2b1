"""What makes a folder a checkpoint: a config.json and whole weight files. Looked at before anything heavy begins."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le
from pydantic import FiniteFloat

from prismo.util.hub import is_hub_id, no_such_folder
from prismo.util.schema import read_json

Size = Annotated[int, Ge(1), Le(1 << 24)]  # a width, a vocabulary, ...
Layers = Annotated[int, Ge(1), Le(1000)]

CONFIG = "config.json"
TRAINING_CONFIG = "training_config.json"  # of our trainer: every flag and version, the robot, beside every checkpoint
WEIGHTS_AND_SETTINGS = ("*.json", "*.safetensors")  # what a model is read from, in a hub repository
MARKER = "merge.json"
MERGING = ".merging"  # where a merge prepares its files, inside the folder in which they will appear
UNFINISHED = "It holds an unfinished merge (or copy): run the merge again, `prismo merge`"
_EXPECTED = "Expected a folder with config.json, model*.safetensors and preprocessor_config.json"


@dataclass(frozen=True)
class _Config:
    """What config.json says of every model."""

    model_type: str


def is_model(folder: Path) -> bool:
    """Whether the folder holds a model, not an adapter alone; its files may still be damaged."""
    return (folder / CONFIG).is_file() and any(folder.glob("model*.safetensors"))


def is_unfinished(folder: Path) -> bool:
    """Whether a merge into this folder was cut off: config.json comes last (`prismo.merging.publish`)."""
    cut_off = (folder / MERGING).is_dir() or any(folder.glob("model*.safetensors"))
    return cut_off and not (folder / CONFIG).is_file()


@dataclass(frozen=True)
class MergeMarker:
    """Content of `merge.json`, as far as it is read again.

    Attributes:
        adapters: SHA-256 of the adapters that these weights contain, oldest first.
        scale: of the last one.
    """

    adapters: list[str]
    scale: FiniteFloat


def read_marker(folder: Path) -> MergeMarker | None:
    """What a merge wrote into the folder of merged weights; None where somebody else merged them, or nobody did."""
    path = folder / MARKER
    return read_json(path, MergeMarker) if path.is_file() else None


def check_folder(path: str | Path, model_types: Sequence[str] = ("openvla",)) -> None:
    """One clear error for a local folder that cannot be loaded; hub ids pass.

    Args:
        model_types: what config.json may say.

    Raises:
        FileNotFoundError: not a folder (and no hub id), or not a checkpoint.
        ValueError: config.json is of another model, or a weight file is truncated.
    """
    folder = Path(path)
    if not folder.is_dir():
        if not is_hub_id(path):
            raise FileNotFoundError(no_such_folder(path))
        return
    config = folder / CONFIG
    if not config.is_file():
        raise FileNotFoundError(
            f"{folder} is not a checkpoint: no config.json. " + (UNFINISHED if is_unfinished(folder) else _EXPECTED)
        )
    read_model_type(folder, model_types)
    from prismo.models.weight_files import stored_tensors  # noqa: PLC0415 (imports torch; a report needs none)

    stored_tensors(folder)


def read_model_type(folder: Path, expected: Collection[str]) -> str:
    """What config.json says; ValueError where that is nothing expected, or the file is damaged."""
    found = read_json(folder / CONFIG, _Config).model_type
    if found not in expected:
        raise ValueError(f"{folder / CONFIG} is of model_type {found!r}, expected {' or '.join(map(repr, expected))}")
    return found


def missing_of_model(folder: Path, processors: Mapping[str, Sequence[Sequence[str]]]) -> str | None:
    """What a folder lacks to be a base model, as a sentence; None for nothing (see `prismo.util.hub.local_folder`).

    Args:
        processors: model type -> files that its processor is read from; of several in a group one is enough.
    """
    try:
        check_folder(folder, tuple(processors))
    except (OSError, ValueError) as error:
        return str(error)
    lacking = missing_files(folder, processors[read_model_type(folder, processors)])
    return f"{folder} has no {', no '.join(lacking)}" if lacking else None


def missing_files(folder: Path, groups: Sequence[Sequence[str]]) -> list[str]:
    """Of each group of names one has to be there: the groups of which none is."""
    return [" or ".join(names) for names in groups if not any((folder / name).is_file() for name in names)]
