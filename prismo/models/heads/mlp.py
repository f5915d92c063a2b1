"""The MLP of the published heads, and what its tensors say of its sizes. Letters: see `prismo.models.heads.base`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from prismo.models.heads.base import Shapes


class MLPResNetBlock(nn.Module):
    """`h + relu(linear(norm(h)))`; the sequential's indices are the published parameter names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class MLPResNet(nn.Module):
    """LayerNorm, linear, ReLU, two residual blocks, LayerNorm, linear over the hidden states of an action's A slots.

    Args:
        input_dim: width D of the language model.
        hidden_dim: width of the MLP; None is D, as in the published heads.
        action_dim: numbers per action A.
        chunk: actions per chunk K.
    """

    def __init__(self, input_dim: int, hidden_dim: int | None, action_dim: int, chunk: int) -> None:
        super().__init__()
        self.action_dim, self.chunk = action_dim, chunk
        hidden_dim = hidden_dim or input_dim
        self.layer_norm1 = nn.LayerNorm(input_dim * action_dim)
        self.fc1 = nn.Linear(input_dim * action_dim, hidden_dim)
        self.mlp_resnet_blocks = nn.Sequential(MLPResNetBlock(hidden_dim), MLPResNetBlock(hidden_dim))
        self.layer_norm2 = nn.LayerNorm(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, action_dim)

    def forward(self, action_hidden: Tensor) -> Tensor:
        """Hidden states of the action slots [B, K*A, D] -> [B, K, A]."""
        slots = self.chunk * self.action_dim
        if action_hidden.ndim != 3 or action_hidden.shape[1] != slots:
            raise ValueError(
                f"the action head expects hidden states [batch, {self.chunk} * {self.action_dim} = {slots}, width], "
                f"got {list(action_hidden.shape)}; chunk and action_dim of head and policy must agree"
            )
        # Heads keep their own dtype (fp32 masters in training) while the language model hands over bf16.
        x = action_hidden.unflatten(1, (self.chunk, -1)).flatten(2).to(self.fc1.weight.dtype)
        x = F.relu(self.fc1(self.layer_norm1(x)))
        return self.fc2(self.layer_norm2(self.mlp_resnet_blocks(x)))


def hidden_width(shapes: Shapes | None) -> int | None:
    """Width of the MLP in a file; None without one."""
    return next((shape[0] for name, shape in (shapes or {}).items() if name.endswith("fc1.weight") and shape), None)
