"""Pictures of a run: the contact sheet of a batch, and cosine maps over the camera images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from prismo.util.files import atomic_write

_MARGIN = 4
_LINE = 14  # height of a line of text
# Low to high: dark blue, teal, yellow (perceptually ordered, readable with colour blindness).
_COLORS = torch.tensor([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]) / 255


def contact_sheet(images: Tensor, captions: Sequence[str]) -> Image.Image:
    """Samples as rows, views as columns, a caption under each row; images [B, V, 3, H, W] in [0, 1]."""
    batch, views, _, height, width = images.shape
    row = height + _LINE + 2 * _MARGIN
    sheet = Image.new("RGB", (views * (width + _MARGIN) + _MARGIN, batch * row + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(batch):
        top = _MARGIN + i * row
        for view in range(views):
            sheet.paste(_to_image(images[i, view]), (_MARGIN + view * (width + _MARGIN), top))
        draw.text((_MARGIN, top + height + _MARGIN), captions[i], fill="black")
    return sheet


def cosine_sheet(images: Tensor, cosine: Tensor) -> Image.Image:
    """Each view beside its cosine map, with the scale and the means written under it.

    Args:
        images: [B, V, 3, H, W] in [0, 1].
        cosine: [B, V, rows, columns]; its range is that of the colours.
    """
    images, cosine = images.cpu(), cosine.float().cpu()
    low, high = cosine.min().item(), cosine.max().item()
    size = images.shape[-2:]
    panels = []
    for image, grid in zip(images.flatten(0, 1), cosine.flatten(0, 1), strict=True):
        blocks = F.interpolate(grid[None, None], size=size, mode="nearest")[0, 0]
        panels.append(torch.cat([image, 0.35 * image + 0.65 * _colorize(blocks, low, high)], dim=-1))
    stacked = torch.stack(panels).unflatten(0, images.shape[:2])
    captions = [
        f"cosine {low:.2f} (dark) to {high:.2f} (bright); mean of views: "
        + ", ".join(f"{value:.3f}" for value in sample.mean(dim=(-2, -1)).tolist())
        for sample in cosine
    ]
    return contact_sheet(stacked, captions)


def save_picture(picture: Image.Image, path: Path) -> Path:
    """Write a PNG atomically."""
    with atomic_write(path) as temporary:
        picture.save(temporary, "PNG")
    return path


def _colorize(values: Tensor, low: float, high: float) -> Tensor:
    """[H, W] -> [3, H, W] by linear interpolation in `_COLORS`."""
    place = ((values - low) / max(high - low, 1e-6)).clamp(0, 1) * (len(_COLORS) - 1)
    below = place.floor().long().clamp(max=len(_COLORS) - 2)
    fraction = (place - below)[..., None]
    return (_COLORS[below] * (1 - fraction) + _COLORS[below + 1] * fraction).permute(2, 0, 1)


def _to_image(image: Tensor) -> Image.Image:
    array = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array))
