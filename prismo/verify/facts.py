"""What is known of published checkpoints and datasets (`published.yaml`), and which of them a folder claims to be."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prismo.util.schema import own_keys, read_yaml
from prismo.util.text import did_you_mean

PUBLISHED = Path(__file__).with_name("published.yaml")
_CACHE_FOLDER = re.compile(r"models--(.+)--(.+)")


@own_keys
@dataclass(frozen=True)
class SideModule:
    """A module beside the model, e.g. the action head; `dtype` as safetensors calls it."""

    parameters: int
    dtype: str


@own_keys
@dataclass(frozen=True)
class Architecture:
    """A network that several checkpoints share.

    Attributes:
        tensors, parameters: of the published weight files.
        dtype: of all of them.
        config: attribute of the configuration (dots for nested ones) -> value.
        normalization: (mean, deviation) of the pixels per vision tower.
        action_grid: (token offsets, normalised action) of some actions.
        groups: first part of the tensors' names -> parameters.
    """

    tensors: int
    parameters: int
    dtype: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    normalization: list[list[list[float]]] | None = None
    action_grid: list[list[list[float]]] | None = None
    groups: dict[str, int] = field(default_factory=dict)


@own_keys
@dataclass(frozen=True)
class DatasetFacts:
    """A dataset over all its splits; quantiles of its actions in physical units."""

    transitions: int
    trajectories: int
    tasks: int | None = None
    q01: list[float] | None = None
    q99: list[float] | None = None


@own_keys
@dataclass(frozen=True)
class Published:
    """A published checkpoint or dataset; None and empty mean that it is not known.

    Attributes:
        kind: key of `prismo.verify.kinds.kinds()`.
        source: where the facts come from.
        architecture: key of `Facts.architectures`.
        files: what the repository holds, besides the weights.
        parts: modules beside the model.
        head, attention: see `prismo.policies.checkpoint.Checkpoint`.
        unnorm_key: statistics to predict with.
        keys: datasets whose statistics it has.
        builder, shards: of an RLDS folder.
    """

    kind: str
    source: str
    architecture: str | None = None
    files: list[str] = field(default_factory=list)
    parts: dict[str, SideModule] = field(default_factory=dict)
    head: str | None = None
    attention: str | None = None
    unnorm_key: str | None = None
    keys: list[str] | None = None
    builder: str | None = None
    shards: int | None = None


@own_keys
@dataclass(frozen=True)
class Facts:
    """Everything in `published.yaml`."""

    architectures: dict[str, Architecture]
    datasets: dict[str, DatasetFacts]
    published: dict[str, Published]

    def get(self, name: str) -> Published:
        """The entry of an id; ValueError with the nearest one if there is none."""
        if name not in self.published:
            raise ValueError(did_you_mean("published id", name, self.published))
        return self.published[name]

    def dataset(self, key: str) -> DatasetFacts | None:
        """What is known of the dataset of an unnorm_key (`libero_goal_no_noops`, `bridge_orig/1.0.0`)."""
        return self.datasets.get(key.split("/", maxsplit=1)[0].removesuffix("_no_noops"))

    def identify(self, path: Path) -> str | None:
        """The checkpoint of which a folder bears the name (`ckpts/openvla-7b`, or a snapshot in the hub's cache).

        Datasets are not looked for: anybody's copy of LIBERO bears the same names.
        """
        for folder in (path, *path.parents):
            if match := _CACHE_FOLDER.fullmatch(folder.name):
                name = "/".join(match.groups())
                return name if name in self.published else None
        named = [name for name in self.published if name.rpartition("/")[2] == path.name]
        return next((name for name in named if self.published[name].kind != "rlds"), None)


@functools.cache
def read_facts(path: Path = PUBLISHED) -> Facts:
    """The facts that ship with the project, or those of another file."""
    return read_yaml(path, Facts)
