"""Step time of SpatialVLA's fine-tuning at full size with random weights, through the trainer's own step.

    python scripts/bench_train_spatialvla.py --results runs/svla.jsonl                          # LoRA, batch 32
    python scripts/bench_train_spatialvla.py --align --results runs/svla.jsonl                  # and VGGT alignment
    torchrun --standalone --nproc-per-node 2 scripts/bench_train_spatialvla.py --full --results runs/svla.jsonl  # FSDP2

Pictures and instructions are random, decoded beforehand; resize, augmentation, ZoeDepth and everything behind it is
part of the step. Nothing is downloaded. `--tiny` runs the same on a CPU in seconds to test this script. Each run prints
its table row (all rows of the results file); several processes also check that all LoRA weights agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prismo.util.cli import parse_or_exit


@dataclass
class BenchConfig:
    # Train the weights themselves; FSDP2 on several GPUs
    full: bool = False
    # With VGGT-1B
    align: bool = False
    # Samples per GPU and micro-batch
    batch_size: int = 32
    # Micro-batches per update
    grad_accumulation_steps: int = 1
    # Rank of the adapters
    lora_rank: int = 32
    # Measured updates
    steps: int = 20
    # Updates before the measurement
    warmup: int = 5
    # Recompute activations
    gradient_checkpointing: bool = False
    # Tiny model on the CPU, to test this script
    tiny: bool = False
    # Append to this JSONL file and print all of its rows
    results: Path | None = None


if __name__ == "__main__":
    CONFIG = parse_or_exit(BenchConfig, __doc__)  # before the imports that take seconds

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from bench_models import build_vggt_1b
from bench_step import announce, device_words, finish, measure, tiny_teacher
from torch import Tensor

from prismo.align import AlignRecipe, SpatialForcing
from prismo.data.images import sample_seeds
from prismo.models.lora import LoraSpec
from prismo.models.spatialvla import LORA_TARGETS, SpatialVLAConfig, SpatialVLAForConditionalGeneration
from prismo.models.spatialvla.action_tokenizer import OFFICIAL_GAUSSIANS, ActionTokenizer
from prismo.models.spatialvla.ego3d import WIDOWX
from prismo.models.spatialvla.processing import SpatialVLATextBatch
from prismo.testing.tiny_spatialvla import tiny_config
from prismo.training.build import recompute_activations
from prismo.training.distributed import World, start_world
from prismo.training.spatialvla_objective import (
    SpatialVLAInputs,
    SpatialVLAObjective,
    build_spatialvla_objective,
    shard_objective,
    spatialvla_inputs,
)
from prismo.training.step import TrainStep

CHUNK, PROMPT_TOKENS = 4, (8, 24)  # LIBERO's instructions differ in length, so batches are padded


def build(args: BenchConfig, world: World) -> SpatialVLAObjective:
    """The objective as the trainer has it."""
    torch.manual_seed(0)
    config = tiny_config() if args.tiny else SpatialVLAConfig()
    dtype = torch.float32 if args.tiny else torch.bfloat16
    vla = SpatialVLAForConditionalGeneration.random(config, dtype=dtype, device=world.device)
    if args.gradient_checkpointing:
        recompute_activations(vla)
    auxiliaries = {}
    if args.align:
        teacher = tiny_teacher() if args.tiny else build_vggt_1b(world.device, torch.bfloat16)
        layer = vla.num_layers * 3 // 4
        recipe = AlignRecipe(vla_layers_align=layer, use_vggt_pe=True, use_vlm_norm=True, gain_feat_1move=False)
        auxiliaries["alignment"] = SpatialForcing(teacher, vla.llm_dim, recipe)
    rank = args.lora_rank
    lora = None if args.full else LoraSpec(rank, rank, target_modules=LORA_TARGETS["linear"])
    grid = ActionTokenizer.from_gaussians(OFFICIAL_GAUSSIANS, min_sigma=0.5)
    objective = build_spatialvla_objective(vla, grid, auxiliaries, lora=lora, autocast=not args.tiny)
    if args.full and world.size > 1:
        shard_objective(objective, world, dtype)
    return objective


@dataclass(frozen=True)
class RawBatch:
    """What the loader delivers, on the CPU."""

    images: Tensor
    text: SpatialVLATextBatch
    actions: Tensor
    seeds: Tensor


def draw_batch(args: BenchConfig, objective: SpatialVLAObjective, number: int, pinned: bool) -> RawBatch:
    """A random batch; the same number gives the same one."""
    random = np.random.default_rng(number)
    batch, config = args.batch_size, objective.vla.config
    actions = random.uniform(-1, 1, (batch, CHUNK, 7)).astype(np.float32)
    codes = ActionTokenizer.from_gaussians(OFFICIAL_GAUSSIANS, min_sigma=0.5).encode(actions).reshape(batch, -1)
    lengths = random.integers(*PROMPT_TOKENS, batch)
    start, suffix = config.num_image_tokens + 1, codes.shape[1] + 1
    ids = np.full((batch, start + lengths.max() + suffix), config.pad_token_id, np.int64)
    types, labels = np.ones_like(ids), np.full_like(ids, -100)
    for row, length, code in zip(range(batch), lengths, codes, strict=True):
        end = start + length
        ids[row, :start] = [config.image_token_index] * (start - 1) + [config.bos_token_id]
        ids[row, start:end] = random.integers(300, 500 if args.tiny else 200_000, length)
        ids[row, end : end + suffix] = [*(code + config.action_token_begin_idx), config.eos_token_id]
        types[row, :end] = 0
        labels[row, end : end + suffix] = ids[row, end : end + suffix]
    mask = np.arange(ids.shape[1])[None] < (start + lengths + suffix)[:, None]
    images = torch.from_numpy(random.integers(0, 256, (batch, 1, 3, 256, 256), dtype=np.uint8))
    return RawBatch(
        images.pin_memory() if pinned else images,
        SpatialVLATextBatch(*map(torch.from_numpy, (ids, mask.astype(np.int64), types, labels))),
        torch.from_numpy(actions),
        sample_seeds(0, 0, torch.arange(batch) + number * batch),
    )


def prepare(batch: RawBatch, step: TrainStep[SpatialVLAObjective]) -> SpatialVLAInputs:
    """What the trainer does with a batch in front of the objective: copy, resize, augment."""
    size = step.objective.vla.config.image_pixels
    device = step.world.device
    return spatialvla_inputs(
        batch.images,
        batch.text,
        batch.actions,
        cameras=[WIDOWX] * len(batch.actions),
        size=size,
        device=device,
        seeds=batch.seeds,
    )


def settings(args: BenchConfig, world: World) -> str:
    """The first column of the table."""
    kind = ("full, FSDP2" if world.size > 1 else "full") if args.full else f"LoRA r{args.lora_rank}"
    words = [*device_words(world, args.batch_size, args.grad_accumulation_steps), kind]
    flags = ("align", "gradient_checkpointing", "tiny")
    return ", ".join([*words, *(flag.replace("_", " ") for flag in flags if getattr(args, flag))])


def main(args: BenchConfig) -> None:
    world = start_world("cpu" if args.tiny else None)
    objective = build(args, world)
    precision = torch.float32 if args.tiny else torch.bfloat16
    step = TrainStep(objective, world, precision=precision, accumulation=args.grad_accumulation_steps, weight_decay=0.0)
    pinned = world.device.type == "cuda"
    batches = [draw_batch(args, objective, number * world.size + world.rank, pinned) for number in range(2)]
    announce(step, settings(args, world))
    rate = 2e-5 if args.full else 5e-4
    row = measure(step, batches, partial(prepare, step=step), warmup=args.warmup, steps=args.steps, rate=rate)
    finish(step, row, settings(args, world), args.batch_size, args.results)


if __name__ == "__main__":
    main(CONFIG)
