"""Pictures of a run: the contact sheet of a batch with its numbers, and cosine maps over the camera images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from prismo.data.names import view_name
from prismo.util.files import atomic_write

_MARGIN = 4
_LINE = 14  # height of a line of text
_CELL = 56  # width of a number
# Low to high: dark blue, teal, yellow (perceptually ordered, readable with colour blindness).
_COLORS = torch.tensor([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]) / 255
# Of all cosine maps, so that those of two steps or two runs can be compared. Features below 0 are merely unlike.
_LOW, _HIGH = 0.0, 1.0


@dataclass(frozen=True)
class Table:
    """Numbers beside a sample: a heading, names of the columns, and rows of texts; rows may be shorter."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Row:
    """One sample of a sheet: pictures [V, 3, H, W] in [0, 1], the lines under them, and tables beside them."""

    views: Tensor
    lines: Sequence[str]
    tables: Sequence[Table] = ()


def contact_sheet(title: str, view_names: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """Samples as rows, views as columns with their names above."""
    height, width = rows[0].views.shape[-2:]
    text = [len(row.lines) * _LINE for row in rows]
    beside = [_table_size(row.tables) for row in rows]
    heights = [max(height + below, side[1]) + 3 * _MARGIN for below, side in zip(text, beside, strict=True)]
    pictures = len(view_names) * (width + _MARGIN)
    top = 2 * (_LINE + _MARGIN)
    sheet = Image.new("RGB", (pictures + max(s[0] for s in beside) + 3 * _MARGIN, top + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, fill="black")
    for view, name in enumerate(view_names):
        draw.text((_MARGIN + view * (width + _MARGIN), _MARGIN + _LINE), name, fill="black")
    for row, used in zip(rows, heights, strict=True):
        for view, image in enumerate(row.views):
            sheet.paste(_to_image(image), (_MARGIN + view * (width + _MARGIN), top))
        for number, line in enumerate(row.lines):
            draw.text((_MARGIN, top + height + _MARGIN + number * _LINE), line, fill="black")
        _draw_tables(draw, (pictures + 2 * _MARGIN, top), row.tables)
        top += used
    return sheet


def cosine_sheet(images: Tensor, cosine: Tensor, title: str) -> Image.Image:
    """Each view beside its cosine map, the means under it and the scale of the colours at the end.

    Args:
        images: [B, V, 3, H, W] in [0, 1].
        cosine: [B, V, rows, columns].
        title: what is compared.
    """
    images, cosine = images.cpu(), cosine.float().cpu()
    size = images.shape[-2:]
    rows = []
    for sample, grids in zip(images, cosine, strict=True):
        panels = []
        for image, grid in zip(sample, grids, strict=True):
            blocks = F.interpolate(grid[None, None], size=size, mode="nearest")[0, 0]
            panels += [image, 0.35 * image + 0.65 * _colorize(blocks)]
        means = ", ".join(f"{view_name(i)} {value:.3f}" for i, value in enumerate(grids.mean(dim=(-2, -1)).tolist()))
        rows.append(Row(torch.stack(panels), [f"mean cosine: {means}"]))
    names = [text for view in range(images.shape[1]) for text in (view_name(view), f"{view_name(view)}, cosine")]
    return _with_color_bar(contact_sheet(title, names, rows))


def save_picture(picture: Image.Image, path: Path) -> Path:
    """Write a PNG atomically."""
    with atomic_write(path) as temporary:
        picture.save(temporary, "PNG")
    return path


def _table_size(tables: Sequence[Table]) -> tuple[int, int]:
    """Width and height of tables below each other, in pixels."""
    widths = [_CELL * max(len(table.columns), *map(len, table.rows)) for table in tables]
    return max(widths, default=0), sum((len(table.rows) + 3) * _LINE for table in tables)


def _draw_tables(draw: ImageDraw.ImageDraw, corner: tuple[int, int], tables: Sequence[Table]) -> None:
    left, top = corner
    for table in tables:
        draw.text((left, top), table.title, fill="black")
        for number, row in enumerate((table.columns, *table.rows)):
            for column, cell in enumerate(row):
                place = (left + column * _CELL, top + (number + 1) * _LINE)
                draw.text(place, cell, fill="black" if number else "gray")
        top += (len(table.rows) + 3) * _LINE


def _with_color_bar(sheet: Image.Image) -> Image.Image:
    """The sheet with the scale of the colours and its numbers under it."""
    width, height = 256, 12
    ramp = _colorize(torch.linspace(_LOW, _HIGH, width).expand(height, width))
    whole = Image.new("RGB", (sheet.width, sheet.height + height + _LINE + 3 * _MARGIN), "white")
    whole.paste(sheet, (0, 0))
    whole.paste(_to_image(ramp), (_MARGIN, sheet.height + _MARGIN))
    draw = ImageDraw.Draw(whole)
    below = sheet.height + height + 2 * _MARGIN
    for share, text in ((0.0, f"{_LOW:g} and less"), (0.5, f"{(_LOW + _HIGH) / 2:g}"), (1.0, f"{_HIGH:g}")):
        draw.text((_MARGIN + share * width, below), text, fill="black", anchor="la" if share == 0 else "ma")
    draw.text((_MARGIN + width + 6 * _MARGIN, sheet.height + _MARGIN), "cosine of each patch", fill="black")
    return whole


def _colorize(values: Tensor) -> Tensor:
    """[H, W] -> [3, H, W] by linear interpolation in `_COLORS`."""
    place = ((values - _LOW) / (_HIGH - _LOW)).clamp(0, 1) * (len(_COLORS) - 1)
    below = place.floor().long().clamp(max=len(_COLORS) - 2)
    fraction = (place - below)[..., None]
    return (_COLORS[below] * (1 - fraction) + _COLORS[below + 1] * fraction).permute(2, 0, 1)


def _to_image(image: Tensor) -> Image.Image:
    array = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array))
