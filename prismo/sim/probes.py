"""Does this simulator behave as the one that the training data comes from? Two probes for `prismo doctor`.

MuJoCo 3.3.3 draws LIBERO-Object's floor darker and 3.4.0 lets a bowl of LIBERO-Spatial slip; either costs 5 to 20
points of success without an error. The probes look at the effect instead of trusting a version number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prismo.sim.interface import Observation
from prismo.sim.libero import AGENT_CAMERA
from prismo.sim.libero_worker import LiberoWorker

# Mean of the agentview picture of LIBERO-Object task 0, of 255: 130 to 134 up to MuJoCo 3.3.2, 98 from 3.3.3 on.
_FLOOR_BRIGHTNESS_LIMIT = 115.0
# Horizontal distance bowl to ramekin, mm, and tilt of the bowl, degrees, in LIBERO-Spatial task 5: 14.5 and 15.9 up to
# MuJoCo 3.3.7, 37.2 and 10.5 from 3.4.0.
_BOWL_DISTANCE_LIMIT_MM = 25.0
_BOWL_TASK = ("libero_spatial", 5)
_BOWL, _RAMEKIN = "akita_black_bowl_1", "glazed_rim_porcelain_ramekin_1"


@dataclass(frozen=True)
class SettleProbe:
    """How the bowl of LIBERO-Spatial task 5 rests on its ramekin after a reset, mean over some initial states."""

    distance_mm: float
    tilt_degrees: float

    @property
    def seated(self) -> bool:
        """As in the training data."""
        return self.distance_mm < _BOWL_DISTANCE_LIMIT_MM


@dataclass(frozen=True)
class FloorProbe:
    """Brightness of LIBERO-Object's agentview picture, and the observation it was measured on."""

    brightness: float
    observation: Observation

    @property
    def bright(self) -> bool:
        """As in the training data."""
        return self.brightness > _FLOOR_BRIGHTNESS_LIMIT


def probe_settling(worker: LiberoWorker, init_states: tuple[int, ...] = (0, 24, 49)) -> SettleProbe:
    """Reset LIBERO-Spatial task 5 and measure where its bowl comes to rest. Needs LIBERO's own assets."""
    measured = []
    for index in init_states:
        worker.reset(*_BOWL_TASK, index, seed=index)
        poses = worker.object_poses()
        (bowl, (_, x, y, _)), (ramekin, _) = poses[_BOWL], poses[_RAMEKIN]
        tilt = np.degrees(np.arccos(1.0 - 2.0 * (x * x + y * y)))
        measured.append((1000.0 * np.linalg.norm((bowl - ramekin)[:2]), tilt))
    distance, tilt = np.mean(measured, axis=0)
    return SettleProbe(float(distance), float(tilt))


def probe_floor(worker: LiberoWorker) -> FloorProbe:
    """Draw LIBERO-Object task 0. Comparable only with LIBERO's own assets."""
    observation = worker.reset("libero_object", 0, 0)
    return FloorProbe(float(observation.images[AGENT_CAMERA].mean()), observation)
