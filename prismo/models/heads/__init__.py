"""Action heads by name, as `--action_head` takes them. A new one is one file beside these and one line in `HEADS`."""

from __future__ import annotations

from collections.abc import Collection

from prismo.models.heads.base import ActionHead, HeadLoss, HeadSizes, Run, Shapes, masked_mean
from prismo.models.heads.diffusion import DDIM, DiffusionActionHead, DiffusionHead
from prismo.models.heads.l1 import L1Head, L1RegressionActionHead
from prismo.models.heads.tokens import TokenHead

NO_HEAD = "discrete"
HEADS: dict[str, type[ActionHead]] = {
    "l1": L1Head,
    "diffusion": DiffusionHead,
    NO_HEAD: TokenHead,
}

__all__ = [
    "DDIM",
    "HEADS",
    "NO_HEAD",
    "ActionHead",
    "DiffusionActionHead",
    "DiffusionHead",
    "HeadLoss",
    "HeadSizes",
    "L1Head",
    "L1RegressionActionHead",
    "Run",
    "Shapes",
    "TokenHead",
    "masked_mean",
    "recognise",
]


def recognise(names: Collection[str]) -> str:
    """The head whose `action_head` file has tensors of these names; none at all are those of `NO_HEAD`.

    Raises:
        ValueError: no head's.
    """
    if not names:
        return NO_HEAD
    marked = {kind: head.mark for kind, head in HEADS.items() if head.mark is not None}
    for kind, mark in marked.items():
        if any(name.startswith(mark) for name in names):
            return kind
    known = " or ".join(f"{mark}* ({kind})" for kind, mark in marked.items())
    raise ValueError(f"an action head of an unknown kind (first tensor: {min(names)}); expected {known}")
