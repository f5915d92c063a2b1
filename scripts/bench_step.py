"""What the two training benchmarks share: random batches through the trainer's own step, timed, one table row a run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from prismo.align.random_teacher import random_vggt
from prismo.align.vggt import VGGTAggregator, VGGTConfig
from prismo.training.distributed import World, stop_world
from prismo.training.step import TrainStep, trainable_parameters

B = TypeVar("B")
Prepare = Callable[[B], Any]  # a batch as the loader delivers it -> inputs of the objective on the device


def tiny_teacher() -> VGGTAggregator:
    """A frozen VGGT for `--tiny`."""
    return random_vggt(config=VGGTConfig(width=64, depth=2, patch_depth=2, mlp_width=256))


def device_words(world: World, batch_size: int, accumulation: int) -> list[str]:
    """What the first column of the table begins with."""
    words = [torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU", f"batch {batch_size}"]
    return words + ([f"accumulation {accumulation}"] if accumulation > 1 else [])


def synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def measure(
    step: TrainStep[Any], batches: Sequence[B], prepare: Prepare[B], *, warmup: int, steps: int, rate: float
) -> dict[str, Any]:
    """Run warm-up and measured updates; seconds per update, peak memory, first and last loss."""
    world, cuda = step.world, step.world.device.type == "cuda"
    losses = []
    for number in range(warmup + steps):
        if number == warmup:
            synchronize(world)
            world.barrier()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
        # The same few batches again and again, so that drawing them takes no time from the step.
        micro = (batches[(number + i) % len(batches)] for i in range(step.accumulation))
        losses.append(step((prepare(batch) for batch in micro), number, rate).metrics["loss"])
    synchronize(world)
    seconds = (time.perf_counter() - started) / steps
    if step.optimizer.stopped.item():
        raise RuntimeError("the loss or its gradient became non-finite; these figures would mean nothing")
    return {
        "step_s": max(world.gather(seconds)),
        "peak_gib": max(world.gather(torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0)),
        "first_loss": losses[0].item(),
        "last_loss": losses[-1].item(),
    }


def announce(step: TrainStep[Any], settings: str) -> None:
    """Say what is going to be measured."""
    if step.world.is_main:
        count = sum(parameter.numel() for parameter in trainable_parameters(step.objective).values())
        print(f"torch {torch.__version__}, {settings}, {step.world.size} processes, {count:,} trained parameters")


def finish(step: TrainStep[Any], row: dict[str, Any], settings: str, batch_size: int, results: Path | None) -> None:
    """Complete a row, print it with the earlier ones of the results file, and leave the other processes.

    Raises:
        SystemExit: weights differ between processes.
    """
    world = step.world
    # Parts of a sharded model differ by design.
    different = world.same_on_all({} if step.sharded else trainable_parameters(step.objective))
    alone = world.size == 1 or step.sharded
    row = row | {
        "settings": settings,
        "gpus": world.size,
        "samples_per_s": batch_size * step.accumulation * world.size / row["step_s"],
        "weights_equal": "-" if alone else ("yes" if not different else f"NO: {len(different)}"),
    }
    if world.is_main:
        print(f"loss {row['first_loss']:.4f} -> {row['last_loss']:.4f} (two repeated random batches)")
        rows = [row]
        if results:
            results.parent.mkdir(parents=True, exist_ok=True)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows = [json.loads(line) for line in results.read_text().splitlines()]
        _print_table(rows)
    if dist.is_initialized():
        world.barrier()
    stop_world()
    if different:
        raise SystemExit(f"weights differ between processes: {', '.join(different[:5])}")


def _print_table(rows: list[dict[str, Any]]) -> None:
    """Markdown; efficiency = samples/s per GPU over that of the one-GPU row with the same settings."""
    alone = {row["settings"]: row["samples_per_s"] for row in rows if row["gpus"] == 1}
    shares = [name for name in ("vggt_s", "inputs_s") if any(name in row for row in rows)]
    columns = ["settings", "GPUs", "step s", "samples/s", "efficiency", "peak GiB"]
    columns += [f"{name.removesuffix('_s').replace('vggt', 'VGGT')} share" for name in shares] + ["weights equal"]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        one = alone.get(row["settings"])
        efficiency = f"{row['samples_per_s'] / row['gpus'] / one:.0%}" if one else "-"
        cells = [row["settings"], str(row["gpus"]), f"{row['step_s']:.3f}", f"{row['samples_per_s']:.2f}", efficiency]
        cells += [f"{row['peak_gib']:.1f}"]
        cells += [f"{row[name] / row['step_s']:.0%}" if name in row else "-" for name in shares]
        lines.append([*cells, row["weights_equal"]])
    print("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
