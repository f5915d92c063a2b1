"""The control arm: an aggregator of VGGT's shapes that was never trained.

A gain over this teacher comes from VGGT's geometry; a gain of this teacher over no alignment at all comes from the
auxiliary loss as such.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from prismo.align.vggt import VGGTAggregator, VGGTConfig, read_config

_LOG = logging.getLogger(__name__)


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
        path: a VGGT file whose sizes are taken over; the weights in it are not read. It need not be there.
        dtype, device, compile: see `load_vggt`; on the device "meta" no weights are made.
        config: sizes when there is no file; None = VGGT-1B (909 million parameters).
        seed: of the weights.
    """
    if path is not None and Path(path).exists():
        config = read_config(path)
    elif path is not None:
        _LOG.info("there is no %s: the random teacher has the sizes of VGGT-1B", path)
    with torch.device("meta"):
        model = VGGTAggregator(config or VGGTConfig())
    model.to(dtype)
    if torch.device(device).type != "meta":
        _initialise(model.to_empty(device=device), seed)
    if compile:
        model.compile_blocks()
    return model.requires_grad_(False).eval()


def _initialise(model: VGGTAggregator, seed: int) -> None:
    """Weights as VGGT's training starts with; drawn on the CPU, so that they are the same everywhere."""
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
