"""Discrete action tokens of OpenVLA: the last 256 ids of the Llama vocabulary stand for bins of [-1, 1].

Used by the processor (training labels), by discrete OFT checkpoints and by vanilla OpenVLA
(arXiv 2406.09246).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class BinTokenizer:
    """Between normalised actions and token ids.

    Attributes:
        vocab_size: ids of the tokenizer without padding rows (32,000); bin d has the id `vocab_size - d`.
        bins: number of bin edges over [-1, 1] (256 edges, 255 centres).
    """

    vocab_size: int = 32000
    bins: int = 256

    @property
    def edges(self) -> np.ndarray:
        """Bin edges [bins], float64."""
        return np.linspace(-1.0, 1.0, self.bins)

    @property
    def centers(self) -> np.ndarray:
        """Bin centres [bins - 1], float64, from -0.996 to 0.996."""
        return (self.edges[:-1] + self.edges[1:]) / 2

    @property
    def first_id(self) -> int:
        """Every action id is greater than this one (31,743)."""
        return self.vocab_size - self.bins - 1

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Normalised actions of any shape -> int64 ids; -1 gives 31,999 and +1 gives 31,744."""
        return self.vocab_size - np.digitize(np.clip(actions, -1.0, 1.0), self.edges).astype(np.int64)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Ids of any shape -> bin centres, float64. An id outside the action block gives the nearest bin."""
        return self.centers[np.clip(self.vocab_size - np.asarray(ids) - 1, 0, self.bins - 2)]

    def mask(self, labels: Tensor) -> Tensor:
        """True at the action tokens of `labels` [..., L]; the stop token and ignored positions are False.

        The original splits this mask into "current action" and "next actions" by counting labelled tokens; their union
        is what the model needs, and `labels > first_id` already excludes -100 and the stop id 2.
        """
        return labels > self.first_id

    def supervised(self, labels: Tensor) -> Tensor:
        """True at the tokens that are to be predicted: action tokens and stop token."""
        return labels != IGNORE_INDEX

    def first_action_mask(self, labels: Tensor, action_dim: int) -> Tensor:
        """True at the tokens of the first action of each chunk (for the "current action" metrics)."""
        count = torch.cumsum(self.supervised(labels), dim=-1)
        return self.mask(labels) & (count <= action_dim)
