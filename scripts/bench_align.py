"""Time and memory of the VGGT teacher and of the whole alignment step, as a table of ratios in one run.

    python scripts/bench_align.py                                   # VGGT-1B sizes, random weights, batch 8 x 2 views
    python scripts/bench_align.py --vggt_path ckpts/vggt_model.pt   # the same with real weights and real differences
    python scripts/bench_align.py --device cpu --vggt_path tiny.pt --batch_size 1

Rows: the teacher called in the original's way (resize on the CPU, every layer's output kept in fp32, fp32 weights under
bf16 autocast, RoPE limits read back by the host twice per block), then ours by weight dtype, then the full alignment
(teacher, pooling, projector, loss, backward). `cosine` compares the features with fp32 without autocast.
"""

from __future__ import annotations

from dataclasses import dataclass

from prismo.util.cli import parse_or_exit


@dataclass
class BenchConfig:
    # VGGT weights; without, VGGT-1B's sizes with random weights
    vggt_path: str | None = None
    # "cuda" or "cpu". Default: the GPU where there is one
    device: str = ""
    # Samples
    batch_size: int = 8
    # Cameras per sample
    views: int = 2
    # Side of the camera images
    pixels: int = 224
    # Vggt_layers_align
    layer: int = -1
    # Width of the VLA
    hidden_size: int = 4096
    # Repetitions of each measurement
    repeats: int = 10


if __name__ == "__main__":
    CONFIG = parse_or_exit(BenchConfig, __doc__)  # before the imports that take seconds

import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from prismo.align import SpatialForcing, VGGTAggregator
from prismo.align.random_teacher import random_vggt
from prismo.align.vggt import load_vggt, resize


def main(args: BenchConfig) -> None:
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(args.device)
    images = torch.rand(args.batch_size, args.views, 3, args.pixels, args.pixels)
    on_device = images.to(device)
    autocast = torch.autocast(device.type, torch.bfloat16)

    model = load(args, torch.float32)
    with torch.no_grad():
        reference = model.features(on_device, args.layer).float().cpu()
    bench = Bench(device, args.repeats, reference)
    print_header(args, model)
    with autocast:
        bench.row("original's way", lambda: original_way(model, images, args.layer, device))
        bench.row("fp32 weights, autocast", lambda: model.features(on_device, args.layer))
    del model
    for compiled in (False, True):
        model = load(args, torch.bfloat16, compile=compiled)
        name = "bf16 weights" + (", compiled" if compiled else "")
        bench.row(name, lambda model=model: model.features(on_device, args.layer))
    some = torch.ones(args.batch_size, args.views, dtype=torch.bool, device=device)
    some[0, -1] = False
    bench.row("  with a view missing", lambda: model.features(on_device, args.layer, some), compare=False)
    if device.type == "cuda":
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            bench.row("  with cuDNN attention", lambda: model.features(on_device, args.layer))
    spatial_forcing = SpatialForcing(model, hidden_size=args.hidden_size)
    hidden = torch.randn(
        args.batch_size, args.views * (args.pixels // 14) ** 2, args.hidden_size, device=device, requires_grad=True
    )
    bench.row("alignment, with backward", lambda: alignment(spatial_forcing, on_device, hidden), compare=False)


def load(args: BenchConfig, dtype: torch.dtype, *, compile: bool = False) -> VGGTAggregator:
    build = load_vggt if args.vggt_path else random_vggt
    return build(args.vggt_path, dtype=dtype, device=args.device, compile=compile)


@torch.no_grad()
def original_way(model: VGGTAggregator, images: Tensor, layer: int, device: torch.device) -> Tensor:
    """The same network, called as Spatial Forcing's training script calls it."""
    resized = resize(images, model.config.image_size, model.config.patch_size).to(device)
    limits = torch.arange(resized.shape[-1] // model.config.patch_size + 1, device=device)
    outputs: list[Tensor] = []
    with listening(model, lambda output: outputs.append(output.float()), lambda: (limits.max().item(),) * 2):
        model(resized, -1)
    pairs = [torch.cat([f.flatten(0, -2), g.flatten(0, -2)], dim=-1) for f, g in zip(*[iter(outputs)] * 2, strict=True)]
    side = resized.shape[-1] // model.config.patch_size
    chosen = pairs[layer].view(*images.shape[:2], -1, model.width)
    return chosen[:, :, model.patch_start_idx :].unflatten(2, (side, side))


@contextmanager
def listening(model: VGGTAggregator, keep: Callable[[Tensor], None], sync: Callable[[], object]) -> Generator[None]:
    """Keep every block's output, and let the host wait twice before each block."""
    hooks = []
    for block in (*model.frame_blocks, *model.global_blocks):
        hooks.append(block.register_forward_hook(lambda module, inputs, output: keep(output)))
        hooks.append(block.get_submodule("attn.q_norm").register_forward_hook(lambda *_: sync() and None))
        hooks.append(block.get_submodule("attn.k_norm").register_forward_hook(lambda *_: sync() and None))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def alignment(spatial_forcing: SpatialForcing, images: Tensor, hidden: Tensor) -> None:
    with torch.autocast(hidden.device.type, torch.bfloat16):
        loss, _ = spatial_forcing(images, hidden)
    loss.backward()


class Bench:
    """Measures callables and prints one table row for each."""

    def __init__(self, device: torch.device, repeats: int, reference: Tensor) -> None:
        self.device, self.repeats, self.reference = device, repeats, reference
        self.first: float | None = None

    def row(self, name: str, run: Callable[[], Tensor | None], *, compare: bool = True) -> None:
        with torch.no_grad() if compare else nullcontext():
            output = run()  # warm-up: compilation, cached tables, cuDNN plans
            cosine = self.cosine(output) if compare and output is not None else "-"
            del output
            run()
            peak = self.peak_memory(run)
            seconds = statistics.median(self.seconds(run) for _ in range(self.repeats))
        self.first = self.first or seconds
        print(
            f"| {name:26} | {1e3 * seconds:8.1f} | {self.first / seconds:6.2f} | {peak:>8} | {cosine:>8} |", flush=True
        )

    def seconds(self, run: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def peak_memory(self, run: Callable[[], object]) -> str:
        """GiB allocated on top of what was there (weights), or "-" off the GPU."""
        if self.device.type != "cuda":
            return "-"
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.wait()
        return f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f}"

    def cosine(self, output: Tensor) -> str:
        return f"{torch.cosine_similarity(output.float().cpu(), self.reference, dim=-1).mean():.5f}"

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def print_header(args: BenchConfig, model: VGGTAggregator) -> None:
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    print(
        f"{name}, torch {torch.__version__}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, "
        f"batch {args.batch_size} x {args.views} views, layer {args.layer}\n"
    )
    print(f"| {'':26} | {'ms':>8} | {'ratio':>6} | {'GiB':>8} | {'cosine':>8} |")
    print(f"|{'-' * 28}|{'-' * 9}:|{'-' * 7}:|{'-' * 9}:|{'-' * 9}:|")


if __name__ == "__main__":
    main(CONFIG)
