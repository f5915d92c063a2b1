"""LoRA (arXiv 2106.09685) on a VLA: the recipe's layers, published adapter files, and which layers can learn at all.

The trainer adds and saves adapters, the policy loader reads them for unmerged evaluation, `prismo.merging.merge` folds
them into the base weights. peft does the layers themselves; they are injected in place, so the model keeps its class.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prismo.models.adapter_file import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    open_adapter,
    read_adapter_file,
)
from prismo.models.vit import VisionTransformer
from prismo.util.files import atomic_folder, write_json

_LOG = logging.getLogger(__name__)
_PREFIX = "base_model.model."

# What peft 0.11's "all-linear" expanded to on openvla-7b. Names are matched as suffixes, which also takes in the two
# patch-embedding convolutions (`.proj`), the never-used attention pool (`q`, `kv`, ...) and `lm_head`.
TARGET_MODULES = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
    "qkv", "proj", "fc1", "fc2", "fc3", "q", "kv",
)  # fmt: skip


@dataclass(frozen=True)
class LoraSpec:
    """The numbers that turn two factors into a change of a weight: `W + scale * B @ A`.

    Attributes:
        rank: inner width of the factors.
        alpha: None = the recipe's `min(rank, 16)`.
        dropout: on the layer's input, in training only.
        target_modules: suffixes of the adapted modules' names, or one pattern that whole names match.
        modules_to_save: suffixes of modules that are trained in full and stored with the adapter.
    """

    rank: int = 32
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = TARGET_MODULES
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.dropout}")

    @property
    def resolved_alpha(self) -> float:
        return min(self.rank, 16) if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """Factor of the product B @ A (0.5 for the recipe's rank 32)."""
        return self.resolved_alpha / self.rank


def add_lora(model: nn.Module, spec: LoraSpec, *, dtype: torch.dtype = torch.float32) -> None:
    """Freeze `model` and give it new LoRA layers in place (A gaussian with deviation 1/rank, B zero).

    Args:
        model: any; layers that its modules name as `trained_beside_adapters` (FiLM) are trained, too.
        dtype: of what is trained. fp32 is right for training: in bf16, as in the original, AdamW's small updates and
            its second moment round away.

    Raises:
        ValueError: the model already has LoRA layers.
    """
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError("the model already has LoRA layers; merge them first or load a fresh base")
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.resolved_alpha,  # ty: ignore[invalid-argument-type] (peft says int; it only divides by r)
        lora_dropout=spec.dropout,
        target_modules=spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules),
        init_lora_weights="gaussian",
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:  # peft found nothing to adapt
        raise ValueError(f"target_modules {spec.target_modules!r} of adapter_config.json: {error}") from error
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.to(dtype)
    for parameter in saved_parameters(model, spec).values():
        parameter.requires_grad_(True).data = parameter.data.to(dtype)
    for module in model.modules():
        for name in getattr(module, "trained_beside_adapters", ()):  # injecting froze it with everything else
            module.get_submodule(name).requires_grad_(True)


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """LoRA weights by their published names, without the `base_model.model.` in front."""
    return {
        name.replace(".default.", "."): parameter for name, parameter in model.named_parameters() if ".lora_" in name
    }


def saved_parameters(model: nn.Module, spec: LoraSpec) -> dict[str, nn.Parameter]:
    """Parameters of `spec.modules_to_save` by name."""
    return {
        f"{name}.{leaf}": parameter
        for name, module in model.named_modules()
        if name.endswith(spec.modules_to_save)
        for leaf, parameter in module.named_parameters()
    }


def never_used_modules(model: nn.Module, *, lm_head_used: bool) -> list[str]:
    """Names of modules whose output never reaches a loss, so that their weights get no gradient.

    Features are taken from the second-to-last block of each `VisionTransformer`: the last block, the final norm and the
    attention pool are dead weights. So is `lm_head` beside such towers, unless actions are predicted as tokens
    (`lm_head_used`). A model with other towers uses every layer.
    """
    towers = [module for module in model.modules() if isinstance(module, VisionTransformer)]
    if not towers:
        return []
    unused: set[nn.Module] = set() if lm_head_used else {model.get_submodule("language_model.lm_head")}
    for tower in towers:
        unused |= {tower.blocks[-1], tower.norm, getattr(tower, "attn_pool", tower.norm)}
    return [name for name, module in model.named_modules() if module in unused]


def freeze_never_used(model: nn.Module, *, lm_head_used: bool) -> list[str]:
    """Take the modules of `never_used_modules` out of training and return their names.

    DistributedDataParallel then needs no search for unused parameters, and the optimizer carries no moments for them.
    """
    names = never_used_modules(model, lm_head_used=lm_head_used)
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return names


def save_adapter(
    model: nn.Module,
    checkpoint_dir: str | Path,
    spec: LoraSpec,
    *,
    base: str,
    base_fingerprint: str | None = None,
    base_full_fingerprint: str | None = None,
) -> Path:
    """Write `lora_adapter/` in the published layout, atomically; any peft from 0.11 on reads it.

    Unlike the original's, it holds no copy of `lm_head` (263 MB).

    Args:
        base: path or hub id of the base model, for the reader's information.
        base_fingerprint: `prismo.models.weight_files.fingerprint` of the base; merging then refuses another one.
        base_full_fingerprint: its `full_fingerprint`; merging then finds every byte that has changed.

    Returns:
        The adapter folder.
    """
    tensors = {
        _PREFIX + name: parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in (lora_parameters(model) | saved_parameters(model, spec)).items()
    }
    if not any(".lora_" in name for name in tensors):
        raise ValueError("the model has no LoRA layers to save")
    known = {"base_fingerprint": base_fingerprint, "base_full_fingerprint": base_full_fingerprint}
    metadata = {"format": "pt"} | {name: value for name, value in known.items() if value}
    folder = Path(checkpoint_dir) / ADAPTER_FOLDER
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / ADAPTER_WEIGHTS, metadata=metadata)
        (temporary / ADAPTER_WEIGHTS).chmod(
            0o644
        )  # safetensors writes private files; a shared folder needs the usual mode
        write_json(temporary / ADAPTER_CONFIG, published_config(spec, base))
    return folder


def load_adapter(model: nn.Module, checkpoint_dir: str | Path, *, dtype: torch.dtype = torch.float32) -> LoraSpec:
    """Add the LoRA layers of a checkpoint's `lora_adapter/` to `model` and fill them.

    Adapters may lack modules that are never used, and may carry the original's copy of `lm_head`, which must be that of
    `model`.

    Returns:
        What to pass to `save_adapter` when training goes on.

    Raises:
        FileNotFoundError, ValueError: no adapter, an unsupported kind, or one that does not fit (naming the tensor).
    """
    folder = Path(checkpoint_dir) / ADAPTER_FOLDER
    spec = read_adapter_spec(folder)
    with open_adapter(folder) as file:
        _check_rank(file, spec, folder)
        add_lora(model, spec, dtype=dtype)
        parameters = lora_parameters(model)
        for name, key in match_adapter(file, model, folder).items():
            parameters[name].data.copy_(file.get_tensor(key))
        saved = match_saved(file, model, spec, folder)
        for name, parameter in saved_parameters(model, spec).items():
            parameter.data.copy_(file.get_tensor(saved[name]))
        for key in base_copies(file, spec):
            own = dict(model.named_parameters()).get(key.removeprefix(_PREFIX))
            if own is None or not torch.equal(own.cpu(), file.get_tensor(key).to(own.dtype)):
                _LOG.warning("%s was trained on another base model: its copy of %s differs", folder, key)
    return spec


def merge_in_memory(model: nn.Module, checkpoint_dir: str | Path) -> None:
    """Fold `lora_adapter/` into the weights of `model`, rounded once, to the bytes that merging to disk gives."""
    spec = load_adapter(model, checkpoint_dir)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer()
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            base.weight.data = merged_weight(base.weight.data, a.data, b.data, spec.scale)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, base)


def match_adapter(file: safe_open, model: nn.Module, folder: Path) -> dict[str, str]:
    """Which tensor of an adapter file belongs to which LoRA parameter of `model` (as `lora_parameters` names it).

    Raises:
        ValueError: the file adapts something else, has other shapes or numbers, or lacks a module that is used.
    """
    parameters = lora_parameters(model)
    found = {key.removeprefix(_PREFIX): key for key in file.keys() if ".lora_" in key}  # noqa: SIM118 (not a dict)
    unknown = sorted(found.keys() - parameters.keys())
    if unknown:
        raise ValueError(
            f"{folder} does not fit this base model: it adapts {unknown[0]} and {len(unknown) - 1} more tensors that "
            "the model does not have (adapters of FiLM runs need FiLM first)"
        )
    for name, key in found.items():
        shape, expected = file.get_slice(key).get_shape(), list(parameters[name].shape)
        if shape != expected:
            raise ValueError(f"{folder} does not fit this base model: {key} has shape {shape}, expected {expected}")
        if (kind := file.get_slice(key).get_dtype()) not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{folder}: {key} holds {kind}, expected real numbers; copy or save it again")
        if not file.get_tensor(key).isfinite().all():
            raise ValueError(f"{folder}: {key} holds NaN or infinity; copy it again, or merge an earlier checkpoint")
    unused = never_used_modules(model, lm_head_used=False)
    absent = [name for name in parameters.keys() - found.keys() if not any(name.startswith(f"{m}.") for m in unused)]
    if absent:
        raise ValueError(f"{folder} is incomplete: {min(absent)} and {len(absent) - 1} more tensors are missing")
    for name in found:
        other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        if other not in found:
            raise ValueError(f"{folder} is incomplete: it holds {name} without {other}; copy or save it again")
    return found


def match_saved(file: safe_open, model: nn.Module, spec: LoraSpec, folder: Path) -> dict[str, str]:
    """`saved_keys`, after comparing them with the parameters of `model`.

    Raises:
        ValueError: the file lacks one, or it has another shape.
    """
    found = saved_keys(file, spec)
    for name, parameter in saved_parameters(model, spec).items():
        shape = file.get_slice(found[name]).get_shape() if name in found else None
        if shape != list(parameter.shape):
            raise ValueError(f"{folder} does not fit: {name} has shape {shape}, expected {list(parameter.shape)}")
    return found


def _check_rank(file: safe_open, spec: LoraSpec, folder: Path) -> None:
    """Before layers of the wrong size are made: a rank that was mistyped may need more memory than there is."""
    for key in file.keys():  # noqa: SIM118 (not a dict)
        if key.endswith(".lora_A.weight") and (rank := file.get_slice(key).get_shape()[0]) != spec.rank:
            raise ValueError(f"{folder}: {key} has rank {rank}, adapter_config.json says {spec.rank}; copy it again")


def base_copies(file: safe_open, spec: LoraSpec) -> list[str]:
    """Base weights inside an adapter file: peft adds `lm_head` by itself when that is adapted."""
    trained = saved_keys(file, spec).values()
    return [key for key in file.keys() if ".lora_" not in key and key not in trained]  # noqa: SIM118 (not a dict)


def saved_keys(file: safe_open, spec: LoraSpec) -> dict[str, str]:
    """Name of a base weight -> key of the trained one that replaces it (`LoraSpec.modules_to_save`)."""
    return {
        key.removeprefix(_PREFIX): key
        for key in file.keys()  # noqa: SIM118 (not a dict)
        if ".lora_" not in key and key.rpartition(".")[0].endswith(spec.modules_to_save)
    }


def read_adapter_spec(folder: str | Path) -> LoraSpec:
    """Settings in `adapter_config.json`; raises as `read_adapter_file` does."""
    stored = read_adapter_file(folder)
    targets = stored.target_modules
    return LoraSpec(
        rank=stored.r,
        alpha=stored.lora_alpha,
        dropout=stored.lora_dropout or 0.0,
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        modules_to_save=tuple(stored.modules_to_save or ()),
    )


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`weight + scale * B @ A` rounded once to the dtype of `weight`; linear [out, in] or convolution [out, in, h, w].

    The sum over the rank runs in float64, so that neither the kind of CPU nor the number of threads shows in the
    result. Rows go through the cache in blocks.
    """
    flat, a, b = weight.flatten(1), a.flatten(1).double(), b.flatten(1).double().mul(scale)
    merged = torch.empty_like(flat)
    rows = max(1, 2**18 // flat.shape[1])
    for block in range(0, len(flat), rows):
        part = slice(block, block + rows)
        merged[part] = torch.addmm(flat[part].double(), b[part], a).to(weight.dtype)
    return merged.view_as(weight)


def published_config(spec: LoraSpec, base: str) -> dict[str, Any]:
    """`adapter_config.json` with the keys of peft 0.11, which rejects keys that later versions added."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian",
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": spec.resolved_alpha,
        "lora_dropout": spec.dropout,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": list(spec.modules_to_save) or None,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": spec.target_modules if isinstance(spec.target_modules, str) else sorted(spec.target_modules),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
