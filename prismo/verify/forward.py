"""Checks that run a policy: it loads, once, passes its self-test, predicts something plausible, sees the image."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from prismo.data.normalize import DatasetStats
from prismo.policies.base import Policy
from prismo.policies.loading import PolicySpec
from prismo.verify.checks import Check, Finding, SkippedError, judge, needed
from prismo.verify.memory import check_room, peak_memory, reset_peak
from prismo.verify.sample import VIEWS, observation

_REPEATS, _PATIENCE = 5, 10.0  # predictions to time, seconds for all of them
_STRETCH = 0.5  # of q99 - q01, beyond either quantile: regressed actions overshoot a little
_UNSCALED = (-1.0, 2.0)  # gripper commands: 0 closed, 1 open
_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


@dataclass(frozen=True)
class _Prediction:
    """A chunk [K, A] in physical units, and the seconds that it took."""

    actions: np.ndarray
    seconds: float


class Forward:
    """Loads a policy at the first question and keeps it.

    Args:
        spec: gives the policy; asked only when a check runs.
        parameters: of the model.
        wanted: False skips every check.
        loading: name of the check that loads it.
    """

    def __init__(
        self, spec: Callable[[], PolicySpec], parameters: Callable[[], int], wanted: bool, loading: str
    ) -> None:
        self._get_spec, self._parameters, self._wanted, self._loading = spec, parameters, wanted, loading

    def checks(self, needs: tuple[str, ...]) -> list[Check]:
        """`needs`: checks without whose success loading makes no sense."""
        return [
            Check(self._loading, self._load, needs),
            Check("prediction", self._plausible, (self._loading, "statistics")),
            Check("black image", self._sees, (self._loading, "statistics")),
            Check("time and memory", self._cost, (self._loading, "statistics")),
        ]

    @cached_property
    def _spec(self) -> PolicySpec:
        return self._get_spec()

    @cached_property
    def _policy(self) -> Policy:
        if not self._wanted:
            raise SkippedError("--no_forward")
        needed(lambda: self._spec, "settings")
        check_room(self._parameters(), self._spec.device, self._spec.dtype)
        reset_peak(self._spec.device)
        start = time.perf_counter()
        policy = self._spec.load()
        self._load_seconds = time.perf_counter() - start
        return policy

    @property
    def _statistics(self) -> DatasetStats:
        return self._spec.checkpoint.statistics[self._spec.settings.unnorm_key]

    def _predict(self, *, black: bool = False) -> _Prediction:
        policy, stats = self._policy, self._statistics
        if policy.num_images > VIEWS:
            raise SkippedError(f"it takes {policy.num_images} images, the sample observation has {VIEWS}")
        state = None if stats.proprio is None or policy.robot.proprio_dim == 8 else stats.proprio.mean
        policy.start_episode(0, seed=0)
        start = time.perf_counter()
        actions = policy.predict([observation(policy.num_images, state, black=black)], [0])[0]
        return _Prediction(actions, time.perf_counter() - start)

    @cached_property
    def _real(self) -> _Prediction:
        return self._predict()

    def _load(self) -> Finding:
        policy = self._policy
        about = policy.describe()
        return Finding("ok", f"loaded in {self._load_seconds:.1f} s, {about['dtype']} on {about['device']}")

    def _plausible(self) -> Finding:
        actions, stats, robot = self._real.actions, self._statistics.action, self._policy.robot
        bounds = (stats.min, stats.max) if robot.normalization == "bounds" else (stats.q01, stats.q99)
        reach = _STRETCH * (bounds[1] - bounds[0]) + 1e-3
        low, high = bounds[0] - reach, bounds[1] + reach
        if stats.mask is not None:
            low, high = (np.where(stats.mask, b, limit) for b, limit in zip((low, high), _UNSCALED, strict=True))
        lines = []
        for i in np.flatnonzero(((actions < low) | (actions > high)).any(axis=0)):
            found = f"{actions[:, i].min():.4g} to {actions[:, i].max():.4g}"
            lines.append(f"number {i} of the action: expected {low[i]:.4g} to {high[i]:.4g}, found {found}")
        return judge(f"{len(actions)} action{'s' * (len(actions) > 1)}, the first {_shown(actions[0])}", lines)

    def _sees(self) -> Finding:
        real, black = needed(lambda: self._real, "prediction").actions, self._predict(black=True).actions
        change = float(np.abs(black - real).max())
        text = f"the largest change is {change:.3g}, the first action becomes {_shown(black[0])}"
        same = "black images give the same actions as real ones: expected others, found the same"
        if getattr(self._spec.settings, "head", None) == "discrete":
            same += " (actions are tokens here, and untrained weights hardly ever choose one of the 256)"
        return judge(text, [] if change > 0 else [same])

    def _cost(self) -> Finding:
        first, seconds = needed(lambda: self._real, "prediction").seconds, list[float]()
        while not seconds or (len(seconds) < _REPEATS and sum(seconds) < _PATIENCE):
            seconds.append(self._predict().seconds)
        usual, memory = float(np.median(seconds)), peak_memory(self._spec.device)
        return Finding("ok", f"first {first * 1e3:.0f} ms, then {usual * 1e3:.0f} ms; peak {memory}")


def _shown(action: np.ndarray) -> str:
    """An action in words; names only where it is the usual one of seven numbers."""
    names = _NAMES if len(action) == len(_NAMES) else map(str, range(len(action)))
    return " ".join(f"{name} {value:.3f}" for name, value in zip(names, action, strict=True))
