"""The training objective: one module that holds every trainable part and whose forward returns the loss.

One module, because only what runs inside the wrapped module's forward has its gradients reduced between GPUs: the
original called its action head around DDP, so that every GPU trained a head of its own (openvla-oft issue 160).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from prismo.align.auxiliary import Auxiliary, ForwardPass
from prismo.models.heads import HeadLoss

V = TypeVar("V", bound=nn.Module)


@dataclass(frozen=True)
class Losses:
    """What one forward pass gives.

    Attributes:
        total: main loss + auxiliary losses; the one to differentiate.
        metrics: detached scalars under the original's names (`loss` is the main loss, of the actions).
        actions: predicted normalised actions [B, K, A]; None for heads that need more than this pass.
        align_map: a number for every vision token [B, V, rows, columns] of an auxiliary loss, where it was asked for.
    """

    total: Tensor
    metrics: dict[str, Tensor]
    actions: Tensor | None = None
    align_map: Tensor | None = None


class Objective(nn.Module, ABC, Generic[V]):
    """A main loss plus auxiliary ones (for Spatial Forcing arXiv 2510.12276, equation 5).

    Args:
        vla: the model, frozen where it is not trained.
        modules: what is trained beside it, by the stems of their files; they become submodules of these names.
        auxiliaries: by name, under which they become submodules.
    """

    def __init__(self, vla: V, modules: Mapping[str, nn.Module], auxiliaries: Mapping[str, Auxiliary] | None) -> None:
        super().__init__()
        self.vla: V = vla
        self._modules_beside, self.auxiliaries = dict(modules), dict(auxiliaries or {})
        for name, module in {**self._modules_beside, **self.auxiliaries}.items():
            self.add_module(name, module)

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """The hidden states that the auxiliary losses ask for."""
        return tuple(layer for auxiliary in self.auxiliaries.values() for layer in auxiliary.layers)

    def components(self) -> dict[str, nn.Module]:
        """What is trained beside the model, by the stem of its file."""
        parts = dict(self._modules_beside)
        for auxiliary in self.auxiliaries.values():
            parts |= auxiliary.components()
        return parts

    @abstractmethod
    def main_loss(self, batch: Any) -> tuple[HeadLoss, ForwardPass]:
        """The loss of the actions, and what auxiliary losses see of the pass."""

    def forward(self, batch: Any, *, with_map: bool = False) -> Losses:
        """Loss of a micro-batch; see `Losses`."""
        main, seen = self.main_loss(batch)
        total, metrics, align_map = main.loss, main.metrics | {"loss": main.loss.detach()}, None
        for auxiliary in self.auxiliaries.values():
            loss, values, picture = auxiliary.loss(seen, with_map=with_map)
            total, metrics = total + loss, metrics | values
            align_map = align_map if picture is None else picture
        return Losses(total, metrics, main.actions, align_map)
