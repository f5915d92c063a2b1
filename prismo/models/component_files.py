"""Files of the modules beside the base model, under the names that OpenVLA-OFT and Spatial-Forcing publish.

A checkpoint folder holds `{stem}--{step}_checkpoint.pt` or `{stem}--latest_checkpoint.pt` per module. The trainer
writes them, the policy loader and a resumed run read them. The published files are state dicts of
DistributedDataParallel modules, whose keys start with `module.` (the originals cut off seven characters without
looking); only the FiLM backbone is stored without. We write the same, and read either.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from prismo.models.heads import HEADS
from prismo.util.files import atomic_write
from prismo.util.text import first_line

Step = int | Literal["latest"]

_DDP_PREFIX = "module."
_WITHOUT_PREFIX = {"vision_backbone"}


def component_path(folder: str | Path, stem: str, step: Step) -> Path:
    """Published path of one module's file."""
    return Path(folder) / f"{stem}--{step}_checkpoint.pt"


def find_component(folder: str | Path, stem: str, step: Step | None = None) -> Path:
    """The file of a module in a checkpoint folder.

    Without `step` the rule of the originals applies: exactly one `.pt` file whose name contains the stem and the word
    "checkpoint".

    Raises:
        FileNotFoundError: no such folder or file; the message lists what is there.
        ValueError: several files match.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint folder {folder} does not exist")
    if step is not None:
        path = component_path(folder, stem, step)
        found = [path] if path.is_file() else []
        wanted = path.name
    else:
        found = sorted(p for p in folder.glob("*.pt") if stem in p.name and "checkpoint" in p.name and p.name[0] != ".")
        wanted = f"{stem}--*_checkpoint.pt"
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise ValueError(f"{folder} holds several files for {stem} ({names}); keep one, or name the step to load")
    if found and not found[0].is_file():
        raise ValueError(f"{found[0]} is no file (a broken link?); copy the checkpoint again")
    if not found:
        present = ", ".join(sorted(p.name for p in folder.glob("*.pt"))) or "none"
        raise FileNotFoundError(
            f"{folder} holds no {wanted} (.pt files there: {present}). Give the folder of a finished checkpoint, "
            f"and only ask for the modules that it was trained with"
        )
    return found[0]


def has_component(folder: str | Path, stem: str) -> bool:
    """Whether a checkpoint folder holds a file for the module; raises as `find_component` does for anything else."""
    try:
        find_component(folder, stem)
    except FileNotFoundError:
        return False
    return True


def save_component(
    module: nn.Module,
    folder: str | Path,
    stem: str,
    step: Step,
    *,
    dtype: torch.dtype | None = None,
    whole: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a module's weights atomically under the published name and key style.

    Args:
        module: the module itself, or its DistributedDataParallel or torch.compile wrapper.
        dtype: convert floating-point tensors (the published action heads are bf16); None keeps them.
        whole: tensors in the place of the module's own, of which it may hold but a part.

    Returns:
        The file's path.
    """
    path = component_path(folder, stem, step)
    prefix = "" if stem in _WITHOUT_PREFIX else _DDP_PREFIX
    state = {}
    for name, value in (plain_keys(module.state_dict()) | dict(whole or {})).items():
        converted = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        # A clone: torch.save stores the whole storage of a view, which for flattened parameters is every parameter.
        state[prefix + name] = converted.detach().to("cpu", copy=True).contiguous()
    with atomic_write(path) as temporary:
        torch.save(state, temporary)
    return path


def load_component(module: nn.Module, folder: str | Path, stem: str, step: Step | None = None) -> Path:
    """Load a module's weights strictly; values are converted to the module's own dtype and device.

    Returns:
        The file that was read.

    Raises:
        FileNotFoundError, ValueError: see `find_component`.
        ValueError: the file cannot be read, or its tensors are not those of the module.
    """
    path = find_component(folder, stem, step)
    load_tensors(module, read_component(path), path)
    return path


def load_tensors(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load `state` strictly, see `check_fits`; a module that it does not fit stays as it was."""
    check_fits(module, state, path)
    module.load_state_dict(state)


def check_fits(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Whether `state` is one of the module; `path` is only named in errors.

    Raises:
        ValueError: names or shapes are not those of the module.
    """
    expected = module.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit {type(module).__name__}: missing {_some(missing)}, unexpected {_some(unexpected)}. "
            + _hint(missing, unexpected)
        )
    for name, value in expected.items():
        if state[name].shape != value.shape:
            raise ValueError(
                f"{path} does not fit {type(module).__name__}: {name} has shape {list(state[name].shape)}, expected "
                f"{list(value.shape)}. Sizes follow from the robot (action, proprio, chunk) and the base model; "
                "both must be those of the training run"
            )


def read_component(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a module file without wrapper prefixes; never unpickles anything but tensors.

    Raises:
        ValueError: truncated, not a PyTorch file, not a state dict, or an empty one.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged bytes make the unpickler stumble over anything
        raise ValueError(
            f"cannot read {path} as a file of tensors ({first_line(error)}); copy or save it again"
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{path} does not hold a state dict (a mapping from names to tensors)")
    if not state:
        raise ValueError(f"{path} holds no tensors; copy or save it again")
    return plain_keys(state)


def plain_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the prefixes of DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`)."""
    plain = dict(state)
    for prefix in (_DDP_PREFIX, "_orig_mod.", _DDP_PREFIX):  # either may wrap the other
        if plain and all(name.startswith(prefix) for name in plain):
            plain = {name.removeprefix(prefix): value for name, value in plain.items()}
    return plain


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _hint(missing: list[str], unexpected: list[str]) -> str:
    """What the difference most likely means."""
    for kind, head in HEADS.items():
        if head.mark is not None and any(name.startswith(head.mark) for name in unexpected):
            return f"The file is of {head.title}: pass --action_head {kind} (or the flags of the training run)"
    if any(name.startswith("vlm_norm.") for name in missing + unexpected):
        return "The align projector was trained with another --use_vlm_norm"
    if any(".lora_" in name for name in missing + unexpected):
        return "The LoRA rank or target modules differ from those of the training run (--lora_rank)"
    return "Build the module with the settings of the training run"
