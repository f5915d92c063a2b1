"""The MLP of the published heads, and what its tensors say of its sizes."""

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
    """LayerNorm, linear, ReLU, residual blocks, LayerNorm, linear: [..., input_dim] -> [..., output_dim]."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, blocks: int = 2) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(input_dim)
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.mlp_resnet_blocks = nn.ModuleList(MLPResNetBlock(hidden_dim) for _ in range(blocks))
        self.layer_norm2 = nn.LayerNorm(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        # Heads keep their own dtype (fp32 masters in training) while the language model hands over bf16.
        x = F.relu(self.fc1(self.layer_norm1(x.to(self.fc1.weight.dtype))))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


def group_by_action(action_hidden: Tensor, chunk: int, action_dim: int) -> Tensor:
    """[B, K*A, D] -> [B, K, A*D]: one row per action holds the hidden states of its A slots."""
    slots = chunk * action_dim
    if action_hidden.ndim != 3 or action_hidden.shape[1] != slots:
        raise ValueError(
            f"the action head expects hidden states [batch, {chunk} * {action_dim} = {slots}, width], "
            f"got {list(action_hidden.shape)}; chunk and action_dim of head and policy must agree"
        )
    return action_hidden.reshape(action_hidden.shape[0], chunk, -1)


def hidden_width(shapes: Shapes | None) -> int | None:
    """Width of the MLP in a file; None without one."""
    return next((shape[0] for name, shape in (shapes or {}).items() if name.endswith("fc1.weight") and shape), None)
