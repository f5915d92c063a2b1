"""Checks around `from_pretrained`: is it a checkpoint, are its files whole, does every tensor fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from prismo.util.hub import is_hub_id

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, by its index.

    Raises:
        FileNotFoundError: no weights, or a shard of the index is missing.
    """
    if (folder / _INDEX).is_file():
        names = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder / _INDEX} names {', '.join(missing)}, which is not there; download the checkpoint again"
            )
        return [folder / name for name in names]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    adapter = " It holds a LoRA adapter: merge it first (vla-scripts/merge_lora_weights_and_save.py)."
    raise FileNotFoundError(
        f"{folder} has neither {_INDEX} nor {_SINGLE}.{adapter if (folder / 'lora_adapter').is_dir() else ''}"
    )


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
            raise FileNotFoundError(f"{path} is neither a checkpoint folder nor a hub id such as openvla/openvla-7b")
        return
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(
            f"{folder} is not a checkpoint: no config.json. Expected a folder with config.json, "
            "model*.safetensors and preprocessor_config.json"
        )
    try:
        model_type = json.loads(config.read_text()).get("model_type")
    except json.JSONDecodeError as error:
        raise ValueError(f"{config} is not valid JSON ({error}); download it again") from error
    if model_type not in model_types:
        expected = " or ".join(repr(name) for name in model_types)
        raise ValueError(f"{config} is of model_type {model_type!r}, expected {expected}")
    for file in weight_files(folder):
        _check_whole(file)


def _check_whole(file: Path) -> None:
    """safetensors compares the header's byte ranges with the file's size on opening."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or broken ({error}); download it again") from error


def check_loaded(path: str | Path, report: Any) -> None:
    """Refuse a model some of whose tensors were missing, unknown or of another shape in the files.

    transformers would go on with random weights in their place.
    """
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report.get(kind) or ())
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{kind.replace('_keys', '')}: {', '.join(names[:3])}{more}")
    if problems:
        raise ValueError(f"the weights in {path} do not fit OpenVLA ({'; '.join(problems)})")
