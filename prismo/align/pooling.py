"""From the teacher's feature grid to the VLA's patch grid: position embedding and pooling.

`prismo.align.SpatialForcing` calls `pool`. Spatial Forcing adds VGGT's sinusoidal position embedding, scaled by 0.1, to
the features before it resamples them, because the aggregator's output hardly encodes where a patch is.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_SCALE = 0.1
_BASE = 100.0


def uv_position_embedding(rows: int, columns: int, width: int) -> Tensor:
    """VGGT's embedding of normalised image coordinates, already scaled by 0.1.

    The coordinates of cell centres lie on a rectangle with the image's aspect ratio and a half diagonal of 1. Each
    coordinate gives width / 4 sines and as many cosines, x first, with frequencies 100^(-k / (width / 4)).

    Args:
        rows, columns: the grid; its cells are taken to be square.
        width: channels, a multiple of 4.

    Returns:
        [rows, columns, width], fp32 on the CPU.
    """
    diagonal = (rows**2 + columns**2) ** 0.5
    axes = []
    for cells in (columns, rows):
        end = cells / diagonal * (cells - 1) / cells
        axes.append(torch.linspace(-end, end, cells).double())
    frequency = _BASE ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    x, y = (axis[:, None] * frequency for axis in axes)
    embedded_x = torch.cat([x.sin(), x.cos()], dim=-1)[None].expand(rows, -1, -1)
    embedded_y = torch.cat([y.sin(), y.cos()], dim=-1)[:, None].expand(-1, columns, -1)
    return torch.cat([embedded_x, embedded_y], dim=-1).float() * _SCALE


def pool(features: Tensor, grid: tuple[int, int], *, position: bool) -> Tensor:
    """Resample every view to the VLA's grid (bilinear, corners aligned), in fp32.

    Args:
        features: [B, V, h, w, D].
        grid: rows and columns of the VLA's patches.
        position: add the position embedding.

    Returns:
        [B, V * rows * columns, D], views one after the other, row-major.
    """
    batch, rows, columns, width = features.shape[0], *features.shape[2:]
    with torch.autocast(features.device.type, enabled=False):
        pooled = _bilinear(features.flatten(0, 1).float(), grid)
        if position:
            # Resampling is linear, so the embedding may be added behind it: 256 instead of 1369 cells, and only once.
            pooled = pooled + _pooled_position((rows, columns), grid, width, features.device)
    return pooled.reshape(batch, -1, width)


def _bilinear(grid_features: Tensor, grid: tuple[int, int]) -> Tensor:
    """[N, h, w, D] -> [N, *grid, D]; channels stay the innermost axis in memory."""
    image = grid_features.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return F.interpolate(image, size=grid, mode="bilinear", align_corners=True).permute(0, 2, 3, 1)


@lru_cache(maxsize=8)
def _pooled_position(source: tuple[int, int], grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    return _bilinear(uv_position_embedding(*source, width)[None], grid).to(device)
