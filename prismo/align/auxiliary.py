"""Losses beside the one of the action head, by name. A new one is one file, and one line in `AUXILIARIES`.

The objective of every model family adds them to its main loss and hands them the hidden states that they ask for.
Nothing of them is needed at inference.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

# Name, also that of the submodule of the objective -> class of an `Auxiliary`, imported when it is asked for. The
# flags of the first one switch it on, --auxiliaries all others.
AUXILIARIES = {
    "alignment": "prismo.align.spatial_forcing:SpatialForcing",
}


@dataclass(frozen=True)
class ForwardPass:
    """What an auxiliary loss sees of one forward pass of the policy.

    Attributes:
        hidden: the states that were asked for [B, S, D], by the index as asked.
        start, count: position of the first vision token in them, and how many there are: views * patches.
        images: what the policy sees, float [B, V, 3, H, W] in [0, 1].
        view_mask: False where a camera is missing [B, V]; None = all are there.
    """

    hidden: Mapping[int, Tensor]
    start: int
    count: int
    images: Tensor
    view_mask: Tensor | None


class Auxiliary(nn.Module, ABC):
    """A loss on hidden states; its parameters are what it trains beside the policy.

    Attributes:
        layers: hidden states that it asks for: 0 = input embeddings, k = output of decoder layer k, -1 = last.
    """

    layers: tuple[int, ...] = ()

    @classmethod
    @abstractmethod
    def from_flags(cls, flags: Any, hidden_size: int, device: torch.device) -> Self:
        """Build it on `device` for hidden states of a width; on "meta" only sizes are wanted.

        Args:
            flags: of the run, a `prismo.training.config.FinetuneConfig`.
        """

    @abstractmethod
    def loss(self, seen: ForwardPass, *, with_map: bool) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """The loss of one forward pass: already weighted, detached scalars for the logs, and where it is asked for a
        number for every vision token [B, V, rows, columns], for pictures.
        """

    def components(self) -> dict[str, nn.Module]:
        """Its trained modules by the stem of their files."""
        return {}


def load_auxiliaries(flags: Any, hidden_size: int, device: torch.device) -> dict[str, Auxiliary]:
    """The auxiliary losses of a run by name, see `Auxiliary.from_flags`."""
    given = [
        *(["alignment"] if flags.align_recipe else []),
        *(flags.auxiliaries.split(",") if flags.auxiliaries else []),
    ]
    kinds = {name: AUXILIARIES[name].partition(":") for name in given}
    return {
        name: getattr(importlib.import_module(module), attribute).from_flags(flags, hidden_size, device)
        for name, (module, _, attribute) in kinds.items()
    }
