"""Action errors in millimetres and degrees, next to the normalised L1 that is trained.

Shape legend: B batch, K actions per chunk, A numbers per action.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prismo.data.normalize import DatasetStats, unnormalize
from prismo.embodiment import Embodiment


@dataclass(frozen=True)
class ActionUnits:
    """What an un-normalised action of 1.0 means, for actions that begin with a translation and a rotation.

    Attributes:
        metres: of the first three numbers.
        radians: of the next three.
    """

    metres: float
    radians: float


# LIBERO's actions are inputs of robosuite's OSC_POSE controller, which scales -1..1 to +-0.05 m and +-0.5 rad per
# control step (output_max in robosuite/controllers/config/osc_pose.json). Bridge stores metres and radians.
UNITS = {"libero": ActionUnits(0.05, 0.5), "bridge": ActionUnits(1.0, 1.0)}


class ActionErrors:
    """Errors of predicted chunks.

    Args:
        statistics: of every dataset in the batches.
        robot: whose actions they are; millimetres and degrees only for the robots of `UNITS`.
        device: of the actions.
    """

    def __init__(self, statistics: Mapping[str, DatasetStats], robot: Embodiment, device: torch.device) -> None:
        self.robot = robot
        self._width = {name: _range_of(stats, robot).to(device) for name, stats in statistics.items()}

    def __call__(
        self, predicted: Tensor, target: Tensor, datasets: Sequence[str], mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Mean errors of normalised chunks [B, K, A] over the actions that are real (`mask` [B, K]).

        Returns:
            `position_error_mm`: length of the translation's error; `rotation_error_deg`: angle of the rotation's error
            (the difference of the two rotation vectors, exact to first order; both are small per step).
        """
        units = UNITS.get(self.robot.name)
        if units is None:
            return {}
        width = torch.stack([self._width[name] for name in datasets])[:, None]
        error = (predicted.float() - target.float()) * width
        weight = torch.ones_like(error[..., 0]) if mask is None else mask.float()
        total = weight.sum().clamp(min=1)
        return {
            "position_error_mm": (error[..., :3].norm(dim=-1) * weight).sum() / total * units.metres * 1e3,
            "rotation_error_deg": (error[..., 3:6].norm(dim=-1) * weight).sum() / total * units.radians * 180 / math.pi,
        }


def _range_of(stats: DatasetStats, robot: Embodiment) -> Tensor:
    """Un-normalised difference [A] that a normalised difference of 1 stands for (un-normalising is affine)."""
    low, high = (
        unnormalize(np.full(robot.action_dim, value), stats.action, robot.normalization) for value in (0.0, 1.0)
    )
    return torch.from_numpy(high - low).float()
