"""Success rates with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass

_Z = 1.959963984540054  # two-sided 95 %


@dataclass(frozen=True)
class Rate:
    """`successes` of `episodes`."""

    successes: int
    episodes: int

    @property
    def value(self) -> float:
        """In 0..1; NaN without episodes."""
        return self.successes / self.episodes if self.episodes else math.nan

    def wilson(self) -> tuple[float, float]:
        """The 95 % interval of Wilson (1927), in 0..1. Unlike p ± 1.96 s it is right near 0 and 1."""
        n = self.episodes
        if n == 0:
            return 0.0, 1.0
        center = (self.value + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(self.value * (1 - self.value) / n + _Z**2 / (4 * n**2))
        # At 0 of n and n of n rounding leaves 1e-17 beyond the bound.
        return max(0.0, center - half), min(1.0, center + half)

    def __str__(self) -> str:
        low, high = self.wilson()
        return f"{self.successes}/{self.episodes} = {self.value:.1%} [{low:.1%}, {high:.1%}]"
