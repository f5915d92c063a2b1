"""The control arm: an aggregator of VGGT's shapes that was never trained.

A gain over this teacher comes from VGGT's geometry; a gain of this teacher over no alignment at all comes from the
auxiliary loss as such.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from prismo.align.vggt import VGGTAggregator, VGGTConfig, read_config


@torch.no_grad()
def random_vggt(
    path: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    compile: bool = False,
    config: VGGTConfig | None = None,
    seed: int = 0,
) -> VGGTAggregator:
    """A frozen aggregator with VGGT's initialisation instead of its weights; the same on every device and rank.

    Args:
        path: a VGGT file whose sizes are taken over; the weights in it are not read.
        dtype, device, compile: see `load_vggt`.
        config: sizes when there is no file; None = VGGT-1B (909 million parameters).
        seed: of the weights.
    """
    if path is not None:
        config = read_config(path)
    with torch.device("meta"):
        model = VGGTAggregator(config)
    model.to(dtype).to_empty(device=device)
    generator = torch.Generator().manual_seed(seed)
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm):
                parameter.fill_(1.0 if name == "weight" else 0.0)
            elif name == "gamma":
                # LayerScale starts at 1 in the patch embedder and at 0.01 in the aggregator's blocks.
                parameter.fill_(1.0 if module_name.startswith("patch_embed") else 0.01)
            elif name == "bias":
                parameter.zero_()
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(0.02))
    if compile:
        model.compile_blocks()
    return model.requires_grad_(False).eval()
