"""Does this simulator behave as the one that the training data comes from? Two probes for `prismo doctor`.

MuJoCo 3.3.3 draws LIBERO-Object's floor darker and 3.4.0 lets a bowl of LIBERO-Spatial slip; either costs 5 to 20
points of success without an error. The probes look at the effect instead of trusting a version number.
"""

from __future__ import annotations

import numpy as np

from prismo.sim.interface import Observation
from prismo.sim.libero import AGENT_CAMERA
from prismo.sim.libero_worker import LiberoWorker

# Mean of the agentview picture of LIBERO-Object task 0, of 255: 130 to 134 up to MuJoCo 3.3.2, 98 from 3.3.3 on.
DARK_FLOOR = 115.0
# Horizontal distance bowl to ramekin, mm, and tilt of the bowl, degrees, in LIBERO-Spatial task 5: 14.5 and 15.9 up to
# MuJoCo 3.3.7, 37.2 and 10.5 from 3.4.0.
BOWL_OFF_MM = 25.0
_BOWL_TASK = ("libero_spatial", 5)
_BOWL, _RAMEKIN = "akita_black_bowl_1", "glazed_rim_porcelain_ramekin_1"


def probe_settling(worker: LiberoWorker, init_states: tuple[int, ...] = (0, 24, 49)) -> tuple[float, float]:
    """How the bowl of LIBERO-Spatial task 5 rests on its ramekin after a reset, mean over some initial states.

    Returns:
        Distance in mm, below `BOWL_OFF_MM` as in the training data, and tilt in degrees. Needs LIBERO's own assets.
    """
    measured = []
    for index in init_states:
        worker.reset(*_BOWL_TASK, index, seed=index)
        poses = worker.object_poses()
        (bowl, (_, x, y, _)), (ramekin, _) = poses[_BOWL], poses[_RAMEKIN]
        tilt = np.degrees(np.arccos(1.0 - 2.0 * (x * x + y * y)))
        measured.append((1000.0 * np.linalg.norm((bowl - ramekin)[:2]), tilt))
    distance, tilt = np.mean(measured, axis=0)
    return float(distance), float(tilt)


def probe_floor(worker: LiberoWorker) -> tuple[float, Observation]:
    """Draw LIBERO-Object task 0.

    Returns:
        Brightness of the agentview picture, above `DARK_FLOOR` as in the training data (comparable only with LIBERO's
        own assets), and the observation it was measured on.
    """
    observation = worker.reset("libero_object", 0, 0)
    return float(observation.images[AGENT_CAMERA].mean()), observation
