"""Model families by the `model_type` of their config.json. A new one is one file or folder, and a line in `FAMILIES`.

Everything generic asks this registry, and nothing generic names a family. A family's own module is imported when it is
asked for; what trains and runs it is named by strings, because it builds on packages that ask here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from prismo.models.folder import CONFIG, missing_files, missing_of_model, read_model_type
from prismo.models.training_record import TrainingRecord
from prismo.util.hub import local_folder
from prismo.util.schema import JsonObject, read_json

FAMILIES = {
    "openvla": "prismo.families.openvla",
    "spatialvla": "prismo.families.spatialvla",
}


@dataclass(frozen=True)
class Family:
    """What generic code must know of a model family.

    Attributes:
        model_type: in config.json.
        alias: its name for --model_family, which keeps the original's words.
        title: its name in sentences.
        license, terms: of its base models, as the hub calls it and as a clause.
        processor: files that its processor is read from; of several in a group one is enough.
        statistics: files that hold the statistics of a policy; the first that has them counts.
        marker: a file that every folder of this family has, also one with an adapter alone, and others do not have;
            None for the family that folders without a marker are of.
        flags: flags of training and evaluation that not every family has.
        check_given: raises ValueError or OSError for training flags that name a file which cannot be used.
        published: flags that its published trainings set otherwise than the command line's defaults.
        settled: training flags that it settles by itself.
        lora_alpha: rank of adapters -> their usual alpha.
        read_config: the configuration of a folder; raises ValueError for one that describes no such model.
        build: the network of a configuration, called where new tensors take no memory.
        stored_name: name of a parameter in the files.
        wrap: (network, checkpoint folder, keys of its adapter) puts around the network what the adapter was trained
            inside of; raises FileNotFoundError where the file of that is missing.
        repeated: a table's name in the files -> the one whose rows they repeat at its end.
        merged_config: (base folder, checkpoint folder) -> config.json of the merged model.
        base_code: checkpoint folder -> whether the base's model code describes the merged model, too. Whoever finds
            vanilla OpenVLA's code takes the model for a causal one.
        check_files: (checkpoint folder, its training record) raises FileNotFoundError for a part that is not there.
        chunk: (checkpoint folder, its training record) -> actions per prediction; None = the files do not say.
        training: "module:name" of its `prismo.training.task.ModelFamily`.
        policy: "module:name" of its `prismo.policies.base.PolicyFamily`.
        checks: "module:name" of its `prismo.verify.kinds.policy.PolicyFolder`.
    """

    model_type: str
    alias: str
    title: str
    license: str
    terms: str
    processor: tuple[tuple[str, ...], ...]
    statistics: tuple[str, ...]
    marker: str | None
    flags: frozenset[str]
    check_given: Callable[[Any], object]
    published: dict[str, Any]
    settled: frozenset[str]
    lora_alpha: Callable[[int], int]
    read_config: Callable[[Path], Any]
    build: Callable[[Any], nn.Module]
    stored_name: Callable[[str], str]
    wrap: Callable[[nn.Module, Path, Sequence[str]], None]
    repeated: Mapping[str, str]
    merged_config: Callable[[Path, Path], dict[str, Any]]
    base_code: Callable[[Path], bool]
    check_files: Callable[[Path, TrainingRecord | None], None]
    chunk: Callable[[Path, TrainingRecord], int | None]
    training: str
    policy: str
    checks: str = "prismo.verify.kinds.policy:PolicyFolder"

    def load(self, what: str) -> Any:
        """The object that one of its strings names: "training", "policy" or "checks"."""
        module, _, name = getattr(self, what).partition(":")
        return getattr(importlib.import_module(module), name)


def get_family(model_type: str) -> Family:
    """The family of a name in `FAMILIES`."""
    return importlib.import_module(FAMILIES[model_type]).FAMILY


def all_families() -> Iterable[Family]:
    """Every family, in the order of the registry."""
    return map(get_family, FAMILIES)


def family_of(folder: Path) -> Family:
    """The family of a model's folder.

    Raises:
        ValueError: config.json is damaged, or of none of ours.
    """
    return get_family(read_model_type(folder, FAMILIES))


def family_of_checkpoint(folder: Path) -> Family:
    """The family of a policy's folder, which has no config.json if it holds an adapter alone; raises as `family_of`."""
    if (folder / CONFIG).is_file() and read_json(folder / CONFIG, JsonObject).get("model_type") is not None:
        return family_of(folder)
    return _marked(lambda family, marker: (folder / marker).is_file())


def family_of_name(base: str) -> Family:
    """The family that the name of a base model speaks of, before anything is fetched."""
    name = base.rstrip("/").split("/")[-1].lower()
    return _marked(lambda family, marker: family.model_type in name)


def _marked(is_meant: Callable[[Family, str], bool]) -> Family:
    """The first family with a marker that is meant, else the one without."""
    found = [family for family in all_families() if family.marker and is_meant(family, family.marker)]
    return found[0] if found else next(family for family in all_families() if family.marker is None)


def missing_of_base(folder: Path) -> str | None:
    """What a folder lacks to be the base model of a family, as a sentence; None for nothing."""
    return missing_of_model(folder, {family.model_type: family.processor for family in all_families()})


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


def foreign_flags(flags: Any, family: Family) -> list[str]:
    """Flags that were given and that another family has but not this one, each with that family's title."""
    given = []
    for other in all_families():
        if other.model_type == family.model_type:
            continue
        for field in fields(flags):
            value = getattr(flags, field.name)
            off = value is None or (value is False and not field.default)  # as the original's commands spell it out
            if field.name in other.flags - family.flags and value != field.default and not off:
                given.append(f"--{field.name} {value} (only for {other.title})")
    return given
