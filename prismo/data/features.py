"""What an RLDS folder says of itself: `features.json` and `dataset_info.json`, read and written without TensorFlow.

`rlds.py` reads them, `writer.py` writes them in the form that `tfds.builder_from_directory` loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prismo.util.schema import JsonObject, read_json

_PACKAGE = "tensorflow_datasets.core.features"
_DEFAULT_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@dataclass(frozen=True)
class Feature:
    """One leaf of the feature tree.

    Attributes:
        kind: "image" (encoded bytes), "text" (UTF-8 bytes) or "tensor" (numbers).
        shape: of one step (images: height, width, channels); -1 where it is not fixed.
        dtype: numpy name of the numbers, e.g. "float32".
        encoding: "jpeg" or "png" for images, "none", "bytes" or "zlib" for tensors, "" where the file does not say.
    """

    kind: Literal["image", "text", "tensor"]
    shape: tuple[int, ...] = ()
    dtype: str = ""
    encoding: str = ""


@dataclass(frozen=True)
class Split:
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
    splits: tuple[Split, ...]
    features: dict[str, Feature]


def find_version_folder(path: Path) -> Path:
    """The folder with `dataset_info.json`: `path` itself or its highest version sub-folder (`1.0.0`, ...).

    Raises:
        FileNotFoundError: naming what was looked for.
    """
    if (path / "dataset_info.json").is_file():
        return path
    if not path.is_dir():
        beside = sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"no dataset folder {path}"
            + (f"; {path.parent} holds: {', '.join(beside)}" if beside else f"; {path.parent} is empty or missing")
            + ". Check --data_root_dir (data/README.md lists the downloads)"
        )
    versions = [p for p in path.iterdir() if (p / "dataset_info.json").is_file()]
    if not versions:
        raise FileNotFoundError(
            f"{path} is no RLDS dataset: neither it nor a version folder in it (such as 1.0.0) holds "
            "dataset_info.json. Finish the download, or build it with scripts/build_rlds_dataset.py"
        )
    return max(versions, key=lambda p: [int(part) if part.isdigit() else -1 for part in p.name.split(".")])


def read_dataset_info(path: Path) -> DatasetInfo:
    """Describe the RLDS folder `path` (dataset or version folder).

    Raises:
        FileNotFoundError, ValueError: a file is missing, a format is not TFRecord, shards are absent.
    """
    path = find_version_folder(path)
    if not (path / "features.json").is_file():
        raise FileNotFoundError(f"{path} has no features.json; the download is not complete")
    info = read_json(path / "dataset_info.json", JsonObject)
    file_format = info.get("fileFormat", "tfrecord")
    if file_format != "tfrecord":
        raise ValueError(f"{path}: shards are {file_format}; only tfrecord is read. Convert with tfds.data_sources")
    splits = tuple(_parse_split(path, info["name"], entry) for entry in info.get("splits", []))
    if not splits:
        raise ValueError(f"{path / 'dataset_info.json'} lists no splits")
    features: dict[str, Feature] = {}
    _collect(read_json(path / "features.json", JsonObject), "", features)
    if not any(name.startswith("steps/") for name in features):
        raise ValueError(f"{path / 'features.json'} describes no 'steps'; this is not an RLDS (episode) dataset")
    return DatasetInfo(path, info["name"], splits, features)


def _parse_split(path: Path, dataset: str, entry: Mapping[str, Any]) -> Split:
    episodes = tuple(int(n) for n in entry.get("shardLengths", []))
    template = entry.get("filepathTemplate") or _DEFAULT_TEMPLATE
    files = tuple(path / _shard_name(template, dataset, entry["name"], i, len(episodes)) for i in range(len(episodes)))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path} lacks {len(missing)} of {len(files)} shards, the first is {missing[0]}; download them again"
        )
    return Split(entry["name"], files, episodes)


def _shard_name(template: str, dataset: str, split: str, index: int, count: int) -> str:
    fields = {
        "DATASET": dataset,
        "SPLIT": split,
        "FILEFORMAT": "tfrecord",
        "SHARD_INDEX": f"{index:05d}",
        "NUM_SHARDS": f"{count:05d}",
        "SHARD_X_OF_Y": f"{index:05d}-of-{count:05d}",
    }
    return Path(template.format(**fields)).name


def _collect(node: Mapping[str, Any], prefix: str, found: dict[str, Feature]) -> None:
    """Add the leaves below `node`; lists inside a step have no fixed place in a record and are left out."""
    if "featuresDict" in node:
        for name, child in node["featuresDict"].get("features", {}).items():
            _collect(child, f"{prefix}/{name}" if prefix else name, found)
    elif "sequence" in node:
        if prefix == "steps":
            _collect(node["sequence"]["feature"], prefix, found)
    elif "image" in node:
        found[prefix] = Feature("image", _shape(node["image"]), "uint8", node["image"].get("encodingFormat", ""))
    elif "text" in node:
        found[prefix] = Feature("text")
    elif "tensor" in node:
        tensor = node["tensor"]
        if tensor["dtype"] in ("string", "object"):
            found[prefix] = Feature("text", _shape(tensor))
        else:
            found[prefix] = Feature("tensor", _shape(tensor), tensor["dtype"], tensor.get("encoding", "none"))


def _shape(node: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(n) for n in node.get("shape", {}).get("dimensions", []))


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
    return {
        "pythonClassName": f"{_PACKAGE}.dataset_feature.Dataset",
        "sequence": {"feature": content, "length": "-1"},
    }


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
