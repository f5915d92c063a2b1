"""What every family does to a base model and to a batch before training; without flags, files or data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from prismo.data.dataset import Sample

T = TypeVar("T")


@dataclass(frozen=True)
class Tokenise:
    """Runs in the data workers: token ids of a batch, and which camera views are missing.

    Datasets store a missing view as a black picture; such views take no part in auxiliary losses.

    Attributes:
        text: (instructions, actions [B, K, A], True at actions behind an episode's end [B, K]) -> dataclass of tensors.
    """

    text: Callable[[list[str], np.ndarray, np.ndarray], Any]

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        actions = torch.stack([sample.actions for sample in samples]).numpy()
        is_pad = ~torch.stack([sample.action_mask for sample in samples]).numpy()
        text = self.text([sample.instruction for sample in samples], actions, is_pad)
        there = torch.tensor([[_has_content(view) for view in sample.images] for sample in samples])
        result = {name: value for name, value in vars(text).items() if value is not None}
        return result if there.all() else result | {"view_mask": there}


def _has_content(view: Tensor) -> bool:
    return bool(view[:, ::16, ::16].any()) or bool(view.any())  # almost always the first, which is quick


def text_of(values: dict[str, Tensor], kind: type[T]) -> T:
    """The dataclass of tensors that `Tokenise` took apart."""
    return kind(**{field.name: values.get(field.name) for field in fields(kind)})  # ty: ignore[invalid-argument-type]


def moved(value: Tensor | None, device: torch.device) -> Any:
    """The tensor on another device, or nothing."""
    return None if value is None else value.to(device, non_blocking=True)


def keep_input_dtypes(vla: nn.Module) -> None:
    """Prepare adapters for bf16 autocast: peft would turn every activation into fp32, only for it to be turned back."""
    for module in vla.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def recompute_activations(vla: PreTrainedModel) -> None:
    """Keep only the inputs of each block for the backward pass and compute the rest again."""
    # transformers renamed the method; non-reentrant, because the re-entrant kind detaches the hidden states to align.
    enable = getattr(vla, "activation_checkpointing_enable", None) or vla.gradient_checkpointing_enable
    enable({"use_reentrant": False})
