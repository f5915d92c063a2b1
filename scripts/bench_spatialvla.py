"""Latency and memory of SpatialVLA with random weights: prediction, its parts, and one LoRA training step, as a table.

    python scripts/bench_spatialvla.py                            # 4B sizes, bf16, on the GPU
    python scripts/bench_spatialvla.py --tiny --device cpu        # the same code on a laptop

Prediction is the whole way from pixels to 12 action tokens. The rows below it take our savings away: the language model
launched kernel by kernel, then the head over the whole vocabulary at every token, as the official code does. Ratios are
to the first row of the same batch size (the last one's: to the row above). The training step is
forward, loss, backward and AdamW on the authors' LoRA set-up (rank 32, all linear layers).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from prismo.util.cli import parse_or_exit


@dataclass
class BenchConfig:
    # Tiny sizes
    tiny: bool = False
    # "cuda" or "cpu". Default: the GPU where there is one
    device: str | None = None
    # Of the prediction
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16])
    # Of the training step; 0 leaves it out
    train_batch: int = 32
    # Rank of the adapters
    lora_rank: int = 32
    # Recompute activations
    gradient_checkpointing: bool = False
    # Repetitions of each measurement
    repeats: int = 20


if __name__ == "__main__":
    CONFIG = parse_or_exit(BenchConfig, __doc__)  # before the imports that take seconds

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.beit.modeling_beit import BeitRelativePositionBias

from prismo.models.spatialvla import LORA_TARGETS, SpatialVLAConfig, SpatialVLAForConditionalGeneration, TokenDecoder
from prismo.models.spatialvla.action_tokenizer import OFFICIAL_GAUSSIANS, ActionTokenizer
from prismo.models.spatialvla.depth import ConstantPositionBias
from prismo.models.spatialvla.ego3d import WIDOWX
from prismo.models.spatialvla.processing import SpatialVLATextBatch
from prismo.testing.tiny_spatialvla import tiny_config

PROMPT_TOKENS = 20
ACTION_TOKENS = 12


def main(args: BenchConfig) -> None:
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = tiny_config() if args.tiny else SpatialVLAConfig()
    model = SpatialVLAForConditionalGeneration.random(config, dtype=torch.bfloat16, device=args.device)
    bench = Bench(torch.device(args.device), args.repeats)
    bench.header(model)
    for batch in args.batch_sizes:
        predict(bench, model, batch)
    if args.train_batch:
        train(bench, model, args)


def predict(bench: Bench, model: SpatialVLAForConditionalGeneration, batch: int) -> None:
    """Rows of the prediction at one batch size."""
    observation = inputs(model, batch, 0)
    _, pixels, intrinsics = observation
    slots = ActionTokenizer.from_gaussians(OFFICIAL_GAUSSIANS).slots
    graph = TokenDecoder(model, slots, ACTION_TOKENS)
    base = bench.row("predict", batch, lambda: graph(*observation).cpu())
    eager = TokenDecoder(model, slots, ACTION_TOKENS, cuda_graph=False)
    bench.row("  without CUDA graph", batch, lambda: eager(*observation).cpu(), base)
    full = TokenDecoder(model, slots, ACTION_TOKENS, cuda_graph=False, unconstrained=True)
    bench.row("  nor restricted head", batch, lambda: full(*observation).cpu(), base)
    with torch.inference_mode():
        bench.row("  image tokens alone", batch, lambda: model.image_features(pixels, intrinsics), base)
        depth = bench.row("  of which ZoeDepth", batch, lambda: model.predict_depth(pixels), base)
        with recomputed_position_bias():
            bench.row("  ZoeDepth as in transformers", batch, lambda: model.predict_depth(pixels), depth)


@contextmanager
def recomputed_position_bias() -> Generator[None]:
    """ZoeDepth's backbone computes its position biases at every forward, as in transformers."""
    ours = ConstantPositionBias.forward
    ConstantPositionBias.forward = BeitRelativePositionBias.forward
    try:
        yield
    finally:
        ConstantPositionBias.forward = ours


def train(bench: Bench, model: SpatialVLAForConditionalGeneration, args: BenchConfig) -> None:
    """Row of a LoRA training step."""
    lora = LoraConfig(
        r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=LORA_TARGETS["linear"], init_lora_weights="gaussian"
    )
    vla = get_peft_model(model, lora)
    vla.train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in vla.parameters() if p.requires_grad], lr=5e-4)
    text, pixels, intrinsics = inputs(model, args.train_batch, ACTION_TOKENS + 1)

    def step() -> None:
        loss = vla(text.input_ids, pixels, intrinsics, text.attention_mask, text.token_type_ids, text.labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    name = f"train, LoRA r{args.lora_rank}" + (", checkpointing" if args.gradient_checkpointing else "")
    bench.row(name, args.train_batch, step)


def inputs(
    model: SpatialVLAForConditionalGeneration, batch: int, suffix: int
) -> tuple[SpatialVLATextBatch, Tensor, Tensor]:
    """Random images and prompts on the model's device; the last `suffix` tokens are actions and <eos>."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    image = torch.full((batch, config.num_image_tokens), config.image_token_index)
    prompt = torch.randint(3, config.image_token_index, (batch, PROMPT_TOKENS), generator=generator)
    first = config.action_token_begin_idx
    action = torch.randint(first, first + config.spatial_token_num, (batch, suffix), generator=generator)
    ids = torch.cat((image, prompt, action), dim=1)
    types = torch.zeros_like(ids)
    types[:, image.shape[1] + PROMPT_TOKENS :] = 1
    text = SpatialVLATextBatch(ids, torch.ones_like(ids), types, ids.masked_fill(types == 0, -100))
    size = config.image_pixels
    pixels = torch.rand(batch, 3, size, size, generator=generator)
    return text.to(model.device), pixels.to(model.device), WIDOWX.matrix(size).expand(batch, 3, 3).to(model.device)


class Bench:
    """Times calls and prints a row for each."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def header(self, model: nn.Module) -> None:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{name}, torch {torch.__version__}, {parameters / 1e6:.0f} M parameters, bf16, {self.repeats} repeats\n")
        print(f"| {'':30} | {'batch':>5} | {'p50 ms':>8} | {'p95 ms':>8} | {'ratio':>5} | {'peak GiB':>8} |")
        print(f"|{'-' * 32}|{'-' * 6}:|{'-' * 9}:|{'-' * 9}:|{'-' * 6}:|{'-' * 9}:|")

    def row(self, name: str, batch: int, run: Callable[[], object], base: float | None = None) -> float:
        """Print the times of `run` and return the median in ms."""
        for _ in range(2):
            run()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        times = [self._time(run) for _ in range(self.repeats)]
        median, slow = np.percentile(times, (50, 95))
        ratio = f"{median / base:.2f}" if base else ""
        memory = f"{torch.cuda.max_memory_allocated(self.device) / 2**30:.1f}" if self.device.type == "cuda" else "-"
        print(f"| {name:30} | {batch:5} | {median:8.1f} | {slow:8.1f} | {ratio:>5} | {memory:>8} |", flush=True)
        return float(median)

    def _time(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    main(CONFIG)
