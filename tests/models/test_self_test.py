"""The check after loading runs on whatever a checkpoint may be loaded as."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prismo.models.openvla import OpenVLAForActionPrediction
from prismo.models.self_test import SelfTestError


class Int8Linear(nn.Module):
    """As bitsandbytes' layers: integers as parameters, computed in the dtype of the input."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.scale = layer.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), bias)


def test_damaged_weights(tiny_base):
    """They were taken for another kind of attention."""
    model = OpenVLAForActionPrediction.from_pretrained(tiny_base, dtype=torch.float32, self_test=False)
    model.language_model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(SelfTestError, match="not finite"):
        model.self_test()


def test_quantised_models(tiny_base):
    """The pixels took their dtype from a layer that holds integers then."""
    model = OpenVLAForActionPrediction.from_pretrained(tiny_base, dtype=torch.bfloat16, self_test=False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, Int8Linear(layer))
    assert not next(model.projector.parameters()).is_floating_point()
    model.self_test()
