"""Statistics of actions and states: can they be those of a robot, and are they those of the datasets they name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from prismo.data.normalize import DatasetStats, FieldStats
from prismo.embodiment import EMBODIMENTS
from prismo.verify.checks import Finding, difference, judge, some
from prismo.verify.facts import DatasetFacts, Facts

_LIMIT = 1e3  # metres, radians or millimetres: what an arm can do
# LIBERO's controller takes -1..1. Its states are metres and an axis-angle vector, 2 pi long at most.
_LIBERO = {"action": 1.0, "proprio": 2 * math.pi}
# Published with broken numbers (infinite deviations, one pose of 1e35 m); its quantiles are fine.
_BROKEN = ("rh20t_rlds",)
_TOLERANCE = 0.02  # of q99 - q01: more than another way to compute a quantile changes, less than another dataset
_ROUNDING = 1e-5
_ORDER = (("min", "q01"), ("q99", "max"), ("min", "mean"), ("mean", "max"))  # the rest is seen while reading


def check_plausible(statistics: Mapping[str, DatasetStats]) -> Finding:
    """Finite, in order, and within what a robot can do."""
    lines = []
    for key, stats in statistics.items():
        for name, field in (("action", stats.action), ("proprio", stats.proprio)):
            if field is not None:
                lines += [f"`{key}` {name}: {problem}" for problem in _problems(key, name, field)]
    keys = some(set(statistics)) if len(statistics) <= 4 else f"{len(statistics)} datasets"
    return judge(f"{keys}: finite, in order, plausible", lines)


def check_known(statistics: Mapping[str, DatasetStats], keys: list[str] | None, facts: Facts) -> Finding:
    """Against the datasets that a published id was trained on."""
    if keys is None:
        counts = [f"`{key}` {s.num_transitions:,} steps" for key, s in sorted(statistics.items())[:2]]
        more = f" and {len(statistics) - 2} more" if len(statistics) > 2 else ""
        return Finding("not known", ", ".join(counts) + more)
    missing, more = set(keys) - statistics.keys(), statistics.keys() - set(keys)
    lines = [difference("datasets", some(set(keys)), some(set(statistics)))] if missing or more else []
    compared = [(key, facts.dataset(key)) for key in keys if key in statistics]
    for key, known in compared:
        if known is not None:
            lines += quantile_differences(key, statistics[key], known)
    quantiles = sum(known is not None and known.q01 is not None for _, known in compared)
    return judge(f"counts of {len(compared)} datasets, quantiles of {quantiles}", lines)


def quantile_differences(key: str, stats: DatasetStats, known: DatasetFacts) -> Iterator[str]:
    """Differences from what is known of a dataset."""
    for what, expected, found in (
        ("steps", known.transitions, stats.num_transitions),
        ("episodes", known.trajectories, stats.num_trajectories),
    ):
        if expected != found:
            yield difference(f"`{key}` {what}", f"{expected:,}", f"{found:,}")
    if known.q01 is None or known.q99 is None:
        return
    if len(known.q01) != stats.action.dim:
        yield difference(f"`{key}` numbers per action", len(known.q01), stats.action.dim)
        return
    width = np.subtract(known.q99, known.q01)
    for name, expected in (("q01", known.q01), ("q99", known.q99)):
        found = getattr(stats.action, name)
        far = ~(np.abs(found - expected) <= _TOLERANCE * width)  # also NaN
        if far.any():
            yield difference(f"`{key}` action {name}", list(expected), found.round(6).tolist())


def _problems(key: str, name: str, field: FieldStats) -> Iterator[str]:
    broken = key.startswith(_BROKEN)
    for what in ("q01", "q99") if broken else ("mean", "std", "min", "max", "q01", "q99"):
        values = getattr(field, what)
        if not np.isfinite(values).all():
            yield f"{what} is not finite ({_numbers(values)})"
    if broken:
        return
    for low, high in _ORDER:
        a, b = getattr(field, low), getattr(field, high)
        wrong = a > b + _ROUNDING * (1 + np.abs(b))
        if wrong.any():
            i = int(np.argmax(wrong))
            yield f"{low} > {high} in number {i} ({a[i]:.4g} > {b[i]:.4g})"
    limit = _LIBERO[name] if _robot(key) == "libero" else _LIMIT
    largest = np.nanmax(np.abs([field.q01, field.q99]))
    if largest > limit * (1 + _ROUNDING):
        yield f"quantiles reach {largest:.4g}, plausible are {limit:.4g}"


def _robot(key: str) -> str:
    return next((name for name in EMBODIMENTS if key.startswith(name)), "")


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{value:.4g}" for value in values)
