"""Side inputs as tokens of the language model: proprio, noisy actions and the diffusion timestep.

The policy appends a `ProprioProjector` token (and, with the diffusion head, a `TimeEmbedding` token) to the image
patches, and puts `NoisyActionProjector` outputs into the action slots. `prismo.models.component_files` reads and writes
the two projectors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from prismo.models.vit import Mlp


class ProprioProjector(Mlp):
    """Normalised proprioceptive state `x` [B, proprio_dim] in [-1, 1] -> one token [B, 1, llm_dim]."""

    def __init__(self, llm_dim: int = 4096, proprio_dim: int = 8) -> None:
        super().__init__(proprio_dim, llm_dim, llm_dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.fc1.in_features:
            raise ValueError(
                f"the proprio projector expects [batch, {self.fc1.in_features}], got {list(x.shape)}; "
                "checkpoint and robot must agree on the proprioceptive state"
            )
        return super().forward(x.to(self.fc1.weight.dtype)).unsqueeze(1)


class NoisyActionProjector(Mlp):
    """Noisy normalised actions `x` [B, K, A] -> one token per number [B, K*A, llm_dim]."""

    def __init__(self, llm_dim: int = 4096) -> None:
        super().__init__(1, llm_dim, llm_dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1).unsqueeze(-1).to(self.fc1.weight.dtype))


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of integer diffusion timesteps [B] -> [B, dim], fp32, no parameters.

    The first half holds sines, the second cosines, with frequencies from 1 down to 1/10000 inclusive (Vaswani et al.,
    arXiv 1706.03762, with `half - 1` in the exponent as in DDPM code).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"the time embedding needs an even width of at least 4, got {dim}")
        self.dim = dim

    def forward(self, timesteps: Tensor) -> Tensor:
        half = self.dim // 2
        exponent = torch.arange(half, device=timesteps.device, dtype=torch.float32) / (half - 1)
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * exponent)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)
