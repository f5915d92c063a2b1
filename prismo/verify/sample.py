"""One real LIBERO-Spatial observation, so that every machine predicts from the same input.

`sample_observation.npz` (130 kB) is the one with which OpenVLA-OFT's quick start ships
(`sample_libero_spatial_observation.pkl`), stored without pickle: main and wrist image uint8 [224, 224, 3], state
float64 [8], and the instruction.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from prismo.policies.base import PolicyInput

FILE = Path(__file__).with_name("sample_observation.npz")
VIEWS = 2


@cache
def _arrays() -> dict[str, np.ndarray]:
    with np.load(FILE) as stored:
        return dict(stored)


def instruction() -> str:
    return str(_arrays()["task_description"])


def images(count: int, *, black: bool = False) -> tuple[np.ndarray, ...]:
    """The first `count` views, uint8 [224, 224, 3]: main camera, wrist."""
    views = (_arrays()["full_image"], _arrays()["wrist_image"])[:count]
    return tuple(np.zeros_like(view) if black else view for view in views)


def observation(count: int, state: np.ndarray | None = None, *, black: bool = False) -> PolicyInput:
    """The observation for a policy of `count` cameras; `state` replaces LIBERO's."""
    return PolicyInput(images(count, black=black), _arrays()["state"] if state is None else state, instruction())
