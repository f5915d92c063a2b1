"""Full-size models with random weights, built directly on a device: for benchmarks, where only sizes matter.

Nothing is read from or written to disk, and no default initialisation runs: 7.5 B parameters take seconds on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from transformers.initialization import no_init_weights

from prismo.align.vggt import VGGTAggregator
from prismo.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction
from prismo.models.random_weights import fill_random

M = TypeVar("M", bound=nn.Module)


def build_openvla_7b(
    device: torch.device | str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, config: OpenVLAConfig | None = None
) -> OpenVLAForActionPrediction:
    """OpenVLA-7B (7,541,237,184 parameters, 15.1 GB in bf16) in evaluation mode.

    Args:
        device: where the weights are allocated and drawn.
        dtype: of the weights; rotary frequencies stay fp32.
        seed: of the weights.
        config: another size.
    """
    return _build(lambda: OpenVLAForActionPrediction(config or OpenVLAConfig()), device, dtype, seed)


def build_vggt_1b(device: torch.device | str, dtype: torch.dtype = torch.float32, seed: int = 0) -> VGGTAggregator:
    """VGGT-1B's aggregator (909,112,320 parameters), frozen and in evaluation mode."""
    return _build(VGGTAggregator, device, dtype, seed).requires_grad_(False)


def _build(make: Callable[[], M], device: torch.device | str, dtype: torch.dtype, seed: int) -> M:
    """Allocate without initialisation, then draw every parameter on the device."""
    with torch.device(device), _default_dtype(dtype), no_init_weights():
        model = make()
    fill_random(model, seed)
    return model.eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
