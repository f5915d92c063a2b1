"""Learning rate and optimizer: warm-up, then decay; AdamW in fp32 that refuses non-finite gradients on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from prismo.training.sharding import gather, local, scatter, whole
from prismo.util.text import did_you_mean

Scheduler = Literal["MultiStepLR", "CosineAnnealingLR", "LinearLR"]
_WARMUP_START = 0.1
_COSINE_END = 1e-3


@dataclass(frozen=True)
class Schedule:
    """Learning rate of every update, a pure function of its number, so that a resumed run needs no scheduler state.

    The original's warm-up overwrote the decay for the whole run; here the two are multiplied.

    Attributes:
        peak: rate after warm-up.
        kind: of `Scheduler`: "MultiStepLR" multiplies by 0.1 from update `decay_step` on; "CosineAnnealingLR" falls to
            `1e-3 * peak`, "LinearLR" (SpatialVLA's) in a straight line to 0.
        warmup_steps: updates over which the rate rises linearly from 10 % to 100 %; 0 = none.
        decay_step: see `kind`.
        max_steps: length of the cosine and of the line.
    """

    peak: float
    kind: str = "MultiStepLR"
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
        elif self.kind == "LinearLR":
            decayed = self.peak * max(1 - done / self.max_steps, 0.0)
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
        parameters: the trainable ones, by name; in fp32, or the small updates round away. Of sharded parameters every
            process updates its part.
        max_grad_norm: 0 = no clipping (the original's behaviour).
        weight_decay: AdamW's.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], *, max_grad_norm: float = 1.0, weight_decay: float = 0.01
    ) -> None:
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.max_grad_norm = max_grad_norm
        # AdamW works number by number, so it needs to know nothing of shards: these share the parameters' memory.
        self._parts = [nn.Parameter(local(p.detach())) if local(p) is not p else p for p in self.parameters]
        self.adamw = torch.optim.AdamW(self._parts, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=True)
        self.stopped = torch.zeros((), device=self._parts[0].device)
        # The fused kernels skip an update where this is 1 (it is how gradient scalers call them).
        self.adamw.found_inf = self.stopped  # ty: ignore[missing-attribute] (read by its step, not in its stubs)

    def step(self, rate: float) -> Tensor:
        """Clip, update and clear the gradients; returns their norm before clipping, a scalar on the device."""
        norm = whole(nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or math.inf))
        for parameter, part in zip(self.parameters, self._parts, strict=True):
            part.grad = None if parameter.grad is None else local(parameter.grad)
        self.stopped.copy_(torch.maximum(self.stopped, (~torch.isfinite(norm)).float()))
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        for tensor in (*self.parameters, *self._parts):
            tensor.grad = None
        return norm

    def state(self) -> dict[str, Tensor]:
        """Moments and update counts by `exp_avg.NAME`, `exp_avg_sq.NAME` and `step.NAME`; empty before any update.

        Of sharded parameters only this process's part (see `whole_state`).
        """
        return {f"{kind}.{name}": value for kind, name, _, value in self._items()}

    def whole_state(self) -> Iterator[tuple[str, Tensor]]:
        """The same, one by one and whole. All processes must go through it."""
        for kind, name, parameter, value in self._items():
            yield f"{kind}.{name}", gather(value, parameter)

    def _items(self) -> Iterator[tuple[str, str, nn.Parameter, Tensor]]:
        for name, parameter, part in zip(self.names, self.parameters, self._parts, strict=True):
            for kind, value in self.adamw.state.get(part, {}).items():
                yield kind, name, parameter, value

    def load_state(self, values: Mapping[str, Tensor]) -> None:
        """Restore what `whole_state` gave; tensors are copied to where the parameters are.

        Raises:
            ValueError: moments of other parameters.
        """
        kinds: Sequence[str] = ("step", "exp_avg", "exp_avg_sq") if values else ()
        expected = {f"{kind}.{name}" for kind in kinds for name in self.names}
        if different := sorted(expected ^ values.keys()):
            raise ValueError(
                f"the optimizer state belongs to other parameters ({different[0]} and {len(different) - 1} more)"
            )
        for name, parameter, part in zip(self.names, self.parameters, self._parts, strict=True):
            self.adamw.state[part] = {kind: scatter(values[f"{kind}.{name}"], parameter) for kind in kinds}
