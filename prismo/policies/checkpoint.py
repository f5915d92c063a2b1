"""What a checkpoint folder needs to be run, read from its files: nothing in it is executed or changed.

Called by the policy loaders and by `prismo.policies.settings`, which compares it with the user's flags. Any folder or
hub repository with the published layout works, whatever its name and whatever step its files are named after.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from prismo.data.normalize import DatasetStats, load_statistics
from prismo.models.component_files import TRAINING_CONFIG, Stem, find_component, read_component
from prismo.models.openvla import AttentionKind
from prismo.models.weight_files import fingerprint, stored_tensors
from prismo.util.hub import local_folder
from prismo.util.schema import JsonObject, read_json

_LOG = logging.getLogger(__name__)

Head = Literal["l1", "diffusion", "discrete"]
Family = Literal["openvla", "svla"]

ADAPTER_FOLDER = "lora_adapter"
_HASHED_WHOLE = (
    "*.pt",
    f"{ADAPTER_FOLDER}/*.safetensors",
    f"{ADAPTER_FOLDER}/*.json",
    "dataset_statistics.json",
    "processor_config.json",
)
_BLOCK = 2**22
_FAMILIES: dict[str, Family] = {"openvla": "openvla", "spatialvla": "svla"}
_STATISTICS: dict[Family, tuple[str, ...]] = {
    "openvla": ("dataset_statistics.json", "config.json"),
    "svla": ("processor_config.json",),
}
_HUB_FILES = ["*.json", "*.safetensors", "*.pt", "*.model", "*.txt", "*.py", f"{ADAPTER_FOLDER}/*"]


@dataclass(frozen=True)
class AdapterInfo:
    """An unmerged LoRA adapter.

    Attributes:
        rank: of its factors.
        base: folder or hub id of the model that it was trained on.
    """

    rank: int
    base: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its files describe it; None = they do not say.

    Attributes:
        source: as the user named it.
        folder: where it lies (for a hub id, in the hub's cache).
        family: "openvla" or "svla" (SpatialVLA).
        head: L1 head, diffusion head, or action tokens of the language model.
        attention: how its language model attends; see `attention_evidence` for what says so.
        film: its vision towers are modulated by the instruction.
        num_images: camera views it was trained with.
        proprio_dim: numbers in the state that it takes; None = it takes none.
        action_dim: numbers per action, from the head's tensors.
        chunk: actions per prediction.
        center_crop: it was trained on random crops (image_aug), so evaluation crops the center.
        diffusion_steps: length of its training schedule.
        adapter: not None = the folder holds no merged model but an adapter for a base model.
        statistics: by unnorm_key.
    """

    source: str
    folder: Path
    family: Family
    head: Head
    attention: AttentionKind | None
    attention_evidence: str
    film: bool
    num_images: int | None
    proprio_dim: int | None
    action_dim: int | None
    chunk: int | None
    center_crop: bool | None
    diffusion_steps: int | None
    adapter: AdapterInfo | None
    statistics: Mapping[str, DatasetStats]


def open_checkpoint(source: str | Path, base: str | None = None) -> Checkpoint:
    """Describe a checkpoint; a hub id is downloaded to the hub's cache first.

    Args:
        source: folder or hub id.
        base: base model of an unmerged checkpoint, instead of the one that its adapter names.

    Raises:
        FileNotFoundError: neither folder nor hub id, or files are missing (naming them).
        ValueError: files contradict each other or cannot be read.
    """
    folder = checkpoint_folder(source)
    merged = any(folder.glob("model*.safetensors")) and (folder / "config.json").is_file()
    adapter = None if merged else _read_adapter(folder, base)
    config = read_json(folder / "config.json", JsonObject) if (folder / "config.json").is_file() else {}
    family = _family(folder, config)
    training = _read_training_config(folder)
    head_state = _component(folder, "action_head")
    proprio_state = _component(folder, "proprio_projector")
    film = _component_file(folder, "vision_backbone") is not None
    attention, evidence = _attention(folder, config, training, bool(head_state or proprio_state or film))
    return Checkpoint(
        source=str(source),
        folder=folder,
        family=family,
        head=_head_kind(folder, head_state),
        attention=attention,
        attention_evidence=evidence,
        film=film,
        num_images=training.get("num_images_in_input"),
        proprio_dim=proprio_state["fc1.weight"].shape[1] if proprio_state else None,
        action_dim=_action_dim(head_state),
        chunk=_chunk(folder, family, training),
        center_crop=_center_crop(folder, source, training),
        diffusion_steps=training.get("num_diffusion_steps_train"),
        adapter=adapter,
        statistics=_statistics(folder, family),
    )


def checkpoint_folder(source: str | Path) -> Path:
    """Folder of a policy; a hub id is found in the hub's cache or downloaded (see `prismo.util.hub`)."""
    return local_folder(source, _HUB_FILES).resolve()


def checkpoint_hash(checkpoint: Checkpoint) -> str:
    """Identity of everything that changes the actions: weights, adapter, side modules and statistics.

    The big weight files enter by names, shapes and the first bytes of every tensor, the small files whole.
    """
    digest = hashlib.sha256()
    weights = checkpoint.folder if checkpoint.adapter is None else checkpoint_folder(checkpoint.adapter.base)
    digest.update(fingerprint(stored_tensors(weights)).encode())
    names = (
        "*.pt",
        f"{ADAPTER_FOLDER}/*.safetensors",
        f"{ADAPTER_FOLDER}/*.json",
        "dataset_statistics.json",
        "processor_config.json",
    )
    for path in sorted(path for name in names for path in checkpoint.folder.glob(name)):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def _read_adapter(folder: Path, base: str | None) -> AdapterInfo:
    path = folder / ADAPTER_FOLDER / "adapter_config.json"
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{folder} is not a checkpoint: expected config.json and model*.safetensors (merged), or {ADAPTER_FOLDER}/ "
            f"(unmerged); found {found}"
        )
    config = read_json(path, JsonObject)
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path} does not name its base model; give it as --base_checkpoint")
    return AdapterInfo(int(config["r"]), str(base))


def _read_training_config(folder: Path) -> dict[str, Any]:
    path = folder / TRAINING_CONFIG
    return read_json(path, JsonObject) if path.is_file() else {}


def _component_file(folder: Path, stem: Stem) -> Path | None:
    try:
        return find_component(folder, stem)
    except FileNotFoundError:
        return None


def _component(folder: Path, stem: Stem) -> dict[str, Tensor]:
    path = _component_file(folder, stem)
    return {} if path is None else read_component(path)


def _family(folder: Path, config: Mapping[str, Any]) -> Family:
    # Folders with an adapter alone have no config.json; only SpatialVLA's processor has this file.
    unmerged = "spatialvla" if (folder / "processor_config.json").is_file() else "openvla"
    model_type = config.get("model_type", unmerged)
    if model_type not in _FAMILIES:
        raise ValueError(
            f"{folder / 'config.json'} is of model_type {model_type!r}; this project runs {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[model_type]


def _head_kind(folder: Path, state: Mapping[str, Tensor]) -> Head:
    if not state:
        return "discrete"
    if any(name.startswith("noise_predictor.") for name in state):
        return "diffusion"
    if "model.fc1.weight" in state:
        return "l1"
    raise ValueError(
        f"the action_head file in {folder} is of an unknown kind (first tensor: {min(state)}); expected model.* (L1) "
        "or noise_predictor.* (diffusion)"
    )


def _action_dim(state: Mapping[str, Tensor]) -> int | None:
    """The last layer's rows."""
    last = [value for name, value in state.items() if name.endswith("fc2.weight")]
    return last[0].shape[0] if last else None


def _attention(
    folder: Path, config: Mapping[str, Any], training: Mapping[str, Any], side_modules: bool
) -> tuple[AttentionKind | None, str]:
    """(kind, what says so). Published files do not state it, but what lies beside the weights gives it away."""
    if training:
        kind = training.get("attention", "bidirectional")
        return kind, f"its {TRAINING_CONFIG} says {kind}"
    if side_modules:
        return "bidirectional", "its action head and projectors are those of parallel decoding (bidirectional)"
    if config.get("attention"):
        return config["attention"], f"its config.json says {config['attention']}"
    code = folder / "modeling_prismatic.py"
    if code.is_file():
        # OFT's model code is copied into its checkpoints; only that one knows of chunks. Read as text, never run.
        if "NUM_ACTIONS_CHUNK" in code.read_text(encoding="utf-8", errors="replace"):
            return "bidirectional", "the model code in its folder is that of OpenVLA-OFT (bidirectional)"
        return "causal", "the model code in its folder is that of vanilla OpenVLA (causal)"
    return None, "nothing says which"


def _center_crop(folder: Path, source: str | Path, training: Mapping[str, Any]) -> bool | None:
    if "image_aug" in training:
        return bool(training["image_aug"])
    return True if "image_aug" in f"{source} {folder.name}" else None


def _chunk(folder: Path, family: Family, training: Mapping[str, Any]) -> int | None:
    if family == "svla":
        return read_json(folder / "processor_config.json", JsonObject).get("action_chunk_size")
    return training.get("chunk")


def _statistics(folder: Path, family: Family) -> dict[str, DatasetStats]:
    """From the first file that has them. A merged model's config.json may still carry those of its base model."""
    names = _STATISTICS[family]
    for name in names:
        path = folder / name
        if path.is_file() and (name != "config.json" or read_json(path, JsonObject).get("norm_stats")):
            return load_statistics(path)
    raise FileNotFoundError(
        f"{folder} has no statistics ({' or '.join(names)}), so actions cannot be un-normalised; copy the file from "
        "the training run's folder"
    )
