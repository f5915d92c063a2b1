"""Teachers by name. A new one is one file with a loader, and one line in `TEACHERS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from prismo.align.random_teacher import random_vggt
from prismo.align.vggt import load_vggt
from prismo.util.text import did_you_mean


@runtime_checkable
class Teacher(Protocol):
    """What `SpatialForcing` needs of a teacher: an `nn.Module` (here the part of it that is used) with these.

    Attributes:
        width: channels D of a feature.
        layers: number of layers to choose from.
    """

    width: int
    layers: int
    training: bool

    def eval(self) -> Self: ...

    def to(self, *, device: torch.device) -> Self: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def features(self, images: Tensor, layer: int, view_mask: Tensor | None = None) -> Tensor:
        """Patch features of one layer.

        Args:
            images: [B, V, 3, H, W] in [0, 1], on the teacher's device. Resizing and normalising are the teacher's job.
            layer: -layers <= layer < layers.
            view_mask: boolean [B, V]; views that are False must not influence the features of the others.

        Returns:
            [B, V, h, w, D] on the teacher's own grid, without CLS or register tokens.
        """
        ...


@dataclass(frozen=True)
class TeacherSizes:
    """What a run must know of a teacher before it is loaded.

    Attributes:
        width, layers: see `Teacher`.
        parameters: how many weights.
    """

    width: int
    layers: int
    parameters: int


@dataclass(frozen=True)
class TeacherKind:
    """A teacher before it is loaded.

    Attributes:
        load: (path, dtype=, device=, compile=) -> the frozen teacher, see `load_teacher`. On the device "meta" only
            sizes are wanted, so a loader does well not to read weights for it.
        title: what it is, for model cards.
        license: of its weights, as the hub calls it; None = they are nobody's.
        sizes: None = those of what `load` builds on the device "meta", as they depend on the file.
    """

    load: Callable[..., Teacher]
    title: str
    license: str | None
    sizes: TeacherSizes | None = None


TEACHERS = {
    "vggt": TeacherKind(load_vggt, "VGGT (arXiv 2503.11651)", "cc-by-nc-4.0"),
    "random": TeacherKind(random_vggt, "VGGT with random weights, the untrained control", None),
}


def load_teacher(
    name: str,
    path: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    compile: bool = False,
) -> Teacher:
    """Build a teacher by name.

    Args:
        name: a key of `TEACHERS`: "vggt", or "random" for the untrained control arm.
        path: the weights file ("random" takes only sizes from it, and VGGT-1B's where there is none).
        dtype: of the weights, torch.float32 or torch.bfloat16.
        device: where to put them.
        compile: use torch.compile: faster steps after a slow first one.

    Raises:
        ValueError: no such teacher, or bad weights.
        FileNotFoundError: no such file.
    """
    if name not in TEACHERS:
        raise ValueError(did_you_mean("teacher", name, TEACHERS))
    return TEACHERS[name].load(path, dtype=dtype, device=device, compile=compile)


def teacher_sizes(name: str, path: str | Path | None = None) -> TeacherSizes:
    """The sizes of a teacher; nothing stays in memory. Raises as `load_teacher` does."""
    if name in TEACHERS and (known := TEACHERS[name].sizes):
        return known
    teacher = load_teacher(name, path, device="meta")
    return TeacherSizes(teacher.width, teacher.layers, sum(parameter.numel() for parameter in teacher.parameters()))
