"""The trainer state of a checkpoint: everything that makes a resumed run go on bit for bit.

    trainer_state/weights.safetensors      what is trained, fp32
    trainer_state/optimizer.safetensors    AdamW's moments and update counts
    trainer_state/state.json               update number, position in the data, number of processes, base model

Tensors are stored whole, also those of a run that shards them, so a run may go on with another number of processes.

Learning rate, dropout and diffusion noise are pure functions of seed, update and process (`Schedule`, `seed_noise`), so
no scheduler or generator has to be stored for any rank. With another number of processes the position in the data stays
exact; dropout and diffusion noise are then other draws.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import prismo
from prismo.embodiment import Embodiment
from prismo.training.config import FinetuneConfig
from prismo.training.run_folder import STATE_FILE, STATE_FOLDER, TRAINING_CONFIG
from prismo.training.sharding import local, scatter, whole
from prismo.training.step import TrainStep
from prismo.util.files import write_json
from prismo.util.git import git_commit
from prismo.util.schema import JsonObject, read_json

_FORMAT = 1
_WEIGHTS, _OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
_PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy")
# Flags that decide what the stored tensors mean or which sample comes next; a resumed run must agree on them.
_FIXED = (
    "use_l1_regression", "use_diffusion", "num_diffusion_steps_train", "use_film", "film_exclude_padding",
    "num_images_in_input", "use_proprio", "use_lora", "lora_rank", "lora_alpha", "dataset_name", "seed", "use_tail",
    "use_val_set", "val_fraction", "freeze_llm_embed", "freeze_vision_tower", "adapt_emb", "adpt_feature", "min_sigma",
    "intrinsics",
)  # fmt: skip
# Flags that may change, after which the run is another one than the uninterrupted.
_CHANGES_NUMBERS = (
    "learning_rate", "lr_warmup_steps", "num_steps_before_decay", "scheduler", "max_steps", "batch_size",
    "grad_accumulation_steps", "max_grad_norm", "weight_decay", "lora_dropout", "image_aug", "dtype", "vggt_dtype",
    "compile", "compile_vggt",
)  # fmt: skip


@dataclass(frozen=True)
class TrainerState:
    """Content of state.json.

    Attributes:
        step: updates done.
        data: `prismo.data.loader.Loader.state_dict`.
        world_size: processes of the run.
        base_fingerprint: of the base weights (`prismo.models.weight_files.fingerprint`).
    """

    step: int
    data: dict[str, int]
    world_size: int
    base_fingerprint: str


@dataclass(frozen=True)
class WholeState:
    """What is trained and AdamW's state, whole and on the CPU of the main process; empty on the others."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def gather_state(step: TrainStep) -> WholeState:
    """Collect the state of a step, which may be spread over all processes. All of them must call it."""
    optimizer = step.optimizer

    def keep(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        # One by one, so that a GPU never holds more than one whole tensor beside its own parts.
        return {n: value.detach().to("cpu", copy=True).contiguous() for n, value in tensors if step.world.is_main}

    named = zip(optimizer.names, optimizer.parameters, strict=True)
    weights = keep((name, whole(parameter.detach())) for name, parameter in named)
    return WholeState(weights, keep(optimizer.whole_state()))


def save_state(checkpoint: Path, gathered: WholeState, state: TrainerState) -> None:
    """Write `trainer_state/` into a checkpoint folder that is being prepared."""
    folder = checkpoint / STATE_FOLDER
    folder.mkdir()
    save_file(gathered.weights, folder / _WEIGHTS)
    save_file(gathered.optimizer, folder / _OPTIMIZER)
    write_json(folder / STATE_FILE, {"format": _FORMAT, **dataclasses.asdict(state)})


def read_state(checkpoint: Path) -> TrainerState:
    """The small part of a trainer state."""
    path = checkpoint / STATE_FOLDER / STATE_FILE
    content = read_json(path, JsonObject)
    if content.pop("format", None) != _FORMAT:
        raise ValueError(f"{path} is of another version of this project; resume with that version")
    return TrainerState(**content)


def load_state(checkpoint: Path, step: TrainStep) -> None:
    """Restore weights and optimizer of `step` in place.

    Raises:
        ValueError: the files are damaged, or belong to a run with other trained parts.
    """
    folder = checkpoint / STATE_FOLDER
    weights = dict(zip(step.optimizer.names, step.optimizer.parameters, strict=True))
    stored = _read(folder / _WEIGHTS)
    if different := sorted(stored.keys() ^ weights.keys()):
        raise ValueError(
            f"{folder} does not fit this run: {different[0]} and {len(different) - 1} more weights are trained only in "
            "one of the two; resume with the flags of the first start"
        )
    for name, parameter in weights.items():
        if stored.shape(name) != tuple(parameter.shape):
            raise ValueError(f"{folder}: {name} is {stored.shape(name)}, this run has {tuple(parameter.shape)}")
        local(parameter.detach()).copy_(scatter(stored[name], parameter))
    step.optimizer.load_state(_read(folder / _OPTIMIZER))


def write_training_config(
    checkpoint: Path, config: FinetuneConfig, robot: Embodiment, world_size: int, precision: torch.dtype
) -> None:
    """Write `training_config.json`: every flag, what followed from them, and the versions that ran."""
    flags = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    content = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    recipe = config.align_recipe
    content |= {
        "robot": robot.name,
        "action_dim": robot.action_dim,
        "proprio_dim": robot.proprio_dim,
        "chunk": robot.chunk,
        "attention": "bidirectional",
        "align_recipe": None if recipe is None else dataclasses.asdict(recipe),
        "world_size": world_size,
        "precision": str(precision).removeprefix("torch."),
        "versions": _versions(),
    }
    write_json(checkpoint / TRAINING_CONFIG, content)


def check_same_run(checkpoint: Path, config: FinetuneConfig) -> list[str]:
    """Compare the flags of a run that is resumed with those that its checkpoint was made with.

    Returns:
        Harmless changes ("batch_size 8 -> 4"); after them the run is valid but not the uninterrupted one.

    Raises:
        ValueError: a flag differs that the stored state depends on.
    """
    path = checkpoint / TRAINING_CONFIG
    before = read_json(path, JsonObject)
    recipe = config.align_recipe
    now = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    now |= {"align_recipe": None if recipe is None else dataclasses.asdict(recipe)}
    changed = {
        name: (before[name], str(value) if isinstance(value, Path) else value)
        for name, value in now.items()
        if name in before and before[name] != (str(value) if isinstance(value, Path) else value)
    }
    fatal = [f"--{name} {old} -> {new}" for name, (old, new) in changed.items() if name in (*_FIXED, "align_recipe")]
    if fatal:
        raise ValueError(f"--resume True with other flags than {path}: {'; '.join(fatal)}. Resume with the old values")
    if config.scheduler == "MultiStepLR":
        changed.pop("max_steps", None)  # the others stretch to it
    return [f"{name} {old} -> {new}" for name, (old, new) in changed.items() if name in _CHANGES_NUMBERS]


class _Stored(Mapping[str, Tensor]):
    """Tensors of a file, each read when it is asked for: every process of a machine reads the whole state."""

    def __init__(self, file: safe_open) -> None:
        self._file, self._names = file, list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())


def _read(path: Path) -> _Stored:
    try:
        return _Stored(safe_open(path, framework="pt"))
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} is missing or broken ({error}); resume from another checkpoint") from error


def _versions() -> dict[str, str | None]:
    """What trained: packages, commit, Python, GPU."""
    versions: dict[str, str | None] = {"prismo": prismo.__version__, "git": git_commit()}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return versions | {"python": platform.python_version(), "cuda": torch.version.cuda, "gpu": gpu}
