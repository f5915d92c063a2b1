"""Is a merged weight base + adapter? Measured without trusting the code that merged it (`prismo.merging.merge`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MergeChecks:
    """How far a merged checkpoint is from base + adapter, as measured by `verify_merge`.

    Attributes:
        weight_error: largest error of a sampled weight in units of the rounding of its dtype (at most 1 is perfect).
        output_error: largest error of a layer's output on a random input, in standard deviations of what rounding the
            weights may cause (10 is the limit).
    """

    weight_error: float
    output_error: float


def compare(before: Tensor, after: Tensor, a: Tensor, b: Tensor, scale: float, seed: int) -> MergeChecks:
    """Error of one merged weight.

    Rounding changes a weight by at most `unit` times itself. With independent normal inputs x the error of an output
    is then normal with a deviation of at most `unit * norm(row)`.
    """
    before, after, a, b = before.flatten(1), after.flatten(1), a.flatten(1).double(), b.flatten(1).double()
    # Differences of 16-bit weights are exact enough in fp32, and twice as fast.
    wide = torch.float32 if after.element_size() <= 2 else torch.float64
    unit, tiny = torch.finfo(after.dtype).eps / 2, torch.finfo(after.dtype).tiny
    x = torch.randn(before.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    change = scale * (b @ (a @ x))
    x = x.to(wide)
    weight_errors, output_errors = [], []
    rows = max(1, 2**18 // before.shape[1])
    for block in range(0, len(before), rows):
        old, new = before[block : block + rows].to(wide), after[block : block + rows].to(wide)
        error = (new - old) @ x - change[block : block + rows]
        output_errors.append((error.abs() / (unit * new.norm(dim=1) + tiny)).max())
        sample = slice(block, min(block + 4, len(before)))
        exact = before[sample].double() + scale * (b[sample] @ a)
        weight_errors.append(((after[sample].double() - exact).abs() / (unit * exact.abs() + tiny)).max())
    # torch's maximum, unlike Python's, passes NaN on.
    return MergeChecks(torch.stack(weight_errors).max().item(), torch.stack(output_errors).max().item())
