"""The trainer state of a checkpoint: everything of a run, restored exactly.

    trainer_state/weights.safetensors      what is trained, fp32
    trainer_state/optimizer.safetensors    AdamW's moments and update counts
    trainer_state/state.json               update number, position in the data, number of processes, base model

Tensors are stored whole, also those of a run that shards them, so a run may go on with another number of processes.

Learning rate, dropout and diffusion noise are pure functions of seed, update and process (`Schedule`, `seed_noise`), so
no scheduler or generator has to be stored for any rank. With another number of processes the position in the data stays
exact; dropout and diffusion noise are then other draws. On a CPU a resumed run therefore equals the uninterrupted one
bit for bit; on GPUs as far as their kernels repeat themselves, which the backward pass of attention does not.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import prismo
from prismo.align import TEACHERS, AlignRecipe
from prismo.embodiment import Embodiment
from prismo.models.folder import TRAINING_CONFIG
from prismo.training.config import FinetuneConfig
from prismo.training.run_folder import STATE_FILE, STATE_FOLDER
from prismo.training.sharding import local, scatter, whole
from prismo.training.step import TrainStep
from prismo.util.files import write_json
from prismo.util.git import git_commit
from prismo.util.schema import JsonObject, read_json

_FORMAT = 1
_ADVICE = "restore it or resume from another checkpoint"
_WEIGHTS, _OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
_PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy")
# Flags that decide what the stored tensors mean or which sample comes next; a resumed run must agree on them.
_FIXED = (
    "use_l1_regression", "use_diffusion", "action_head", "num_diffusion_steps_train", "use_film",
    "film_exclude_padding", "num_images_in_input", "use_proprio", "use_lora", "lora_rank", "lora_alpha",
    "dataset_name", "seed", "use_tail", "use_val_set", "val_fraction", "freeze_llm_embed", "freeze_vision_tower",
    "adapt_emb", "adpt_feature", "min_sigma", "intrinsics", "teacher", "auxiliaries",
)  # fmt: skip
# Flags that may change, after which the run is another one than the uninterrupted.
_CHANGES_NUMBERS = (
    "learning_rate", "lr_warmup_steps", "num_steps_before_decay", "scheduler", "max_steps", "batch_size",
    "grad_accumulation_steps", "max_grad_norm", "weight_decay", "lora_dropout", "image_aug", "dtype", "vggt_dtype",
    "compile", "compile_vggt",
)  # fmt: skip


@dataclass(frozen=True)
class DataPosition:
    """`prismo.data.loader.Loader.state_dict`."""

    epoch: Annotated[int, Ge(0), Lt(2**31)]
    sample: Annotated[int, Ge(0), Lt(2**53)]


@dataclass(frozen=True)
class TrainerState:
    """Content of state.json.

    Attributes:
        step: updates done.
        data: position in the data.
        world_size: processes of the run.
        base_fingerprint: of the base weights (`prismo.models.weight_files.fingerprint`).
    """

    step: Annotated[int, Ge(1)]
    data: DataPosition
    world_size: Annotated[int, Ge(1)]
    base_fingerprint: str


@dataclass(frozen=True)
class _Version:
    """What a state.json of any version has."""

    format: int


@dataclass(frozen=True)
class _Started:
    """What is looked at of a training_config.json beside the flags of the same names."""

    vla_path: str
    align_recipe: dict[str, Any] | None


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
    if read_json(path, _Version, advice=_ADVICE).format != _FORMAT:
        raise ValueError(f"{path} is of another version of this project; resume with that version")
    return read_json(path, TrainerState, advice=_ADVICE)


def base_of(checkpoint: Path) -> str:
    """The `vla_path` that a checkpoint of ours was trained from."""
    return read_json(checkpoint / TRAINING_CONFIG, _Started, advice=_ADVICE).vla_path


def check_state(checkpoint: Path) -> TrainerState:
    """Look at everything of a trainer state that shows without a model; returns the small part.

    Raises:
        ValueError: a file is damaged, or weights and optimizer do not belong together.
    """
    folder = checkpoint / STATE_FOLDER
    weights, moments, state = _read(folder / _WEIGHTS), _read(folder / _OPTIMIZER), read_state(checkpoint)
    shapes = {name: weights.kind(name)[1] for name in weights}
    _check_tensors(weights, shapes)
    _check_tensors(moments, _moments(shapes))
    for name in shapes:
        if not 1 <= (count := moments[f"step.{name}"].item()) <= state.step:
            raise ValueError(f"{moments.path}: {name} was updated {count:g} times in {state.step} updates; {_ADVICE}")
    return state


def load_state(checkpoint: Path, step: TrainStep) -> None:
    """Restore weights and optimizer of `step` in place.

    Raises:
        ValueError: the files are damaged, or belong to a run with other trained parts.
    """
    folder = checkpoint / STATE_FOLDER
    parameters = dict(zip(step.optimizer.names, step.optimizer.parameters, strict=True))
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    weights, moments = _read(folder / _WEIGHTS), _read(folder / _OPTIMIZER)
    _check_tensors(weights, shapes)
    _check_tensors(moments, _moments(shapes))
    for stored in (weights, moments):
        _check_finite(stored)
    for name, parameter in parameters.items():
        local(parameter.detach()).copy_(scatter(weights[name], parameter))
    step.optimizer.load_state(moments)


def write_training_config(
    checkpoint: Path, config: FinetuneConfig, robot: Embodiment, world_size: int, precision: torch.dtype
) -> None:
    """Write `training_config.json`: every flag, what followed from them, and the versions that ran."""
    flags = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    content = {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}
    recipe = config.align_recipe
    content |= {
        "robot": robot.name,
        "embodiment": dataclasses.asdict(robot),
        "action_dim": robot.action_dim,
        "proprio_dim": robot.proprio_dim,
        "chunk": robot.chunk,
        "attention": "bidirectional",
        "align_recipe": None if recipe is None else dataclasses.asdict(recipe),
        "teacher_license": None if recipe is None else TEACHERS[flags["teacher"]].license,
        "world_size": world_size,
        "precision": str(precision).removeprefix("torch."),
        "versions": _versions(),
    }
    write_json(checkpoint / TRAINING_CONFIG, content)


def check_same_run(checkpoint: Path, config: FinetuneConfig) -> list[str]:
    """Compare the flags of a run that is resumed with those that its checkpoint was made with.

    Returns:
        Harmless changes ("--batch_size 8 -> 4"); after them the run is valid but not the uninterrupted one.

    Raises:
        ValueError: a flag differs that the stored state depends on.
    """
    path = checkpoint / TRAINING_CONFIG
    before = read_json(path, JsonObject, advice=_ADVICE)
    recipe = read_json(path, _Started, advice=_ADVICE).align_recipe
    changed = {}
    for field in dataclasses.fields(config):
        now = getattr(config, field.name)
        now = str(now) if isinstance(now, Path) else now
        if (old := before.get(field.name, field.default)) != now:
            changed[field.name] = (old, now)
    fatal = [f"--{name} {old} -> {new}" for name, (old, new) in changed.items() if name in _FIXED]
    fatal += _other_alignment(recipe, config.align_recipe)
    if fatal:
        raise ValueError(f"--resume True with other flags than {path}: {'; '.join(fatal)}. Resume with the old values")
    if config.scheduler == "MultiStepLR":
        changed.pop("max_steps", None)  # the others stretch to it
    return [f"--{name} {old} -> {new}" for name, (old, new) in changed.items() if name in _CHANGES_NUMBERS]


def _other_alignment(before: Mapping[str, Any] | None, now: AlignRecipe | None) -> list[str]:
    """Flags of the alignment that differ; none at all is coefficient 0."""
    if before is None or now is None:
        old = before.get("align_loss_coeff") if before else 0
        new = now.align_loss_coeff if now else 0
        return [] if old == new else [f"--align_loss_coeff {old} -> {new}"]
    return [f"--{name} {before.get(name)} -> {new}" for name, new in vars(now).items() if before.get(name) != new]


class _Stored(Mapping[str, Tensor]):
    """Tensors of a file, each read when it is asked for: every process of a machine reads the whole state."""

    def __init__(self, path: Path, file: safe_open) -> None:
        self.path, self._file, self._names = path, file, dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type and shape, from the header."""
        stored = self._file.get_slice(name)
        return stored.get_dtype(), tuple(stored.get_shape())


def _read(path: Path) -> _Stored:
    try:
        return _Stored(path, safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing or broken ({error}); {_ADVICE}") from error


def _moments(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of AdamW's state for weights of these shapes (`GuardedAdamW.whole_state`)."""
    moments = {f"{kind}.{name}": shape for kind in ("exp_avg", "exp_avg_sq") for name, shape in shapes.items()}
    return moments | {f"step.{name}": () for name in shapes}


def _check_tensors(stored: _Stored, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Names, types and shapes; the fused optimizer takes whatever it gets, and crashes."""
    if different := sorted(stored.keys() ^ expected.keys()):
        one = different[0]
        more = f", and {len(different) - 1} more differ" if len(different) > 1 else ""
        raise ValueError(
            f"{stored.path} does not fit: {one} is {'unknown' if one in stored else 'missing'}{more}. Resume with the "
            f"flags of the first start; else {_ADVICE}"
        )
    for name, shape in expected.items():
        found = stored.kind(name)
        if found != ("F32", shape):
            raise ValueError(
                f"{stored.path} does not fit: {name} is {found[0]} {list(found[1])}, expected F32 {list(shape)}. "
                f"Resume with the flags of the first start; else {_ADVICE}"
            )


def _check_finite(stored: _Stored) -> None:
    """The trainer never saves such numbers, and one of them in a moment stops its weight for good."""
    for name, value in stored.items():
        if not value.isfinite().all():
            raise ValueError(f"{stored.path}: {name} is not finite; {_ADVICE}")


def _versions() -> dict[str, str | None]:
    """What trained: packages, commit, Python, GPU."""
    versions: dict[str, str | None] = {"prismo": prismo.__version__, "git": git_commit()}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return versions | {"python": platform.python_version(), "cuda": torch.version.cuda, "gpu": gpu}
