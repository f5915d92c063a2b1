"""Random weights that keep activations in a sane range; used by tiny checkpoints and full-size benchmark models."""

from __future__ import annotations

import math

import torch
from torch import nn


@torch.no_grad()
def fill_random(module: nn.Module, seed: int) -> None:
    """Overwrite every parameter on its own device.

    Matrices and convolutions are normal with deviation `0.7 / sqrt(fan_in)`, gains and LayerScale close to 1, biases
    close to 0. The same seed gives the same weights on the same kind of device. Buffers stay as they are, and so do
    parameters on the meta device, which have no values.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            continue
        if parameter.device not in generators:
            generators[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
        generator = generators[parameter.device]
        if parameter.ndim >= 2:
            fan_in = parameter.numel() // parameter.shape[0]
            parameter.normal_(0.0, 0.7 / math.sqrt(fan_in), generator=generator)
        elif name.endswith(("weight", "gamma", "scale_factor")):
            parameter.normal_(1.0, 0.1, generator=generator)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
