"""The files of a LoRA adapter, `lora_adapter/`, without the library that trains them (peft is slow to import)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import FiniteFloat
from safetensors import SafetensorError, safe_open

from prismo.util.schema import JsonObject, check, read_json

ADAPTER_FOLDER = "lora_adapter"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SAVEABLE = ("spatial_embed_tokens",)

# Settings with which an adapter is more than `W + alpha / rank * B @ A`; the last value is that of files without them.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": ([], None),
    "init_lora_weights": (True, False, "gaussian", None),  # the others change the base weights
}


@dataclass(frozen=True)
class AdapterFile:
    """adapter_config.json, as far as it is read; see `prismo.models.lora.LoraSpec`."""

    r: Annotated[int, Ge(1), Le(1 << 16)]
    lora_alpha: Annotated[int, Gt(0)] | Annotated[FiniteFloat, Gt(0)]
    target_modules: str | Annotated[list[str], MinLen(1)]
    lora_dropout: Annotated[FiniteFloat, Ge(0), Lt(1)] | None = None
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None


def read_adapter_file(folder: str | Path) -> AdapterFile:
    """Settings in `adapter_config.json`.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: damaged, or a variant of LoRA that is more than `W + alpha / rank * B @ A`.
    """
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"no LoRA adapter: {path} does not exist. Give the checkpoint folder that holds {ADAPTER_FOLDER}/"
        )
    config = read_json(path, JsonObject)
    for key, allowed in _PLAIN.items():
        if config.get(key, allowed[-1]) not in allowed:
            raise ValueError(f"{path}: {key} is {config[key]!r}; only plain LoRA is supported ({key}={allowed[0]!r})")
    stored = check(config, AdapterFile, str(path))
    if unknown := sorted(set(stored.modules_to_save or []) - set(SAVEABLE)):
        raise ValueError(f"{path}: modules_to_save has {unknown}; only {', '.join(SAVEABLE)} is supported")
    return stored


def open_adapter(folder: str | Path) -> safe_open:
    """The adapter's tensors, opened lazily.

    Raises:
        FileNotFoundError: no safetensors file; pickled adapters are not read.
        ValueError: truncated.
    """
    path = Path(folder) / ADAPTER_WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist (pickled adapters, .bin, are not read; save it as safetensors)")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or broken ({error}); copy or save it again") from error
