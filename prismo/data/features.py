"""What an RLDS folder says of itself: `features.json` and `dataset_info.json`, read and written without TensorFlow.

`rlds.py` reads them, `rlds_writer.py` writes them in the form that `tfds.builder_from_directory` loads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from annotated_types import Ge, Le, MinLen
from pydantic import BeforeValidator

from prismo.data.specs import Feature
from prismo.util.schema import read_json

_PACKAGE = "tensorflow_datasets.core.features"
_DEFAULT_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@dataclass(frozen=True)
class ShardedSplit:
    """One split: its shard files in order and how many episodes each holds."""

    name: str
    files: tuple[Path, ...]
    episodes: tuple[int, ...]


@dataclass(frozen=True)
class DatasetInfo:
    """Content of `dataset_info.json` and `features.json` of the folder `path` (the version folder).

    `features` maps the names that TFRecord entries carry ("steps/observation/image") to their meaning.
    """

    path: Path
    name: str
    splits: tuple[ShardedSplit, ...]
    features: dict[str, Feature]


def _from_text(value: Any) -> Any:
    """Large integers are strings in the JSON of protocol buffers."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value) else value


_Count = Annotated[int, BeforeValidator(_from_text), Ge(0)]
_Dimension = Annotated[int, BeforeValidator(_from_text), Ge(-1), Le(1 << 24)]
_Pixels = Annotated[int, BeforeValidator(_from_text), Ge(-1), Le(1 << 16)]
_Name = Annotated[str, MinLen(1)]
_Length = TypeVar("_Length")


@dataclass(frozen=True)
class _SplitInfo:
    name: _Name
    shardLengths: list[_Count] = field(default_factory=list)
    filepathTemplate: str = ""


@dataclass(frozen=True)
class _Info:
    """What is read of dataset_info.json."""

    name: _Name
    splits: Annotated[list[_SplitInfo], MinLen(1)]
    fileFormat: str = "tfrecord"


@dataclass(frozen=True)
class _Shape(Generic[_Length]):
    dimensions: list[_Length] = field(default_factory=list)


@dataclass(frozen=True)
class _Image:
    shape: _Shape[_Pixels] = _Shape()
    encodingFormat: str = ""


@dataclass(frozen=True)
class _Tensor:
    dtype: _Name
    shape: _Shape[_Dimension] = _Shape()
    encoding: str = "none"


@dataclass(frozen=True)
class _Children:
    features: dict[str, _Node] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sequence:
    feature: _Node


@dataclass(frozen=True)
class _Node:
    """A node of features.json: one of these, or of a kind that is not read."""

    featuresDict: _Children | None = None
    sequence: _Sequence | None = None
    image: _Image | None = None
    text: dict[str, Any] | None = None
    tensor: _Tensor | None = None


def read_dataset_info(path: Path) -> DatasetInfo:
    """Describe the RLDS dataset in the version folder `path`.

    Raises:
        FileNotFoundError, ValueError: a file is missing, a format is not TFRecord, shards are absent.
    """
    if not (path / "features.json").is_file():
        raise FileNotFoundError(f"{path} has no features.json; the download is not complete")
    info = read_json(path / "dataset_info.json", _Info)
    if info.fileFormat != "tfrecord":
        raise ValueError(f"{path}: shards are {info.fileFormat}; only tfrecord is read. Convert with tfds.data_sources")
    splits = tuple(_parse_split(path, info.name, entry) for entry in info.splits)
    if len({split.name for split in splits}) < len(splits):
        raise ValueError(f"{path / 'dataset_info.json'} lists a split twice; fetch it again")
    features: dict[str, Feature] = {}
    _collect(read_json(path / "features.json", _Node), "", features)
    if not any(name.startswith("steps/") for name in features):
        raise ValueError(f"{path / 'features.json'} describes no 'steps'; this is not an RLDS (episode) dataset")
    return DatasetInfo(path, info.name, splits, features)


def _parse_split(path: Path, dataset: str, entry: _SplitInfo) -> ShardedSplit:
    count = len(entry.shardLengths)
    template = entry.filepathTemplate or _DEFAULT_TEMPLATE
    files = tuple(path / _shard_name(template, dataset, entry.name, number, count) for number in range(count))
    if len(set(files)) < count:
        raise ValueError(
            f"{path / 'dataset_info.json'}: the template {template!r} gives one name to several shards; fetch it again"
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path} lacks {len(missing)} of {count} shards, the first is {missing[0]}; download them again"
        )
    return ShardedSplit(entry.name, files, tuple(entry.shardLengths))


def _shard_name(template: str, dataset: str, split: str, index: int, count: int) -> str:
    fields = {
        "DATASET": dataset,
        "SPLIT": split,
        "FILEFORMAT": "tfrecord",
        "SHARD_INDEX": f"{index:05d}",
        "NUM_SHARDS": f"{count:05d}",
        "SHARD_X_OF_Y": f"{index:05d}-of-{count:05d}",
    }
    return Path(re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), template)).name


def _collect(node: _Node, prefix: str, found: dict[str, Feature]) -> None:
    """Add the leaves below `node`; lists inside a step have no fixed place in a record and are left out."""
    if node.featuresDict is not None:
        for name, child in node.featuresDict.features.items():
            _collect(child, f"{prefix}/{name}" if prefix else name, found)
    elif node.sequence is not None:
        if prefix == "steps":
            _collect(node.sequence.feature, prefix, found)
    elif node.image is not None:
        found[prefix] = Feature("image", tuple(node.image.shape.dimensions), "uint8", node.image.encodingFormat)
    elif node.text is not None:
        found[prefix] = Feature("text")
    elif node.tensor is not None:
        shape = tuple(node.tensor.shape.dimensions)
        if node.tensor.dtype in ("string", "object"):
            found[prefix] = Feature("text", shape)
        else:
            found[prefix] = Feature("tensor", shape, node.tensor.dtype, node.tensor.encoding)


def features_to_json(features: Mapping[str, Feature]) -> dict[str, Any]:
    """The `features.json` of an RLDS dataset with these leaves."""
    tree: dict[str, Any] = {}
    for name, feature in features.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = feature
    return _to_json(tree, "")


def _to_json(node: dict[str, Any] | Feature, name: str) -> dict[str, Any]:
    if isinstance(node, Feature):
        return _leaf_to_json(node)
    content = {
        "featuresDict": {"features": {key: _to_json(child, key) for key, child in sorted(node.items())}},
        "pythonClassName": f"{_PACKAGE}.features_dict.FeaturesDict",
    }
    if name != "steps":
        return content
    return {"pythonClassName": f"{_PACKAGE}.dataset_feature.Dataset", "sequence": {"feature": content, "length": "-1"}}


def _leaf_to_json(feature: Feature) -> dict[str, Any]:
    shape = {"dimensions": [str(n) for n in feature.shape]} if feature.shape else {}
    if feature.kind == "text":
        return {"pythonClassName": f"{_PACKAGE}.text_feature.Text", "text": {}}
    if feature.kind == "image":
        return {
            "image": {"dtype": "uint8", "encodingFormat": feature.encoding, "shape": shape},
            "pythonClassName": f"{_PACKAGE}.image_feature.Image",
        }
    name = "tensor_feature.Tensor" if feature.shape else "scalar.Scalar"
    return {
        "pythonClassName": f"{_PACKAGE}.{name}",
        "tensor": {"dtype": feature.dtype, "encoding": feature.encoding or "none", "shape": shape},
    }
