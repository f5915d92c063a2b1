"""Side inputs as tokens of the language model: proprio, noisy actions and the diffusion timestep.

The policy appends a `ProprioProjector` token (and, with the diffusion head, a `TimeEmbedding` token) to the image
patches, and puts `NoisyActionProjector` outputs into the action slots. `prismo.models.component_files` reads and writes
the two projectors.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _TwoLayerProjector(nn.Module):
    """Linear, exact (erf) GELU, linear, under the published names `fc1` and `fc2`."""

    def __init__(self, input_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_dim, llm_dim)
        self.fc2 = nn.Linear(llm_dim, llm_dim)

    def _project(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x.to(self.fc1.weight.dtype))))


class ProprioProjector(_TwoLayerProjector):
    """Normalised proprioceptive state [B, proprio_dim] in [-1, 1] -> one token [B, 1, llm_dim]."""

    def __init__(self, llm_dim: int = 4096, proprio_dim: int = 8) -> None:
        super().__init__(proprio_dim, llm_dim)

    def forward(self, proprio: Tensor) -> Tensor:
        if proprio.ndim != 2 or proprio.shape[1] != self.fc1.in_features:
            raise ValueError(
                f"the proprio projector expects [batch, {self.fc1.in_features}], got {list(proprio.shape)}; "
                "checkpoint and robot must agree on the proprioceptive state"
            )
        return self._project(proprio).unsqueeze(1)


class NoisyActionProjector(_TwoLayerProjector):
    """Noisy normalised actions [B, K, A] -> one token per number [B, K*A, llm_dim]."""

    def __init__(self, llm_dim: int = 4096) -> None:
        super().__init__(1, llm_dim)

    def forward(self, actions: Tensor) -> Tensor:
        return self._project(actions.flatten(1).unsqueeze(-1))


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
