"""What a checkpoint folder needs to be run, read from its files: nothing in it is executed or changed.

Called by the policy loaders and by `prismo.policies.settings`, which compares it with the user's flags. Any folder or
hub repository with the published layout works, whatever its name and whatever step its files are named after.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from prismo.data.normalize import DatasetStats, load_statistics
from prismo.families import FAMILIES, Family, family_of_checkpoint, missing_of_base
from prismo.models.adapter_file import ADAPTER_CONFIG, ADAPTER_FOLDER, ADAPTER_WEIGHTS, open_adapter, read_adapter_file
from prismo.models.component_files import find_component, has_component, read_component
from prismo.models.folder import CONFIG, UNFINISHED, check_folder, is_model, is_unfinished
from prismo.models.heads import HEADS, Shapes, recognise
from prismo.models.self_test import AttentionKind
from prismo.models.training_record import TrainingRecord, attention_kind, read_training_record
from prismo.models.weight_files import fingerprint, stored_tensors
from prismo.util.hub import is_hub_id, local_folder, no_such_folder
from prismo.util.schema import JsonObject, read_json

_BLOCK = 2**22
_HUB_FILES = ("*.json", "*.safetensors", "*.pt")  # adapters too: the patterns reach into folders
_HUB_EXTRAS = ("*.model", "*.txt", "*.py")


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
        kind: its model family.
        head: a key of `prismo.models.heads.HEADS`.
        attention: how its language model attends; see `attention_evidence` for what says so.
        film: its vision towers are modulated by the instruction.
        proprio_dim: numbers in the state that it takes; None = it takes none.
        action_dim: numbers per action, from the head's tensors.
        chunk: actions per prediction.
        center_crop: it was trained on random crops (image_aug), so evaluation crops the center.
        record: what else its training says, e.g. the robot; all None without one.
        adapter: not None = the folder holds no merged model but an adapter for a base model.
        statistics: by unnorm_key.
    """

    source: str
    folder: Path
    kind: Family
    head: str
    attention: AttentionKind | None
    attention_evidence: str
    film: bool
    proprio_dim: int | None
    action_dim: int | None
    chunk: int | None
    center_crop: bool | None
    record: TrainingRecord
    adapter: AdapterInfo | None
    statistics: Mapping[str, DatasetStats]

    @property
    def family(self) -> str:
        """Its name in result files and names of runs: that of --model_family."""
        return self.kind.alias


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
    adapter = None
    if is_model(folder):
        check_folder(folder, tuple(FAMILIES))
    else:
        adapter = _read_adapter(folder, base)
    config = read_json(folder / CONFIG, JsonObject) if (folder / CONFIG).is_file() else {}
    family = family_of_checkpoint(folder)
    if config:
        family.read_config(folder)
    record = read_training_record(folder)
    family.check_files(folder, record)
    head, action_dim = _head(folder)
    proprio_state = _component(folder, "proprio_projector")
    attention, evidence = attention_kind(folder, record, config)
    said = record or TrainingRecord()
    return Checkpoint(
        source=str(source),
        folder=folder,
        kind=family,
        head=head,
        attention=attention,
        attention_evidence=evidence,
        film=has_component(folder, "vision_backbone"),
        proprio_dim=_matrix(folder, proprio_state, "fc1.weight").shape[1] if proprio_state else None,
        action_dim=action_dim,
        chunk=family.chunk(folder, said),
        center_crop=_center_crop(folder, source, said),
        record=said,
        adapter=adapter,
        statistics=_statistics(folder, family),
    )


def checkpoint_folder(source: str | Path) -> Path:
    """Folder of a policy; a hub id is found in the hub's cache or downloaded (see `prismo.util.hub`)."""
    return local_folder(source, _HUB_FILES, missing=_missing, optional=_HUB_EXTRAS).resolve()


def weights_folder(checkpoint: Checkpoint) -> Path:
    """Folder of the weights: the checkpoint's, or that of its adapter's base, which may have to be downloaded.

    Raises:
        FileNotFoundError: the base is nowhere.
    """
    if checkpoint.adapter is None:
        return checkpoint.folder
    try:
        return local_folder(checkpoint.adapter.base, _HUB_FILES, missing=missing_of_base, optional=_HUB_EXTRAS)
    except FileNotFoundError as error:
        raise FileNotFoundError(_no_base(checkpoint.folder, str(error))) from error


def fold_adapter(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """`model`, in the dtype of the stored weights, with the adapter of an unmerged checkpoint merged in memory.

    Raises:
        ValueError: the adapter belongs to another base model; it would give noise.
    """
    from prismo.models.lora import merge_in_memory  # noqa: PLC0415 (imports peft; merged checkpoints need none of it)

    base = weights_folder(checkpoint)
    with open_adapter(checkpoint.folder / ADAPTER_FOLDER) as file:
        trained_on = (file.metadata() or {}).get("base_fingerprint")  # of this project's trainer
    if trained_on not in (None, fingerprint(stored_tensors(base))):
        raise ValueError(
            f"the adapter in {checkpoint.folder} was trained on other weights than those in {base}; give the model "
            "that training started from as --base_checkpoint"
        )
    merge_in_memory(model, checkpoint.folder)
    return model


def checkpoint_hash(checkpoint: Checkpoint) -> str:
    """Identity of everything that changes the actions: weights, adapter, side modules and statistics.

    The big weight files enter by names, shapes and the first bytes of every tensor, the small files whole.
    """
    digest = hashlib.sha256()
    digest.update(fingerprint(stored_tensors(weights_folder(checkpoint))).encode())
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


def _missing(folder: Path) -> str | None:
    """What a folder lacks to be a policy, as a sentence."""
    adapter = folder / ADAPTER_FOLDER
    if is_model(folder) or not (adapter / ADAPTER_CONFIG).is_file():
        return missing_of_base(folder)
    return None if (adapter / ADAPTER_WEIGHTS).is_file() else f"{adapter} has no {ADAPTER_WEIGHTS}"


def _no_base(folder: Path, why: str) -> str:
    return f"the base model of the adapter in {folder} is not there: {why} Say where it lies with --base_checkpoint"


def _read_adapter(folder: Path, base: str | None) -> AdapterInfo:
    path = folder / ADAPTER_FOLDER / ADAPTER_CONFIG
    if not path.is_file():
        if is_unfinished(folder):
            raise FileNotFoundError(f"{folder} is not a checkpoint. {UNFINISHED}")
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{folder} is not a checkpoint: expected config.json and model*.safetensors (merged), or {ADAPTER_FOLDER}/ "
            f"(unmerged); found {found}"
        )
    config = read_adapter_file(path.parent)
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{path} does not name its base model; give it as --base_checkpoint")
    if not Path(base).is_dir() and not is_hub_id(base):
        raise FileNotFoundError(_no_base(folder, no_such_folder(base)))
    return AdapterInfo(config.r, base)


def _component(folder: Path, stem: str) -> dict[str, Tensor]:
    return read_component(find_component(folder, stem)) if has_component(folder, stem) else {}


def _matrix(folder: Path, state: Mapping[str, Tensor], name: str) -> Tensor:
    """A matrix of a side module."""
    if name not in state or state[name].ndim != 2:
        raise ValueError(
            f"a module file in {folder} holds no matrix {name} (first tensor: {min(state)}); copy it again"
        )
    return state[name]


def _head(folder: Path) -> tuple[str, int | None]:
    """Kind of the action head, and the numbers per action that its tensors tell."""
    shapes: Shapes = {name: tuple(value.shape) for name, value in _component(folder, "action_head").items()}
    try:
        kind = recognise(shapes)
        return kind, HEADS[kind].action_dim(shapes)
    except ValueError as error:
        raise ValueError(f"the action_head file in {folder}: {error}; copy it again") from error


def _center_crop(folder: Path, source: str | Path, record: TrainingRecord) -> bool | None:
    if record.image_aug is not None:
        return record.image_aug
    return True if "image_aug" in f"{source} {folder.name}" else None


def statistics_file(folder: Path, family: Family) -> Path | None:
    """The first file with statistics. A merged model's config.json may still carry those of its base model."""
    for path in (folder / name for name in family.statistics):
        if path.is_file() and (path.name != CONFIG or read_json(path, JsonObject).get("norm_stats")):
            return path
    return None


def _statistics(folder: Path, family: Family) -> dict[str, DatasetStats]:
    if path := statistics_file(folder, family):
        return load_statistics(path)
    raise FileNotFoundError(
        f"{folder} has no statistics ({' or '.join(family.statistics)}), so actions cannot be un-normalised; copy the "
        "file from the training run's folder"
    )
