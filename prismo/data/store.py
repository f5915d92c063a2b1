"""Datasets on disk, whatever their format: what training, statistics and pictures ask of one (`EpisodeStore`).

A format is a module with `read_features` and `open_store`, and a line in `FORMATS`. RLDS is one: `index.py` and what it
imports.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

from prismo.data.specs import DatasetSpec, Feature, check_features

DOWNLOAD_DATA = (
    "fetch LIBERO with: hf download openvla/modified_libero_rlds --repo-type dataset --local-dir data; "
    "data/README.md lists more"
)


class EpisodeStore(Protocol):
    """The episodes of one dataset in the convention of its spec; goes to worker processes, by fork and by pickle.

    Attributes:
        spec: what the stored features mean.
        root: the dataset's folder (with a version, the version's), for messages.
        cache: folder for what is computed from the episodes; need not be writable. Other content or another spec has
            another one.
        splits: their names.
        episodes: structured array [E] of all splits: "split" (number of its name), "steps", "named" (a step has an
            instruction), "crc" (of the content: which episodes are held out follows from it).
        instructions: distinct texts, by number.
    """

    @property
    def spec(self) -> DatasetSpec: ...
    @property
    def root(self) -> Path: ...
    @property
    def cache(self) -> Path: ...
    @property
    def splits(self) -> tuple[str, ...]: ...
    @property
    def episodes(self) -> np.ndarray: ...
    @property
    def instructions(self) -> list[str]: ...

    def rows(self, episode: int, start: int, stop: int) -> np.ndarray:
        """Structured array of the steps `start` to `stop`, fewer at the episode's end.

        Fields "action" float32 [A], "proprio" float32 [P], "instruction" (number), and whatever `image` needs.
        """
        ...

    def column(self, name: str, dims: slice = slice(None)) -> np.ndarray:
        """One field of the rows ("action", "proprio") of every frame of every split, float64 [frames, dims]."""
        ...

    def image_size(self, camera: int) -> tuple[int, int] | None:
        """(height, width) of a camera, None where it may vary."""
        ...

    def image(self, episode: int, row: np.void, camera: int, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 [H, W, 3] of one camera in one of the `rows`, in `out` where that is given (of `image_size`)."""
        ...


# The file in a dataset's folder by which a format is recognised, and the module that reads it: with `read_features` and
# `open_store` as below, which find the module.
FORMATS = {"dataset_info.json": "prismo.data.index"}


def is_dataset(folder: Path) -> bool:
    """Whether a format is recognised."""
    return any((folder / file).is_file() for file in FORMATS)


def find_folder(path: Path) -> Path:
    """The folder of a dataset: `path` itself or its highest version sub-folder (`1.0.0`, ...).

    Raises:
        FileNotFoundError: naming what was looked for.
    """
    if is_dataset(path):
        return path
    if not path.is_dir():
        beside = sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"no dataset folder {path}"
            + (f"; {path.parent} holds: {', '.join(beside)}" if beside else f"; {path.parent} is empty or missing")
            + f". Check --data_root_dir ({DOWNLOAD_DATA})"
        )
    versions = [entry for entry in path.iterdir() if is_dataset(entry)]
    if not versions:
        raise FileNotFoundError(
            f"{path} is no dataset: neither it nor a version folder in it (such as 1.0.0) holds "
            f"{' or '.join(FORMATS)}. Finish the download, or build it with `prismo data build`"
        )
    return max(versions, key=lambda p: [int(part) if part.isdecimal() else -1 for part in p.name.split(".")])


def read_features(folder: Path) -> Mapping[str, Feature]:
    """The features of the dataset in `folder` (as `find_folder` gives it) by name; no episode is read.

    Raises:
        ValueError, OSError: a file that describes the dataset is damaged or missing.
    """
    return _format(folder).read_features(folder)


def check_spec(spec: DatasetSpec, folder: Path) -> None:
    """`specs.check_features` for the dataset in `folder`, which the message names."""
    features = read_features(folder)
    try:
        check_features(spec, features)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def open_store(folder: Path, spec: DatasetSpec) -> EpisodeStore:
    """The episodes of the dataset in `folder`; the first call may scan all of it.

    Raises:
        ValueError, OSError: the dataset has not the features of `spec`, or is damaged; the message names the file.
    """
    check_spec(spec, folder)
    return _format(folder).open_store(folder, spec)


def _format(folder: Path) -> ModuleType:
    return import_module(next(module for file, module in FORMATS.items() if (folder / file).is_file()))
