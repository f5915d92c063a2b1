"""Actions as tokens of the language model, a chunk in one pass. Shape legend: see `prismo.models.heads.base`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from prismo.models.bin_tokenizer import BinTokenizer
from prismo.models.heads.base import ActionHead, HeadLoss, HeadSizes, Run, Shapes


@dataclass(frozen=True)
class TokenHead(ActionHead):
    """No modules of its own: the language model's output layer predicts bins."""

    title = "action tokens"
    uses_lm_head = True

    @classmethod
    def build(cls, sizes: HeadSizes, shapes: Shapes | None = None) -> Self:
        return cls()

    def loss(self, run: Run, actions: Tensor, action_mask: Tensor | None) -> HeadLoss:
        """Cross entropy over action tokens and stop token; the LM head sees these positions only."""
        tokens, targets = run.tokens, run.labels[:, 1:]
        supervised = tokens.supervised(targets)
        if action_mask is not None:
            supervised = supervised & _real_tokens(tokens, targets, action_mask, actions.shape[-1])
        logits = run.logits(run.text_states()[supervised])
        wanted = targets[supervised]
        loss = F.cross_entropy(logits, wanted)
        is_action = tokens.mask(wanted)
        predicted = logits.argmax(dim=-1)
        first = tokens.first_action_mask(run.labels, actions.shape[-1])[:, 1:][supervised]
        right = (predicted == wanted).float()
        error = (decode(tokens, predicted) - decode(tokens, wanted)).abs()
        metrics = {}
        for name, where in (("curr_action", is_action & first), ("next_actions", is_action & ~first)):
            metrics[f"{name}_accuracy"] = _mean_where(right, where).detach()
            metrics[f"{name}_l1_loss"] = _mean_where(error, where).detach()
        return HeadLoss(loss, metrics)

    def predict(self, run: Run) -> Tensor:
        return decode(run.tokens, run.logits(run()).argmax(dim=-1)).unflatten(1, run.shape)


def decode(tokens: BinTokenizer, ids: Tensor) -> Tensor:
    """`tokens.decode` without leaving the device of `ids`: bin centres of any shape, float32."""
    centers = torch.as_tensor(tokens.centers, dtype=torch.float32, device=ids.device)
    return centers[(tokens.vocab_size - ids - 1).clamp(0, len(centers) - 1)]


def _real_tokens(tokens: BinTokenizer, targets: Tensor, action_mask: Tensor, action_dim: int) -> Tensor:
    """False at tokens of padded actions [B, L-1]; the stop token stays."""
    real = torch.ones_like(targets, dtype=torch.bool)
    return real.masked_scatter(tokens.mask(targets), action_mask.repeat_interleave(action_dim, dim=1))


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).sum() / where.sum().clamp(min=1)
