"""One update of any objective: micro-batches forward and backward, one gradient reduction, one guarded optimizer step.

The trainer and `scripts/bench_train.py` run this same code. An objective is an `nn.Module` whose forward takes one
micro-batch of inputs and returns `Losses`; the step knows nothing else about the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from prismo.training.distributed import World, wrap
from prismo.training.objective import Losses
from prismo.training.optim import GuardedAdamW
from prismo.training.sharding import is_sharded

T = TypeVar("T", bound=nn.Module)


class AsyncFlag:
    """A scalar of the device as a bool that costs no waiting if it is asked for one update later."""

    def __init__(self, value: Tensor) -> None:
        self._event = None
        if value.device.type == "cuda":
            self._host = torch.empty((), pin_memory=True)
            self._host.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = value.clone()

    def __bool__(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._host)


@dataclass(frozen=True)
class UpdateResult:
    """What one update gives; everything stays on the device.

    Attributes:
        metrics: means over this process's micro-batches, fp32 scalars.
        totals: differentiated loss of each micro-batch (not divided by their number).
        grad_norm: norm of the reduced gradient before clipping, the same on every process.
        actions: predicted normalised actions of the last micro-batch [B, K, A], if the objective gives them.
        refused: True if this or an earlier update was refused because its loss or gradient was not finite.
    """

    metrics: dict[str, Tensor]
    totals: list[Tensor]
    grad_norm: Tensor
    actions: Tensor | None
    refused: AsyncFlag


class TrainStep(Generic[T]):
    """Objective, optimizer and data parallelism as one callable.

    Args:
        objective: on its device, with everything frozen that gets no gradient; all trainable weights in fp32. Sharded
            (`prismo.training.sharding`), or the same on every process.
        world: the processes of the run.
        precision: torch.bfloat16 runs the objective under autocast, torch.float32 as it is.
        accumulation: micro-batches per update.
        max_grad_norm, weight_decay: see `GuardedAdamW`.
        seed: of dropout and diffusion noise.
    """

    def __init__(
        self,
        objective: T,
        world: World,
        *,
        precision: torch.dtype = torch.float32,
        accumulation: int = 1,
        max_grad_norm: float = 1.0,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        self.objective = objective.train()
        self.world = world
        self.precision = precision
        self.accumulation = accumulation
        self.seed = seed
        parameters = trainable_parameters(objective)
        self.optimizer = GuardedAdamW(parameters, max_grad_norm=max_grad_norm, weight_decay=weight_decay)
        self.sharded = is_sharded(objective)
        self.module = objective if self.sharded else wrap(objective, world)

    def __call__(self, inputs: Iterable[Any], done: int, rate: float) -> UpdateResult:
        """Make update number `done + 1` from `accumulation` micro-batches at learning rate `rate`."""
        results: list[Losses] = []
        for micro, batch in enumerate(inputs):
            with self._reduce_gradients(micro == self.accumulation - 1):
                seed_noise(self.seed, done, micro, self.world.rank)
                with self.autocast():
                    losses: Losses = self.module(batch)
                total = losses.total.detach()
                # 1, or NaN for a loss that is not finite, whose gradient may well be (that of |NaN| is 0). So the
                # gradient shows it on every process, after the reduction that is made anyway.
                finite = total * 0 + 1
                (losses.total * finite / self.accumulation).backward()
            results.append(Losses(total, losses.metrics, losses.actions))
        if len(results) != self.accumulation:
            raise ValueError(f"expected {self.accumulation} micro-batches, got {len(results)}")
        norm = self.optimizer.step(rate)
        names = results[0].metrics
        metrics = {name: torch.stack([r.metrics[name].float() for r in results]).mean() for name in names}
        actions = results[-1].actions
        return UpdateResult(
            metrics,
            [r.total for r in results],
            norm,
            None if actions is None else actions.detach(),
            AsyncFlag(self.optimizer.stopped),
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 autocast, or nothing in fp32."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=self.precision)

    def _reduce_gradients(self, now: bool) -> AbstractContextManager[Any]:
        """Reduce in the last micro-batch only. The context has to span forward and backward (DDP arms in forward)."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(now)
            return nullcontext()
        if now or not isinstance(self.module, DistributedDataParallel):
            return nullcontext()
        return self.module.no_sync()


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that get gradients, by name.

    Raises:
        ValueError: there are none, or one is not fp32.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("nothing to train: every parameter is frozen")
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} is trained in {parameter.dtype}; they must be fp32, or updates round away")
    return parameters


def seed_noise(seed: int, done: int, micro: int, rank: int) -> None:
    """Seed dropout and diffusion noise as a pure function of run, update, micro-batch and process.

    The state of all generators of all ranks is therefore known from the number of updates: a resumed run continues the
    same streams, whatever validation or logging drew in between.
    """
    digest = hashlib.blake2b(f"{seed} {done} {micro} {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
