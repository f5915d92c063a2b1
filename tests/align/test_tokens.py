"""Slicing of hidden states."""

import pytest
import torch
from torch import nn

from prismo.align import LayerTap, vision_tokens


def test_vision_tokens_start_behind_bos() -> None:
    hidden = torch.arange(10.0)[None, :, None]  # BOS | 6 patches | proprio | text
    assert vision_tokens(hidden, 6).flatten().tolist() == [1, 2, 3, 4, 5, 6]
    assert vision_tokens(hidden, 6, start=0).flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_shift_ends_at_the_token_behind_the_patches() -> None:
    hidden = torch.arange(10.0)[None, :, None]
    assert vision_tokens(hidden, 6, shift=True).flatten().tolist() == [2, 3, 4, 5, 6, 7]


def test_too_short_a_sequence_is_an_error() -> None:
    hidden = torch.zeros(1, 7, 4)
    assert vision_tokens(hidden, 6).shape[1] == 6
    with pytest.raises(ValueError, match="6 vision tokens from position 2, but the sequence has 7"):
        vision_tokens(hidden, 6, shift=True)


def test_tap_gives_the_latest_output_once() -> None:
    layer = nn.Linear(3, 3)
    tap = LayerTap(layer)
    layer(torch.zeros(1, 3))
    output = layer(torch.ones(1, 3))
    assert tap.take() is output
    with pytest.raises(RuntimeError, match="has not run"):
        tap.take()
    tap.remove()
    layer(torch.ones(1, 3))
    with pytest.raises(RuntimeError, match="has not run"):
        tap.take()
