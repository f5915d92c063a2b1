"""What the LoRA, FiLM and merge tests share beside fixtures."""

from pathlib import Path
from types import SimpleNamespace

import torch

from prismo.models.lora import LoraSpec, lora_parameters
from prismo.models.openvla import OpenVLAForActionPrediction

SPEC = LoraSpec(rank=4, alpha=2)


def load(folder: Path) -> OpenVLAForActionPrediction:
    """The model of a folder in fp32."""
    return OpenVLAForActionPrediction.from_pretrained(folder, dtype=torch.float32, self_test=False)


def action_states(model: OpenVLAForActionPrediction, batch: SimpleNamespace) -> torch.Tensor:
    """What a head sees: [B, T, D]."""
    out = model(batch.text.input_ids, batch.text.attention_mask, batch.pixel_values, action_mask=batch.mask)
    return out.action_states(batch.mask)


def randomize_lora(model: OpenVLAForActionPrediction, seed: int = 0) -> None:
    """Make the adapter do something: B is zero after initialisation."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in lora_parameters(model).items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1
