"""Golden figures: outputs of the original implementations on weights and inputs drawn from names alone.

A golden folder holds sizes (JSON) and figures (npz) but no weights: every weight and input comes from a generator
seeded by crc32("<salt>:<name>"), where the salt is the folder's name. `pub-1` beside this file is used unless
`PRISMO_GOLDEN` names another folder. README.md says what is in it.

Nothing here may assume a size: another folder has other widths, depths and prompt lengths.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_SHIPPED = Path(__file__).resolve().parent / "pub-1"
_GAINS = ("weight", "gamma", "scale_factor")


def golden_folder() -> Path:
    """The folder of golden figures."""
    folder = Path(os.environ.get("PRISMO_GOLDEN") or _SHIPPED).resolve()
    if not folder.is_dir():
        raise NotADirectoryError(f"no golden figures at {folder}; without PRISMO_GOLDEN those of {_SHIPPED} are used")
    return folder


def salt(part: str = "") -> str:
    """The folder's salt; `part` selects a group of weights, e.g. "aggregator" or "action_head"."""
    name = golden_folder().name
    return f"{name}:{part}" if part else name


def sizes(file: str) -> dict[str, Any]:
    """A JSON file of the folder: tensor shapes or a model config."""
    return json.loads((golden_folder() / file).read_text(encoding="utf-8"))


def figures(file: str) -> dict[str, Tensor]:
    """The arrays of an npz file of the folder."""
    with np.load(golden_folder() / file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def generator(salt: str, name: str) -> torch.Generator:
    """The random stream that belongs to one name."""
    return torch.Generator().manual_seed(zlib.crc32(f"{salt}:{name}".encode()))


def weight(salt: str, name: str, shape: Sequence[int]) -> Tensor:
    """One parameter: matrices N(0, 0.49 / fan_in), gains 1 + N(0, 0.01), other vectors N(0, 0.0004)."""
    value = torch.randn(tuple(shape), generator=generator(salt, name))
    if value.ndim >= 2:
        return value * (0.7 / math.sqrt(max(1, value.numel() // value.shape[0])))
    return 1 + 0.1 * value if name.endswith(_GAINS) else 0.02 * value


@torch.no_grad()
def fill(module: nn.Module, salt: str, rename: Callable[[str], str] = lambda name: name) -> nn.Module:
    """Draw every parameter of `module` in place; `rename` maps our parameter name to the recipe's."""
    for name, parameter in module.named_parameters():
        parameter.copy_(weight(salt, rename(name), parameter.shape))
    return module


def uniform_input(key: str, *shape: int) -> Tensor:
    """An input drawn uniformly from [0, 1), e.g. `uniform_input("img", 2, 2, 3, 224, 224)`."""
    return torch.rand(shape, generator=generator(salt(), f"in:{key}"))


def normal_input(key: str, *shape: int) -> Tensor:
    """An input drawn from N(0, 1), e.g. `normal_input("proprio", 2, 8)`."""
    return torch.randn(shape, generator=generator(salt(), f"in:{key}"))


def images() -> Tensor:
    """The camera images of the OpenVLA cases: [2 samples, 2 views, 3, 224, 224] in [0, 1)."""
    return uniform_input("img", 2, 2, 3, 224, 224)


def close(actual: Tensor, expected: Tensor, rel: float = 1e-4) -> None:
    """Assert the largest error to be at most `rel` times the largest expected magnitude."""
    actual = actual.detach().double().cpu()
    expected = expected.double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= rel, f"relative error {error:.2e} exceeds {rel:.0e}"
