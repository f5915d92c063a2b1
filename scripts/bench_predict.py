"""Latency of one prediction (a chunk of 8 actions) at full size with random weights.

    python scripts/bench_predict.py                  # H200, L1 head, two images, proprio, batch 1 and 16
    python scripts/bench_predict.py --tiny           # CPU, to test this script

From normalised pixels on the device to actions on the host; a row per batch size: median and 95th percentile of the
latency, predictions per second and peak memory. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from prismo.util.cli import parse_or_exit


@dataclass
class BenchConfig:
    # Of the prediction
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16])
    # Cameras per sample
    num_images_in_input: int = 2
    # Repetitions of each measurement
    repeats: int = 50
    # Tiny model on the CPU, to test this script
    tiny: bool = False


if __name__ == "__main__":
    CONFIG = parse_or_exit(BenchConfig, __doc__)  # before the imports that take seconds

import time

import numpy as np
import torch

from prismo.embodiment import LIBERO
from prismo.models.heads import L1Head, L1RegressionActionHead
from prismo.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction
from prismo.models.openvla.prediction import ActionModules, predict_normalized
from prismo.models.openvla.processing import SPACE_ID, query
from prismo.models.projectors import ProprioProjector
from prismo.models.random_weights import fill_random
from prismo.testing.tiny import tiny_openvla_config

PROMPT_TOKENS = 34  # LIBERO's prompts have 26 to 38


def build(tiny: bool) -> tuple[OpenVLAForActionPrediction, ActionModules]:
    """Model and side modules in bf16 on the GPU (tiny: fp32 on the CPU)."""
    device, dtype = ("cpu", torch.float32) if tiny else ("cuda", torch.bfloat16)
    with torch.device(device):
        vla = OpenVLAForActionPrediction._from_config(tiny_openvla_config() if tiny else OpenVLAConfig(), dtype=dtype)
        head = L1RegressionActionHead(vla.llm_dim).to(dtype)
        projector = ProprioProjector(vla.llm_dim, LIBERO.proprio_dim).to(dtype)
    for module in (vla, head, projector):
        fill_random(module, 0)
        module.eval()
    return vla, ActionModules(L1Head(head), projector)


def latencies(vla: OpenVLAForActionPrediction, modules: ActionModules, args: BenchConfig, batch: int) -> list[float]:
    """Seconds of each prediction, after three that warm up."""
    size = vla.config.towers[0].image_size
    pixels = torch.randn(batch, 6 * args.num_images_in_input, size, size, device=vla.device, dtype=vla.dtype)
    prompt = [1, *range(300, 300 + PROMPT_TOKENS - 1), SPACE_ID]
    text = query([prompt] * batch, LIBERO.action_tokens, vla.action_tokenizer).to(vla.device)
    proprio = torch.zeros(batch, LIBERO.proprio_dim, device=vla.device)
    seconds = []
    for _ in range(3 + args.repeats):
        start = time.perf_counter()
        predict_normalized(vla, modules, text, pixels, LIBERO, proprio=proprio).cpu()
        seconds.append(time.perf_counter() - start)
    return seconds[3:]


def main(args: BenchConfig) -> None:
    vla, modules = build(args.tiny)
    name = "CPU, tiny" if args.tiny else torch.cuda.get_device_name()
    kernel = vla.language_model.config._attn_implementation
    print(f"torch {torch.__version__}, {name}, {args.num_images_in_input} images, attention {kernel}")
    print("| batch | p50 ms | p95 ms | predictions/s | peak GiB |\n|---|---|---|---|---|")
    for batch in args.batch_sizes:
        if not args.tiny:
            torch.cuda.reset_peak_memory_stats()
        seconds = np.array(latencies(vla, modules, args, batch))
        p50, p95 = np.percentile(seconds * 1000, (50, 95))
        peak = 0.0 if args.tiny else torch.cuda.max_memory_allocated() / 2**30
        print(f"| {batch} | {p50:.1f} | {p95:.1f} | {batch / seconds.mean():.1f} | {peak:.1f} |")


if __name__ == "__main__":
    main(CONFIG)
