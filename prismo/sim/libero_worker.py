"""`LiberoWorker`: the simulator process of LIBERO, for evaluation, the scripted expert and the regeneration of data."""

from __future__ import annotations

from typing import Any

import numpy as np

from prismo.sim.assets import Assets, resolve_assets
from prismo.sim.gl import GLBackend, choose_backend
from prismo.sim.libero import ACTION_DIM
from prismo.sim.worker import SimWorker


class LiberoWorker(SimWorker):
    """A LIBERO simulator; see `SimWorker`.

    Args:
        assets: default: `prismo.sim.assets.resolve_assets()`.
        cameras: False for a simulator that draws nothing (no OpenGL needed, faster, less memory).
        image_size: height and width of the pictures.
        cuda_device: draw on the GPU of this machine-wide CUDA ordinal (`prismo.sim.gl.physical_cuda_index`).
    """

    def __init__(
        self,
        assets: Assets | None = None,
        *,
        cameras: bool = True,
        image_size: int = 256,
        cuda_device: int | None = None,
    ) -> None:
        self.assets = assets or resolve_assets()
        self.backend: GLBackend | None = choose_backend(cuda_device) if cameras else None  # how pictures are drawn
        options: dict[str, Any] = {"assets": self.assets, "backend": self.backend, "image_size": image_size}
        super().__init__("prismo.sim.libero_server", options, action_dim=ACTION_DIM)

    def object_poses(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Position (m) and quaternion (w, x, y, z) of every movable object of the running episode, by name."""
        poses = self._call("object_poses", self.step_timeout)
        return {name: (position, quaternion) for name, (position, quaternion) in poses.items()}

    def sim_state(self) -> np.ndarray:
        """Time, positions and velocities of the running episode, as an initial state holds them."""
        return self._call("sim_state", self.step_timeout)
