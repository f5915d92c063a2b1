"""SpatialVLA's action grid: a 7-number action <-> three token offsets (translation, rotation, gripper).

Translation is cut in spherical coordinates (theta, phi, r), rotation in roll, pitch, yaw, the gripper in two. The bins
of a variable hold equal probability under a truncated Gaussian, so they are narrow where data is dense. The processor
encodes training targets and decodes predictions with it; `rediscretize.py` moves a model to other bins.

Shape legend: ... any leading shape, K actions of a chunk, E edges (bins + 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Annotated

import numpy as np
from annotated_types import Ge
from pydantic import FiniteFloat

from prismo.util.files import write_json
from prismo.util.schema import read_json

VARIABLES = ("theta", "phi", "r", "roll", "pitch", "yaw")
RANGES = {
    "theta": (0.0, math.pi),
    "phi": (-math.pi, math.pi),
    "r": (0.0, math.sqrt(3)),
    "roll": (-1.0, 1.0),
    "pitch": (-1.0, 1.0),
    "yaw": (-1.0, 1.0),
}
BINS = {"theta": 16, "phi": 32, "r": 8, "roll": 16, "pitch": 16, "yaw": 16}
TOKENS_PER_ACTION = 3
# What the first two tokens of an action hold; the third is the gripper's.
GROUPS = {"translation": ("theta", "phi", "r"), "rotation": ("roll", "pitch", "yaw")}


@dataclass(frozen=True)
class Gaussian:
    """Mean and standard deviation of one variable of normalised actions."""

    mu: FiniteFloat
    sigma: Annotated[FiniteFloat, Ge(0)]


# Of the published bins. (The authors' `gs_spatialvla_plus.json` holds other numbers, which do not reproduce them.)
OFFICIAL_GAUSSIANS = {
    "theta": Gaussian(1.8764125, 0.77966985),
    "phi": Gaussian(0.11370731, 1.67700516),
    "r": Gaussian(0.53880893, 0.5),
    "roll": Gaussian(-0.02783168, 0.5),
    "pitch": Gaussian(0.02445202, 0.5),
    "yaw": Gaussian(0.00545068, 0.5),
}


@dataclass(frozen=True, eq=False)
class ActionTokenizer:
    """Bin edges of the six variables and the codes made from them.

    Offsets count within the action block of the vocabulary: translation theta_i * 256 + phi_i * 8 + r_i (with the
    published 16 x 32 x 8 bins), then rotation roll_i * 256 + pitch_i * 16 + yaw_i, then closed, open.
    Token id = `action_token_begin_idx` + offset.

    Attributes:
        edges: variable -> float64 [E], increasing from the lower to the upper end of its range.
    """

    edges: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        for name in VARIABLES:
            steps = np.diff(self.edges[name])
            if not len(steps) or not (steps > 0).all():
                raise ValueError(
                    f"the edges of {name!r} must increase strictly; a spread this small leaves empty bins, "
                    "raise min_sigma (the authors use 0.5)"
                )

    # ------------------------------------------------------------------ construction

    @classmethod
    def from_gaussians(
        cls, gaussians: Mapping[str, Gaussian], min_sigma: float = 0.0, bins: Mapping[str, int] = BINS
    ) -> ActionTokenizer:
        """Equal-probability bins of Gaussians cut to the variables' ranges; no sigma is smaller than `min_sigma`."""
        missing = [name for name in VARIABLES if name not in gaussians]
        if missing:
            raise ValueError(f"Gaussian statistics lack {', '.join(missing)}; expected {', '.join(VARIABLES)}")
        return cls({name: _gaussian_edges(name, gaussians[name], min_sigma, bins[name]) for name in VARIABLES})

    @classmethod
    def uniform(cls, bins: Mapping[str, int] = BINS) -> ActionTokenizer:
        """Bins of equal width (the authors' ablation)."""
        return cls({name: np.linspace(*RANGES[name], bins[name] + 1) for name in VARIABLES})

    @classmethod
    def from_bin_policy(cls, policy: Mapping[str, Mapping[str, list[float]]]) -> ActionTokenizer:
        """The `bin_policy` of a checkpoint's processor_config.json, which decides over any stored Gaussians."""
        try:
            edges = {n: np.array(policy[group][f"{n}_bins"], np.float64) for group in GROUPS for n in GROUPS[group]}
        except KeyError as error:
            raise ValueError(f"bin_policy lacks {error}; expected translation and rotation with *_bins") from None
        # Stored ends are off by an ulp here and there (r starts at 2e-16): zero must stay inside.
        for name, values in edges.items():
            values[[0, -1]] = RANGES[name]
        return cls(edges)

    def bin_policy(self) -> dict[str, dict[str, list[float]]]:
        """The edges in the layout of processor_config.json."""
        return {group: {f"{n}_bins": self.edges[n].tolist() for n in names} for group, names in GROUPS.items()}

    # ------------------------------------------------------------------ sizes

    @property
    def bins(self) -> dict[str, int]:
        return {name: len(self.edges[name]) - 1 for name in VARIABLES}

    def shape(self, group: str) -> tuple[int, ...]:
        """Bins of the three variables of "translation" or "rotation"."""
        return tuple(self.bins[name] for name in GROUPS[group])

    @property
    def slots(self) -> tuple[slice, slice, slice]:
        """Valid offsets of the three tokens of an action."""
        translation, rotation = (math.prod(self.shape(group)) for group in GROUPS)
        end = translation + rotation
        return slice(0, translation), slice(translation, end), slice(end, end + 2)

    @property
    def size(self) -> int:
        """Number of action tokens (8194 with the published bins)."""
        return self.slots[-1].stop

    def centers(self, name: str) -> np.ndarray:
        """Middle of every bin of a variable: what its token decodes to."""
        return (self.edges[name][:-1] + self.edges[name][1:]) / 2

    # ------------------------------------------------------------------ codes

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Offsets int64 [..., 3] of normalised actions [..., 7] (xyz, roll, pitch, yaw in -1..1, gripper 1 = open)."""
        actions = np.clip(np.asarray(actions, np.float64), -1, 1)
        values = (*to_spherical(actions[..., :3]), *np.moveaxis(actions[..., 3:6], -1, 0))
        # Only interior edges count, so values at or beyond an end fall into the outermost bins.
        index = {name: np.digitize(v, self.edges[name][1:-1]) for name, v in zip(VARIABLES, values, strict=True)}
        codes = [np.ravel_multi_index([index[n] for n in names], self.shape(g)) for g, names in GROUPS.items()]
        gripper = (actions[..., 6] >= 0.5).astype(np.int64)
        return np.stack((*codes, gripper), axis=-1).astype(np.int64) + [slot.start for slot in self.slots]

    def decode(self, offsets: np.ndarray) -> np.ndarray:
        """Normalised actions float64 [..., 7] of offsets [..., 3]: bin centres, xyz cut to -1..1, gripper 0 or 1.

        An offset outside its slot is moved to the nearest valid one, as in the official code. (Constrained decoding
        never produces one.)
        """
        offsets = np.asarray(offsets)
        valid = [np.clip(offsets[..., i], s.start, s.stop - 1) - s.start for i, s in enumerate(self.slots)]
        (theta, phi, r), rotation = (
            [self.centers(n)[i] for n, i in zip(names, np.unravel_index(code, self.shape(group)), strict=True)]
            for code, (group, names) in zip(valid[:2], GROUPS.items(), strict=True)
        )
        xyz = (r * np.sin(theta) * np.cos(phi), r * np.sin(theta) * np.sin(phi), r * np.cos(theta))
        return np.stack((*(np.clip(x, -1, 1) for x in xyz), *rotation, valid[2].astype(np.float64)), axis=-1)


def to_spherical(xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """theta (0..pi, from +z), phi (-pi..pi, from +x) and r of vectors [..., 3]."""
    x, y, z = np.moveaxis(np.asarray(xyz, np.float64), -1, 0)
    return np.arctan2(np.hypot(x, y), z), np.arctan2(y, x), np.sqrt(x * x + y * y + z * z)


def _gaussian_edges(name: str, gaussian: Gaussian, min_sigma: float, bins: int) -> np.ndarray:
    low, high = RANGES[name]
    sigma = max(gaussian.sigma, min_sigma)
    if not (math.isfinite(gaussian.mu) and sigma > 0):
        raise ValueError(
            f"{name!r} has mu {gaussian.mu} and sigma {sigma}; expected a finite mean and a spread above 0"
        )
    normal = NormalDist(gaussian.mu, sigma)
    quantiles = np.linspace(normal.cdf(low), normal.cdf(high), bins + 1)[1:-1]
    inner = [normal.inv_cdf(q) if 0 < q < 1 else (low if q <= 0 else high) for q in quantiles]
    return np.array([low, *np.clip(inner, low, high), high])


# ---------------------------------------------------------------------- Gaussian statistics of a dataset


def fit_gaussians(batches: Iterable[np.ndarray]) -> dict[str, Gaussian]:
    """Mean and population deviation of x, y, z, the spherical coordinates and the rotation of normalised actions.

    Args:
        batches: arrays [N, 7] (any N), scaled to -1..1 by q01/q99 and clipped, as training sees them.

    Raises:
        ValueError: there is no action.
    """
    names = ("x", "y", "z", *VARIABLES)
    count, total, squares = 0, np.zeros(len(names)), np.zeros(len(names))
    for batch in batches:
        actions = np.asarray(batch, np.float64)
        values = np.stack((*actions[:, :3].T, *to_spherical(actions[:, :3]), *actions[:, 3:6].T))
        count, total, squares = count + len(actions), total + values.sum(1), squares + (values**2).sum(1)
    if not count:
        raise ValueError("there are no actions to fit Gaussians to")
    mean = total / count
    sigma = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return {name: Gaussian(float(m), float(s)) for name, m, s in zip(names, mean, sigma, strict=True)}


def load_gaussians(path: str | Path) -> dict[str, Gaussian]:
    """Read `{variable: {"mu": ..., "sigma": ...}}`, the authors' format of `gs_*.json`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; scripts/fit_action_gaussians.py writes it from a dataset")
    return read_json(path, dict[str, Gaussian], advice='expected {"theta": {"mu": ..., "sigma": ...}, ...}')


def save_gaussians(gaussians: Mapping[str, Gaussian], path: str | Path) -> None:
    write_json(path, {name: {"mu": g.mu, "sigma": g.sigma} for name, g in gaussians.items()})
