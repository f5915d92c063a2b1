"""Step time of the published recipe at full size with random weights, through the trainer's own step.

    python scripts/bench_train.py --results runs/bench.jsonl
    torchrun --standalone --nproc-per-node 2 scripts/bench_train.py --results runs/bench.jsonl

Recipe: OpenVLA-7B with LoRA 32, L1 head, two images, proprio, VGGT-1B alignment at layer 24, batch 8 per GPU. Pictures
and instructions are random, decoded beforehand; resize, augmentation and everything behind it is part of the step.
Nothing is downloaded. `--tiny` runs the same on a CPU in seconds to test this script. Each run prints its table row
(all rows of the results file, with scaling efficiency); several processes also check that all their weights agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prismo.util.cli import parse_or_exit


@dataclass
class BenchConfig:
    # Samples per GPU and micro-batch
    batch_size: int = 8
    # Micro-batches per update
    grad_accumulation_steps: int = 1
    # Measured updates
    steps: int = 20
    # Updates before the measurement
    warmup: int = 5
    # Cameras per sample
    num_images_in_input: int = 2
    # Leave the teacher out
    no_align: bool = False
    # Of the teacher's weights
    vggt_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # Recompute activations
    gradient_checkpointing: bool = False
    # torch.compile the blocks of the policy
    compile: bool = False
    # torch.compile the blocks of the teacher
    compile_vggt: bool = False
    # Prompts of one length: no padding mask
    same_length: bool = False
    # Tiny model on the CPU, to test this script
    tiny: bool = False
    # Write a Chrome trace of one step to this file
    profile: Path | None = None
    # Append to this JSONL file and print all of its rows
    results: Path | None = None


if __name__ == "__main__":
    CONFIG = parse_or_exit(BenchConfig, __doc__)  # before the imports that take seconds

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from bench_models import build_openvla_7b, build_vggt_1b
from bench_step import announce, device_words, finish, measure, synchronize, tiny_teacher
from torch import Tensor

from prismo.align import AlignRecipe, SpatialForcing, VGGTAggregator
from prismo.data.images import sample_seeds
from prismo.embodiment import LIBERO
from prismo.models.openvla import OpenVLAForActionPrediction, PrismaticImageProcessor, TextBatch
from prismo.models.openvla.processing import SPACE_ID, STOP_ID, pad_rows
from prismo.models.random_weights import fill_random
from prismo.testing.tiny import tiny_openvla_config
from prismo.training.build import recompute_activations
from prismo.training.config import FinetuneConfig
from prismo.training.distributed import World, start_world
from prismo.training.openvla_objective import (
    OpenVLAInputs,
    OpenVLAObjective,
    build_openvla_objective,
    compile_blocks,
    openvla_inputs,
)
from prismo.training.step import TrainStep

LEARNING_RATE = 5e-4
PROMPT_TOKENS = (26, 38)  # LIBERO's prompts differ in length, so batches are padded


def build_teacher(args: BenchConfig, world: World) -> VGGTAggregator:
    """A frozen VGGT: 909 million parameters, or a tiny one."""
    if args.tiny:
        return tiny_teacher()
    teacher = build_vggt_1b(world.device, getattr(torch, args.vggt_dtype))
    if args.compile_vggt:
        teacher.compile_blocks()
    return teacher


def build(args: BenchConfig, world: World) -> OpenVLAObjective:
    """The objective of the recipe, frozen and trained parts as the trainer has them."""
    torch.manual_seed(0)
    if args.tiny:
        vla = OpenVLAForActionPrediction(tiny_openvla_config())
        fill_random(vla, 0)
        recipe = AlignRecipe(vla_layers_align=2, use_vggt_pe=True, use_vlm_norm=True)
    else:
        vla = build_openvla_7b(world.device)
        recipe = AlignRecipe.spatial_forcing()
    if args.gradient_checkpointing:
        recompute_activations(vla)
    auxiliaries = {}
    if not args.no_align:
        auxiliaries["alignment"] = SpatialForcing(build_teacher(args, world), vla.llm_dim, recipe)
    config = FinetuneConfig(use_proprio=True)
    objective = build_openvla_objective(vla, LIBERO, config, auxiliaries, autocast=not args.tiny)
    if args.compile:
        compile_blocks(objective.vla)
    return objective


@dataclass(frozen=True)
class RawBatch:
    """What the loader delivers, on the CPU: decoded pictures, tokens, actions, states."""

    images: Tensor
    text: TextBatch
    actions: Tensor
    proprio: Tensor
    seeds: Tensor


def draw_batch(args: BenchConfig, objective: OpenVLAObjective, number: int, pinned: bool) -> RawBatch:
    """A random batch; the same number gives the same one."""
    random = np.random.default_rng(number)
    batch, tokens = args.batch_size, objective.vla.action_tokenizer
    actions = random.uniform(-1, 1, (batch, LIBERO.chunk, LIBERO.action_dim)).astype(np.float32)
    shortest, longest = (PROMPT_TOKENS[1],) * 2 if args.same_length else PROMPT_TOKENS
    rows = []
    for ids in tokens.encode(actions).reshape(batch, -1).tolist():
        prompt = random.integers(300, 20000, random.integers(shortest, longest + 1)).tolist()
        rows.append(([1, *prompt, SPACE_ID], [*ids, STOP_ID]))
    images = torch.from_numpy(random.integers(0, 256, (batch, args.num_images_in_input, 3, 256, 256), dtype=np.uint8))
    return RawBatch(
        images.pin_memory() if pinned else images,
        pad_rows(rows, tokens.vocab_size),
        torch.from_numpy(actions),
        torch.from_numpy(random.uniform(-1, 1, (batch, LIBERO.proprio_dim)).astype(np.float32)),
        sample_seeds(0, 0, torch.arange(batch) + number * batch),
    )


def prepare(batch: RawBatch, step: TrainStep[OpenVLAObjective]) -> OpenVLAInputs:
    """What the trainer does with a batch in front of the objective: copy, resize, augment, normalise."""
    return openvla_inputs(
        batch.images,
        batch.text,
        batch.actions,
        processor=PrismaticImageProcessor(),
        size=step.objective.vla.config.towers[0].image_size,
        device=step.world.device,
        dtype=step.precision,
        seeds=batch.seeds,
        proprio=batch.proprio,
    )


def seconds_of(world: World, run: Callable[[], object], repeats: int) -> float:
    """Mean seconds of `run()`, after one call that warms it up."""
    run()
    synchronize(world)
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(world)
    return (time.perf_counter() - started) / repeats


def parts(args: BenchConfig, step: TrainStep[OpenVLAObjective], batch: RawBatch) -> dict[str, float]:
    """Seconds per update of preparing the inputs and of the teacher, each measured by itself."""
    repeats, alignment = (2 if args.tiny else 5), step.objective.auxiliaries.get("alignment")
    result = {"inputs_s": seconds_of(step.world, lambda: prepare(batch, step), repeats), "vggt_s": 0.0}
    if isinstance(alignment, SpatialForcing):
        side = step.objective.vla.config.towers[0].grid
        images = prepare(batch, step).images

        def teach() -> None:
            with step.autocast():
                alignment.targets(images, (side, side))

        result["vggt_s"] = seconds_of(step.world, teach, repeats)
    return {name: seconds * args.grad_accumulation_steps for name, seconds in result.items()}


def profile(path: Path, step: TrainStep[OpenVLAObjective], batch: RawBatch) -> None:
    """Write a Chrome trace of one update and print its most expensive kernels."""
    with torch.profiler.profile() as trace:
        step([prepare(batch, step)] * step.accumulation, 0, LEARNING_RATE)
        synchronize(step.world)
    path.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(path))
    key = "self_cuda_time_total" if step.world.device.type == "cuda" else "self_cpu_time_total"
    print(trace.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=70))


def settings(args: BenchConfig, world: World) -> str:
    """Everything but the number of GPUs, as the first column of the table."""
    words = [*device_words(world, args.batch_size, args.grad_accumulation_steps), f"{args.num_images_in_input} images"]
    words += ["no alignment"] if args.no_align else [f"VGGT {args.vggt_dtype}"]
    flags = ("tiny", "gradient_checkpointing", "compile", "compile_vggt", "same_length")
    return ", ".join([*words, *(flag.replace("_", " ") for flag in flags if getattr(args, flag))])


def main(args: BenchConfig) -> None:
    args.vggt_dtype = "float32" if args.tiny else args.vggt_dtype
    world = start_world("cpu" if args.tiny else None)
    objective = build(args, world)
    precision = torch.float32 if args.tiny else torch.bfloat16
    step = TrainStep(objective, world, precision=precision, accumulation=args.grad_accumulation_steps)
    pinned = world.device.type == "cuda"
    batches = [draw_batch(args, objective, number * world.size + world.rank, pinned) for number in range(2)]
    announce(step, settings(args, world))
    ready = partial(prepare, step=step)
    row = measure(step, batches, ready, warmup=args.warmup, steps=args.steps, rate=LEARNING_RATE)
    row |= parts(args, step, batches[0])
    if args.profile and world.is_main and world.size == 1:
        profile(args.profile, step, batches[0])
    finish(step, row, settings(args, world), args.batch_size, args.results)


if __name__ == "__main__":
    main(CONFIG)
