"""Learning rate and optimizer: warm-up, then decay; AdamW in fp32 that refuses non-finite gradients on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from prismo.util.text import did_you_mean

Scheduler = Literal["MultiStepLR", "CosineAnnealingLR"]
_WARMUP_START = 0.1
_COSINE_END = 1e-3


@dataclass(frozen=True)
class Schedule:
    """Learning rate of every update, a pure function of its number, so that a resumed run needs no scheduler state.

    The original's warm-up overwrote the decay for the whole run; here the two are multiplied.

    Attributes:
        peak: rate after warm-up.
        kind: "MultiStepLR" multiplies by 0.1 from update `decay_step` on; "CosineAnnealingLR" falls to `1e-3 * peak`.
        warmup_steps: updates over which the rate rises linearly from 10 % to 100 %; 0 = none.
        decay_step: see `kind`.
        max_steps: length of the cosine.
    """

    peak: float
    kind: Scheduler = "MultiStepLR"
    warmup_steps: int = 0
    decay_step: int = 100_000
    max_steps: int = 200_000

    def __post_init__(self) -> None:
        if self.kind not in get_args(Scheduler):
            raise ValueError(did_you_mean("scheduler", self.kind, get_args(Scheduler)))

    def rate(self, done: int) -> float:
        """Rate of the update that follows `done` updates (0 = the first one)."""
        warmup = 1.0
        if self.warmup_steps > 0:
            warmup = _WARMUP_START + (1 - _WARMUP_START) * min((done + 1) / self.warmup_steps, 1)
        if self.kind == "MultiStepLR":
            decayed = self.peak * (0.1 if done >= self.decay_step else 1.0)
        else:
            end = _COSINE_END * self.peak
            progress = min(done / self.max_steps, 1.0)
            decayed = end + (self.peak - end) * (1 + math.cos(math.pi * progress)) / 2
        return warmup * decayed


class GuardedAdamW:
    """AdamW and gradient clipping that never apply a non-finite update, and never make the host wait to know.

    The first gradient whose norm is not finite raises a flag on the device. From then on every update is skipped there,
    so the weights stay those before the bad batch while the host, a step behind, finds out and stops the run.

    Args:
        parameters: the trainable ones, by name; in fp32, or the small updates round away.
        max_grad_norm: 0 = no clipping (the original's behaviour).
        weight_decay: AdamW's.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], *, max_grad_norm: float = 1.0, weight_decay: float = 0.01
    ) -> None:
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.max_grad_norm = max_grad_norm
        self.adamw = torch.optim.AdamW(
            self.parameters, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=True
        )
        self.stopped = torch.zeros((), device=self.parameters[0].device)
        # The fused kernels skip an update where this is 1 (it is how gradient scalers call them).
        self.adamw.found_inf = self.stopped

    def step(self, rate: float) -> Tensor:
        """Clip, update and clear the gradients; returns their norm before clipping, a scalar on the device."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or math.inf)
        self.stopped.copy_(torch.maximum(self.stopped, (~torch.isfinite(norm)).float()))
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Moments and update counts by `exp_avg.NAME`, `exp_avg_sq.NAME` and `step.NAME`; empty before any update."""
        values = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            values |= {f"{kind}.{name}": value for kind, value in self.adamw.state.get(parameter, {}).items()}
        return values

    def load_state(self, values: dict[str, Tensor]) -> None:
        """Restore `state`; tensors are copied to where the parameters are.

        Raises:
            ValueError: moments of other parameters.
        """
        kinds: Sequence[str] = ("step", "exp_avg", "exp_avg_sq") if values else ()
        expected = {f"{kind}.{name}" for kind in kinds for name in self.names}
        if different := sorted(expected ^ values.keys()):
            raise ValueError(
                f"the optimizer state belongs to other parameters ({different[0]} and {len(different) - 1} more)"
            )
        for name, parameter in zip(self.names, self.parameters, strict=True):
            self.adamw.state[parameter] = {
                kind: values[f"{kind}.{name}"].to(parameter.device, torch.float32, copy=True) for kind in kinds
            }
