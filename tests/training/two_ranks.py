"""Run under torchrun by test_processes.py: how gradients are reduced, seen from inside two processes. Prints JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prismo.training.distributed import World, start_world, stop_world
from prismo.training.objective import Losses
from prismo.training.step import TrainStep


class Backbone(nn.Module):
    """A backbone and a head; the loss needs both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Losses:
        total = self.head(self.backbone(x)).square().mean()
        return Losses(total, {"loss": total.detach()})


def data(rank: int, number: int) -> Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(10 * number + rank))


def unequal_after_original_step(world: World) -> list[str]:
    """What OpenVLA-OFT does: the head is wrapped but called through `.module`, around the reducer (issue 160)."""
    model = Backbone()
    backbone = nn.parallel.DistributedDataParallel(model.backbone)
    head = nn.parallel.DistributedDataParallel(model.head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for number in range(2):
        head.module(backbone(data(world.rank, number))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return world.same_on_all(dict(model.named_parameters()))


def unequal_after_our_step(world: World) -> list[str]:
    step = TrainStep(Backbone(), world)
    for number in range(2):
        step([data(world.rank, number)], number, 0.1)
    return world.same_on_all(dict(step.objective.named_parameters()))


def reductions(world: World, accumulation: int) -> int:
    """Gradient reductions of one update."""
    step = TrainStep(Backbone(), world, accumulation=accumulation)
    count = 0

    def hook(state, bucket):  # DDP compares annotations by identity, which postponed ones do not have
        nonlocal count
        count += 1
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / world.size)

    step.module.register_comm_hook(None, hook)
    step([data(world.rank, micro) for micro in range(accumulation)], 0, 0.1)
    return count


def distance(world: World, steps: int) -> float:
    """Largest difference of weights after training on two halves and, in one process, on the whole batch."""
    ours = TrainStep(Backbone(), world)
    alone = TrainStep(Backbone(), World(0, 1, world.device))
    for number in range(steps):
        ours([data(world.rank, number)], number, 0.01)
        alone([torch.cat([data(0, number), data(1, number)])], number, 0.01)
    pairs = zip(ours.objective.parameters(), alone.objective.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def refused_everywhere(world: World) -> bool:
    """A bad batch on one process stops the update on all."""
    step = TrainStep(Backbone(), world)
    x = data(world.rank, 0)
    if world.rank == 1:
        x[0, 0] = float("inf")
    refused = bool(step([x], 0, 0.1).refused)
    return all(world.gather(refused)) and not world.same_on_all(dict(step.objective.named_parameters()))


def main() -> None:
    world = start_world("cpu")
    checks: dict[str, Callable[[], object]] = {
        "original": lambda: unequal_after_original_step(world),
        "ours": lambda: unequal_after_our_step(world),
        "reductions": lambda: [reductions(world, 1), reductions(world, 3)],
        "distance": lambda: distance(world, 5),
        "refused": lambda: refused_everywhere(world),
        "any": lambda: world.any(world.rank == 1),
        "mean": lambda: float(world.mean({"x": torch.tensor(float(world.rank))})["x"]),
    }
    results = {name: check() for name, check in checks.items()}
    if world.is_main:
        sys.stdout.write(json.dumps(results) + "\n")
    stop_world()


if __name__ == "__main__":
    main()
