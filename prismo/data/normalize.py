"""Scaling of actions and proprio, and the statistics files that carry it from training to evaluation.

The dataset normalises with it, policies undo it on predicted actions, and every checkpoint ships the statistics as
`dataset_statistics.json` in the schema that OpenVLA, OpenVLA-OFT and Spatial-Forcing publish.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge

from prismo.embodiment import Normalization
from prismo.util.files import write_json
from prismo.util.schema import JsonObject, check, read_json
from prismo.util.text import did_you_mean

_EPSILON = 1e-8
_FIELDS = ("mean", "std", "max", "min", "q01", "q99")  # the order of the published files
_SCALED_BY: dict[Normalization, tuple[str, str]] = {
    "bounds_q99": ("q01", "q99"),
    "bounds": ("min", "max"),
    "normal": ("mean", "std"),
}

Rule = Literal["training", "evaluation"]


class UnknownKeyError(ValueError):
    """Statistics that do not have the entry that is asked for."""


@dataclass(frozen=True, eq=False)
class FieldStats:
    """Statistics of one vector field (all arrays float64 [D], in the field's own units, gripper 1 = open).

    Attributes:
        mean, std, min, max: over every step of every episode; `std` is the population deviation.
        q01, q99: 1 % and 99 % quantiles (linear interpolation).
        mask: bool [D], False where a dimension is stored as it is (gripper commands); None scales all of them.
    """

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    q01: np.ndarray
    q99: np.ndarray
    mask: np.ndarray | None = None

    @property
    def dim(self) -> int:
        return len(self.mean)


@dataclass(frozen=True, eq=False)
class DatasetStats:
    """Statistics of one dataset; `proprio` is None in files of policies without a state, counts are 0 if not given."""

    action: FieldStats
    proprio: FieldStats | None
    num_transitions: int
    num_trajectories: int

    def of_proprio(self) -> FieldStats:
        """`proprio`, where it is needed.

        Raises:
            ValueError: there is none.
        """
        if self.proprio is None:
            raise ValueError("these statistics have none of the proprioceptive state")
        return self.proprio


def normalize(x: np.ndarray, stats: FieldStats, kind: Normalization, rule: Rule = "training") -> np.ndarray:
    """Scale `x` [..., D] from physical units to the range that policies see.

    "bounds_q99" and "bounds" map [q01, q99] or [min, max] to [-1, 1]; "normal" subtracts the mean and divides by the
    deviation. Dimensions with `mask` False keep their value.

    Args:
        rule: the original scales slightly differently at its two places. "training" (actions and proprio of a
            dataset) works in float32, clips the scaled dimensions to [-1, 1] and sets dimensions that never move in the
            dataset (min == max) to 0. "evaluation" (proprio of a live robot) works in float64, clips every dimension
            and has no rule for motionless ones. "normal" never clips and never zeroes.

    Returns:
        float32 for "training", float64 for "evaluation", same shape as `x`.
    """
    _check_width(x, stats)
    dtype = np.float32 if rule == "training" else np.float64
    offset, width = _range(stats, kind)
    x = np.asarray(x).astype(dtype)
    # The width is formed in float64 and cast once, as the original's graph does.
    scaled = (x - offset.astype(dtype)) / (width + _EPSILON).astype(dtype)
    if kind != "normal":
        # 2 * (x - low) / width - 1: multiplying by two is exact, so its place does not matter.
        scaled = np.clip(2 * scaled - 1, -1, 1)
    if stats.mask is not None:
        scaled = np.where(stats.mask, scaled, x)
    if kind != "normal":
        scaled = np.where(stats.min == stats.max, dtype(0), scaled) if rule == "training" else np.clip(scaled, -1, 1)
    return scaled


def unnormalize(x: np.ndarray, stats: FieldStats, kind: Normalization) -> np.ndarray:
    """Inverse of `normalize` for predicted actions [..., D]: float64, without clipping (OpenVLA-OFT's rule)."""
    _check_width(x, stats)
    x = np.asarray(x, dtype=np.float64)
    offset, width = _range(stats, kind)
    physical = x * (width + _EPSILON) + offset if kind == "normal" else 0.5 * (x + 1) * (width + _EPSILON) + offset
    return physical if stats.mask is None else np.where(stats.mask, physical, x)


def _range(stats: FieldStats, kind: Normalization) -> tuple[np.ndarray, np.ndarray]:
    """Offset and width of the scaling."""
    low, high = (getattr(stats, name) for name in _scaled_by(kind))
    return low, high if kind == "normal" else high - low


def _scaled_by(kind: Normalization) -> tuple[str, str]:
    if kind not in _SCALED_BY:
        raise ValueError(did_you_mean("normalization", kind, _SCALED_BY))
    return _SCALED_BY[kind]


def _check_width(x: np.ndarray, stats: FieldStats) -> None:
    width = np.shape(x)[-1] if np.ndim(x) else 0
    if width != stats.dim:
        raise ValueError(
            f"got vectors of {width} numbers, the statistics describe {stats.dim}: "
            "these statistics belong to another robot or dataset; check unnorm_key"
        )


def load_statistics(path: str | Path) -> dict[str, DatasetStats]:
    """Read `dataset_statistics.json`, or the `norm_stats` / `statistics` inside a model's config.json or
    processor_config.json.

    Raises:
        FileNotFoundError, ValueError: naming the file and what it lacks.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no statistics at {path}; expected a dataset_statistics.json (it lies in every checkpoint folder; "
            "`prismo data stats` makes one from a dataset)"
        )
    return parse_statistics(read_json(path, JsonObject), str(path))


_Numbers = list[float | None]
_Count = Annotated[int, Ge(0)] | None


@dataclass(frozen=True)
class _PublishedField:
    mean: _Numbers
    std: _Numbers
    max: _Numbers
    min: _Numbers
    q01: _Numbers
    q99: _Numbers
    mask: list[bool] | None = None


@dataclass(frozen=True)
class _PublishedDataset:
    action: _PublishedField
    proprio: _PublishedField | None = None
    num_transitions: _Count = None
    num_trajectories: _Count = None


def parse_statistics(mapping: Mapping[str, Any], where: str = "statistics") -> dict[str, DatasetStats]:
    """Typed statistics from the published JSON schema `{dataset: {action: {...}, proprio: {...}, num_...}}`.

    Also takes a whole config.json (`norm_stats`, OpenVLA) or processor_config.json (`statistics`, SpatialVLA, whose
    keys look like `bridge_orig/1.0.0`). `mask`, `proprio` and the counts may be absent. null and non-standard
    `Infinity` entries, which some published files hold, are read as nan and inf; `resolve_unnorm_key` refuses them
    where they are used.

    Args:
        where: names the mapping in errors.

    Raises:
        ValueError: another schema, or numbers that no data can have (q01 above q99, min above max, std below 0).
    """
    for wrapper in ("norm_stats", "statistics"):
        if isinstance(mapping.get(wrapper), Mapping):
            mapping = mapping[wrapper]
    if not mapping:
        raise ValueError(f"{where}: the statistics are empty")
    published = check(dict(mapping), dict[str, _PublishedDataset], where)
    return {
        key: DatasetStats(
            action=_parse_field(f"{where}: {key}.action", entry.action),
            proprio=_parse_field(f"{where}: {key}.proprio", entry.proprio) if entry.proprio else None,
            num_transitions=entry.num_transitions or 0,
            num_trajectories=entry.num_trajectories or 0,
        )
        for key, entry in published.items()
    }


def _parse_field(where: str, entry: _PublishedField) -> FieldStats:
    arrays = {name: np.array(getattr(entry, name), np.float64) for name in _FIELDS}
    mask = None if entry.mask is None else np.array(entry.mask, bool)
    widths = {len(array) for array in arrays.values()} | (set() if mask is None else {len(mask)})
    if len(widths) > 1:
        raise ValueError(f"{where} holds vectors of different lengths {sorted(widths)}")
    for low, high in (("q01", "q99"), ("min", "max")):
        for dim in np.flatnonzero(arrays[low] > arrays[high]):
            raise ValueError(f"{where}: {low}[{dim}] is {arrays[low][dim]}, above {high}[{dim}] {arrays[high][dim]}")
    for dim in np.flatnonzero(arrays["std"] < 0):
        raise ValueError(f"{where}: std[{dim}] is {arrays['std'][dim]}, below 0")
    return FieldStats(**arrays, mask=mask)


def statistics_to_json(stats: Mapping[str, DatasetStats]) -> dict[str, Any]:
    """The published schema as plain lists and numbers; strict JSON (values that are not finite become null)."""

    def field(entry: FieldStats) -> dict[str, list[Any]]:
        lists = {
            name: [value if math.isfinite(value) else None for value in getattr(entry, name).tolist()]
            for name in _FIELDS
        }
        return lists if entry.mask is None else {**lists, "mask": entry.mask.tolist()}

    return {
        key: {
            "action": field(entry.action),
            **({} if entry.proprio is None else {"proprio": field(entry.proprio)}),
            "num_transitions": entry.num_transitions,
            "num_trajectories": entry.num_trajectories,
        }
        for key, entry in stats.items()
    }


def dump_statistics(stats: Mapping[str, DatasetStats], path: str | Path) -> None:
    """Write `dataset_statistics.json` (atomically, indent 2) as every checkpoint of the OpenVLA family carries it."""
    write_json(path, statistics_to_json(stats))


def resolve_unnorm_key(stats: Mapping[str, DatasetStats], key: str | None, kind: Normalization = "bounds_q99") -> str:
    """The entry of `stats` that `key` means.

    `libero_spatial` also finds `libero_spatial_no_noops`, and either finds its versioned form
    (`libero_spatial_no_noops/1.0.0`) where only that exists. None is accepted only when there is exactly one entry.

    Args:
        kind: how the entry will be used.

    Raises:
        UnknownKeyError: nothing fits; the message lists every key.
        ValueError: the entry cannot scale anything by `kind`.
    """
    name = _find_key(stats, key)
    for what, field in (("action", stats[name].action), ("proprio", stats[name].proprio)):
        if field is not None:
            _check_usable(f"the statistics of {name!r} cannot be used: {what}", field, kind, moves=what == "action")
    return name


def _find_key(stats: Mapping[str, DatasetStats], key: str | None) -> str:
    if not key:
        if len(stats) == 1:
            return next(iter(stats))
        raise UnknownKeyError(
            f"the checkpoint has statistics of {len(stats)} datasets; choose one with --unnorm_key: "
            + ", ".join(sorted(stats))
        )
    for name in (key, f"{key}_no_noops"):
        if name in stats:
            return name
        versions = [known for known in stats if known.rsplit("/", 1)[0] == name]
        if len(versions) == 1:
            return versions[0]
    raise UnknownKeyError(did_you_mean("unnorm_key", key, stats))


def _check_usable(where: str, stats: FieldStats, kind: Normalization, *, moves: bool) -> None:
    """Refuse numbers that are not finite where they scale something, and actions that are all scaled to one place."""
    advice = "restore the file that came with the policy, or make one with `prismo data stats`"
    used = np.ones(stats.dim, bool) if stats.mask is None else stats.mask
    for name in _scaled_by(kind):
        values = getattr(stats, name)
        for dim in np.flatnonzero(used & ~np.isfinite(values)):
            raise ValueError(f"{where} {name}[{dim}] is {values[dim]}, and dimension {dim} is scaled with it; {advice}")
    if moves and used.any() and not _range(stats, kind)[1][used].any():
        low, high = _scaled_by(kind)
        same = "std is 0" if kind == "normal" else f"{low} equals {high}"
        raise ValueError(f"{where} {same} in every dimension that is scaled, so the robot would never move; {advice}")
