"""Regression of the actions (OpenVLA-OFT, arXiv 2502.19645). Shape legend: see `prismo.models.heads.base`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from prismo.models.heads.base import ActionHead, HeadLoss, HeadSizes, Run, Shapes, masked_mean
from prismo.models.heads.mlp import MLPResNet, hidden_width


class L1RegressionActionHead(nn.Module):
    """Regresses a whole chunk in one pass; sizes as in `MLPResNet`."""

    def __init__(
        self, input_dim: int = 4096, hidden_dim: int | None = None, action_dim: int = 7, chunk: int = 8
    ) -> None:
        super().__init__()
        self.model = MLPResNet(input_dim, hidden_dim, action_dim, chunk)

    def forward(self, action_hidden: Tensor) -> Tensor:
        """Hidden states of the action slots [B, K*A, D] -> normalised actions [B, K, A], nominally in [-1, 1]."""
        return self.model(action_hidden)


@dataclass(frozen=True)
class L1Head(ActionHead):
    """The head as training and prediction use it."""

    action_head: L1RegressionActionHead

    title = "an L1 head"
    mark = "model.fc1."
    flag = "use_l1_regression"

    @classmethod
    def build(cls, sizes: HeadSizes, shapes: Shapes | None = None) -> Self:
        return cls(L1RegressionActionHead(sizes.width, hidden_width(shapes), sizes.action_dim, sizes.chunk))

    def loss(self, run: Run, actions: Tensor, action_mask: Tensor | None) -> HeadLoss:
        predicted = self.action_head(run()).float()
        # fp32: the original took the mean of bf16 differences, which resolves the loss to 0.4 %.
        errors = (predicted - actions.float()).abs()
        detached = errors.detach()
        following = None if action_mask is None else action_mask[:, 1:]
        metrics = {
            "curr_action_l1_loss": detached[:, 0].mean(),  # the first action of a window is always real
            "next_actions_l1_loss": masked_mean(detached[:, 1:], following),
        }
        return HeadLoss(masked_mean(errors, action_mask), metrics, predicted)

    def predict(self, run: Run) -> Tensor:
        return self.action_head(run())
