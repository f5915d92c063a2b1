"""Validation on held-out episodes: losses, L1 per action dimension, errors in millimetres and degrees."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from prismo.data.loader import Batch
from prismo.training.action_error import ActionErrors
from prismo.training.step import TrainStep, seed_noise
from prismo.training.task import TrainingTask


@torch.no_grad()
def validate(
    task: TrainingTask, step: TrainStep, batches: Iterable[Batch], errors: ActionErrors, time_limit: float
) -> dict[str, float]:
    """Means over all processes' batches, weighted by samples; each process stops by itself after `time_limit` seconds.

    Images are prepared as at evaluation (center crop where training crops at random). `l1_loss` and `l1_dim{i}` are of
    the actions that the policy would give, in normalised units.
    """
    step.objective.eval()
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=step.world.device))
    samples, batch_count, began = 0, 0, time.monotonic()
    try:
        for batch in batches:
            inputs = task.inputs(batch, False)
            seed_noise(0, 0, batch_count, step.world.rank)  # diffusion draws the same noise in every validation
            with step.autocast():
                losses = step.objective(inputs)
                actions = task.predict(inputs) if losses.actions is None else losses.actions
            values = losses.metrics | _action_metrics(actions.float(), batch, errors)
            for name, value in values.items():
                sums[name] = sums[name] + value.float() * len(batch)
            samples, batch_count = samples + len(batch), batch_count + 1
            if time.monotonic() - began > time_limit:
                break
    finally:
        step.objective.train()
    return _reduce(step, {name: value.item() for name, value in sums.items()}, samples, batch_count)


def _action_metrics(actions: Tensor, batch: Batch, errors: ActionErrors) -> dict[str, Tensor]:
    target, mask = batch.actions.to(actions.device), batch.action_mask.to(actions.device)
    weight = mask[..., None].float()
    per_dim = ((actions - target).abs() * weight).sum(dim=(0, 1)) / weight.sum().clamp(min=1)
    named = {f"l1_dim{i}": value for i, value in enumerate(per_dim.unbind())}
    return {"l1_loss": per_dim.mean(), **named, **errors(actions, target, batch.dataset_names, mask)}


def _reduce(step: TrainStep, sums: dict[str, float], samples: int, batches: int) -> dict[str, float]:
    everywhere = step.world.gather((sums, samples, batches))
    total = sum(count for _, count, _ in everywhere)
    names = {name for values, _, _ in everywhere for name in values}
    means = {name: sum(values.get(name, 0.0) for values, _, _ in everywhere) / total for name in sorted(names)}
    return means | {"val_batches_count": float(sum(count for _, _, count in everywhere))}
