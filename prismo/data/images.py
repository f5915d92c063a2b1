"""The image arithmetic of training, evaluation and serving, in one place, with TensorFlow's pixels but without it.

The trainer calls `prepare_images` on a batch on its device, policies call `observation_image` on a camera frame, the
dataset calls `decode_image` in its workers. Layout: batched functions take and return torch uint8 [..., 3, H, W] (RGB,
0..255, any memory format, CPU or GPU); functions on one camera frame take numpy uint8 [H, W, 3].

The original does these steps with TensorFlow ops, and policies see the difference between two image libraries. Decode,
JPEG round trip, resize and center crop give TensorFlow's bytes; in the augmentation chain a few values in a million
differ by one level, because a mean over the image is summed in another order.
"""

from __future__ import annotations

import ctypes
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import embedding_bag

from prismo.data.hashing import mix, uniform

CROP_AREA = 0.9  # of the random crops in training, and of the center crop that evaluation takes for them
_LANCZOS_RADIUS = 3
_FULL = 255.5  # 1.0 as a uint8: truncating x * 255.5 rounds, as `tf.image.convert_image_dtype` does


def decode_image(data: bytes, out: np.ndarray | None = None) -> np.ndarray:
    """RGB uint8 [H, W, 3] of an encoded JPEG or PNG.

    JPEGs are decoded with the fast integer DCT, which is the default of `tf.io.decode_image`; Pillow and OpenCV use the
    accurate one and disagree with it in most pixels (by up to 13 levels on a LIBERO frame at quality 95).

    Args:
        out: where to put the image, contiguous and of its shape; saves a copy.

    Raises:
        ValueError: not a readable image, or not of the shape of `out`.
    """
    try:
        if data[:2] == b"\xff\xd8":
            image = simplejpeg.decode_jpeg(data, "RGB", fastdct=True, buffer=out)
        else:
            image = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
            if out is not None and image.shape == out.shape:
                out[...] = image
    except (OSError, ValueError) as error:
        raise ValueError(f"not a readable JPEG or PNG ({len(data)} bytes): {error}") from error
    if out is not None and image.shape != out.shape:
        raise ValueError(f"image of {image.shape[0]}x{image.shape[1]} pixels, expected {out.shape[0]}x{out.shape[1]}")
    return image


def encode_jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    """JPEG bytes (4:2:0) of uint8 [H, W, 3]; the same coefficients as `tf.io.encode_jpeg`."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def jpeg_round_trip(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] after JPEG (quality 95, 4:2:0) and back.

    Training images are stored as JPEG; a camera frame at evaluation gets the same compression noise.
    """
    return decode_image(encode_jpeg(image))


def observation_image(image: np.ndarray, size: int = 224, *, jpeg: bool = True, crop: bool = True) -> Tensor:
    """What a policy sees of one camera frame: JPEG round trip, lanczos3 to `size`, center crop of 90 % of the area.

    Args:
        image: uint8 [H, W, 3], already upright.
        crop: for policies trained with image augmentation, whose training images are random crops of that area.

    Returns:
        uint8 [3, size, size].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"expected an RGB image uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    frame = torch.from_numpy(jpeg_round_trip(image) if jpeg else np.ascontiguousarray(image)).permute(2, 0, 1)
    frame = resize_lanczos3(frame, size)
    return center_crop(frame) if crop else frame


def prepare_images(images: Tensor, size: int, seeds: Tensor | None = None, *, crop: bool = False) -> Tensor:
    """Training images of a batch: lanczos3 resize, then (with `seeds`) the augmentation, each view on its own.

    Args:
        images: uint8 [B, V, 3, H, W] on any device.
        seeds: int64 [B] of `sample_seeds`, on the CPU; None leaves the augmentation out (validation).
        crop: take the center crop, as at evaluation.

    Returns:
        uint8 [B, V, 3, size, size] on the same device. The resize is the quick one (see `resize_lanczos3`).
    """
    if seeds is None:
        images = resize_lanczos3(images, size, exact=False)
    else:
        images = augment(images, _seeds(seeds[:, None], torch.arange(images.shape[1])), size=(size, size))
    return center_crop(images) if crop else images


# --- resize ----------------------------------------------------------------------------------------------------------


def resize_lanczos3(images: Tensor, size: int | tuple[int, int], *, exact: bool = True) -> Tensor:
    """Resize uint8 [..., 3, H, W] to `size` (height, width) like `tf.image.resize(..., "lanczos3", antialias=True)`.

    The result is rounded half to even and clipped, as the original does. Rows are filtered first, then columns, both in
    float32.

    Args:
        exact: sum the taps one by one, as TensorFlow does. False takes one fused kernel instead, three times as fast on
            a CPU, whose other rounding moves about one value in 75,000 by one level.
    """
    height, width = (size, size) if isinstance(size, int) else size
    return _per_image(lambda x: _resize(x, height, width, exact).permute(0, 2, 3, 1), images, (height, width))


def _resize(images: Tensor, height: int, width: int, exact: bool) -> Tensor:
    """uint8 [N, 3, H, W] resized, as whole numbers in float32 [N, width, 3, height]: the layout where a crop begins."""
    if tuple(images.shape[-2:]) == (height, width):
        return _to_columns(images)
    rows = images.permute(0, 2, 3, 1).to(torch.float32, memory_format=torch.contiguous_format)
    rows = _filter_rows(rows, height, exact)
    columns = _transpose(rows.flatten(2)).view(-1, images.shape[-1], 3, height)
    return _filter_rows(columns, width, exact).round_().clamp_(0, 255)


def _to_columns(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] as float32 [N, W, 3, H]."""
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def _transpose(x: Tensor) -> Tensor:
    """[N, R, C] as contiguous [N, C, R]. torch moves a single matrix in cache blocks, a stack of them line by line."""
    return x[0].t().contiguous()[None] if len(x) == 1 else x.transpose(1, 2).contiguous()


def _filter_rows(x: Tensor, out_rows: int, exact: bool) -> Tensor:
    """Lanczos filter of float32 [N, rows, ...] along its rows."""
    count, rows = x.shape[:2]
    index, weights = _taps_of_batch(count, rows, out_rows, x.device)
    flat = x.reshape(count * rows, -1)
    if exact:
        total = flat.index_select(0, index[:, 0]).mul_(weights[:, :1])
        for tap in range(1, weights.shape[1]):
            total.add_(flat.index_select(0, index[:, tap]).mul_(weights[:, tap, None]))
    else:
        total = _mix_rows(flat, index, weights)
    return total.view(count, out_rows, *x.shape[2:])


def _mix_rows(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums [M, C] of float32 rows [R, C], chosen by `index` [M, taps], in one fused kernel."""
    offsets = _offsets(*index.shape, rows.device)
    return embedding_bag(index.reshape(-1), rows, offsets, per_sample_weights=weights.reshape(-1), mode="sum")


@lru_cache(maxsize=64)
def _offsets(count: int, taps: int, device: torch.device) -> Tensor:
    """Where the taps of each sum begin; torch would make this anew in every call."""
    return torch.arange(0, count * taps, taps, device=device)


@lru_cache(maxsize=64)
def _taps_of_batch(count: int, in_size: int, out_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row numbers and weights [count * out, taps] of all images, whose rows follow each other."""
    first, weights = _lanczos3_taps(in_size, out_size)
    # The last taps may point behind the image; their weight is 0 there.
    index = np.minimum(first[:, None] + np.arange(weights.shape[1]), in_size - 1)
    index = (index + in_size * np.arange(count)[:, None, None]).reshape(-1, weights.shape[1])
    return torch.from_numpy(index).to(device), torch.from_numpy(np.tile(weights, (count, 1))).to(device)


def _lanczos3_taps(in_size: int, out_size: int) -> tuple[np.ndarray, np.ndarray]:
    """First input index [out] and weights [out, taps] of every output, in float32 like TensorFlow's kernel."""
    f32 = np.float32
    inverse_scale = f32(1) / (f32(out_size) / f32(in_size))
    widening = max(inverse_scale, f32(1))  # antialias: the filter grows when the image shrinks
    reach = f32(_LANCZOS_RADIUS) * widening
    center = (np.arange(out_size, dtype=f32) + f32(0.5)) * inverse_scale
    first = np.clip(np.ceil(center - reach - f32(0.5)), 0, in_size - 1).astype(np.int64)
    last = np.clip(np.floor(center + reach - f32(0.5)), 0, in_size - 1).astype(np.int64)
    taps = np.arange((last - first).max() + 1)
    position = (first[:, None] + taps).astype(f32) + f32(0.5)
    weights = _lanczos3(np.abs((position - center[:, None]) * (f32(1) / widening)))
    weights[taps > (last - first)[:, None]] = 0
    total = np.zeros(out_size, f32)
    for tap in taps:
        total += weights[:, tap]
    weights *= (f32(1) / total)[:, None]
    return first, weights


def _lanczos3(u: np.ndarray) -> np.ndarray:
    """3 sin(pi u) sin(pi u / 3) / (pi u)^2 for float32 u >= 0, 0 beyond 3."""
    f32 = np.float32
    pi, radius = f32(math.pi), f32(_LANCZOS_RADIUS)
    safe = np.where(u <= f32(1e-3), f32(1), u)
    value = radius * _sine(pi * safe) * _sine(pi * safe / radius) / (pi * pi * safe * safe)
    return np.where(u <= f32(1e-3), f32(1), np.where(u > radius, f32(0), value))


def _sine(angle: np.ndarray) -> np.ndarray:
    """float32 sine of the C library, the one that TensorFlow calls.

    numpy's and torch's own differ from it in the last bit, enough to round ties in smooth pictures the other way.
    """
    sinf = ctypes.CDLL(None).sinf
    sinf.restype, sinf.argtypes = ctypes.c_float, [ctypes.c_float]
    return np.array([sinf(a) for a in angle.ravel().tolist()], np.float32).reshape(angle.shape)


# --- crops -----------------------------------------------------------------------------------------------------------


def center_crop(images: Tensor, area: float = CROP_AREA) -> Tensor:
    """The central `area` of uint8 [..., 3, H, W], stretched back to H x W (bilinear), as OpenVLA does at evaluation."""
    size = (images.shape[-2], images.shape[-1])
    side = np.sqrt(np.float32(area))
    offset = np.full(math.prod(images.shape[:-3]), (np.float32(1) - side) / np.float32(2), np.float32)
    window = _crop_window(offset, offset, side, size)
    return _per_image(
        lambda x, w: _crop_and_resize(_to_columns(x), w, exact=True).clamp_(0, 1).mul_(_FULL), images, size, window
    )


_Window = tuple[Tensor, Tensor, Tensor, Tensor]  # columns and their weights, rows and their weights


def _crop_window(top: np.ndarray, left: np.ndarray, side: np.float32, size: tuple[int, int]) -> _Window:
    """Which pixels, and how much of them, make each pixel of N crops.

    Args:
        top, left: float32 [N], offsets of each image's crop as a fraction of its height or width.
        side: height and width of the crop, likewise.
        size: height and width of the images, and of the result.

    Returns:
        int64 [N, W, 2] and float32 [N, W, 2]: the two columns on either side and their shares; [N, 3, H, 2] twice: the
        same for rows, channel by channel, counted in an image of 3 * H rows.
    """
    columns, column_weights = _neighbours(left, side, size[1])
    rows, row_weights = (np.repeat(x[:, None], 3, axis=1) for x in _neighbours(top, side, size[0]))
    rows += size[0] * np.arange(3)[:, None, None]
    columns, column_weights, rows, row_weights = map(torch.from_numpy, (columns, column_weights, rows, row_weights))
    return columns, column_weights, rows, row_weights


def _neighbours(offset: np.ndarray, side: np.float32, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours of `count` places from `offset` [N] to `offset + side` (fractions of count - 1), and their shares."""
    last = np.float32(count - 1)
    step = (offset + side - offset) * last / last
    place = (offset * last)[:, None] + np.arange(count, dtype=np.float32) * step[:, None]
    place = np.clip(place, 0, last)
    low = np.floor(place)
    share = place - low
    return np.stack([low, np.ceil(place)], -1).astype(np.int64), np.stack([1 - share, share], -1)


def _crop_and_resize(columns: Tensor, window: Sequence[Tensor], exact: bool) -> Tensor:
    """Bilinear crop of float32 [N, W, 3, H] in 0..255, which it consumes, to [N, 3, H, W] in 0..1, same size.

    Args:
        window: of `_crop_window`.
        exact: round as `tf.image.crop_and_resize` does, see `resize_lanczos3`.
    """
    count, width, _, height = columns.shape
    index, weights, row_index, row_weights = window
    scale = float(1 / np.float32(255))
    if exact:
        columns.mul_(scale)
    else:
        row_weights = row_weights * scale
    x = _interpolate(columns.view(count, width, -1), index, weights, exact)  # width, then height, as TensorFlow
    x = _interpolate(_transpose(x).view(count, -1, width), row_index.flatten(1, 2), row_weights.flatten(1, 2), exact)
    return x.view(count, 3, height, width)


def _interpolate(x: Tensor, index: Tensor, weights: Tensor, exact: bool) -> Tensor:
    """Mix float32 rows of [N, R, C] by pairs: `index` [N, R, 2] and `weights` [N, R, 2]."""
    count, rows = x.shape[:2]
    if count > 1:
        index = index + rows * torch.arange(count, device=x.device)[:, None, None]
    flat, index, weights = x.reshape(count * rows, -1), index.view(-1, 2), weights.reshape(-1, 2)
    if exact:
        below, above = (flat.index_select(0, index[:, i]) for i in range(2))
        result = above.sub_(below).mul_(weights[:, 1:]).add_(below)
    else:
        result = _mix_rows(flat, index, weights)
    return result.view(x.shape)


# --- augmentation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """Strength of the training augmentation; the defaults are OpenVLA's.

    Attributes:
        crop_area: share of the image that the random crop keeps.
        diagonal_crop: True keeps a quirk of the original: both crop offsets are drawn with the same seed and are equal,
            so crops slide only along the main diagonal. False draws them independently.
        brightness: largest shift of the values (in 0..1) up or down.
        contrast, saturation: range of the factor.
        hue: largest rotation in turns.
    """

    crop_area: float = CROP_AREA
    diagonal_crop: bool = True
    brightness: float = 0.2
    contrast: tuple[float, float] = (0.8, 1.2)
    saturation: tuple[float, float] = (0.8, 1.2)
    hue: float = 0.05


def augment(
    images: Tensor, seeds: Tensor, augmentation: Augmentation | None = None, *, size: tuple[int, int] | None = None
) -> Tensor:
    """Random crop, brightness, contrast, saturation and hue, each image by its own seed.

    The same image and seed give the same pixels wherever the image stands in a batch.

    Args:
        images: uint8 [..., 3, H, W].
        seeds: int64 [...], one per image, on the CPU (their draws become arguments of the kernels).
        size: resize to this height and width first (the quick way of `resize_lanczos3`).

    Returns:
        uint8 of the same shape, or [..., 3, *size].
    """
    if seeds.shape != images.shape[:-3]:
        raise ValueError(f"expected one seed per image, shape {list(images.shape[:-3])}, got {list(seeds.shape)}")
    options = augmentation or Augmentation()
    height, width = size or tuple(images.shape[-2:])
    draws = _applied(_draws(seeds.reshape(-1), options), options.crop_area, (height, width))
    return _per_image(lambda x, d: _augment(_resize(x, height, width, exact=False), d), images, (height, width), draws)


def _draws(seeds: Tensor, options: Augmentation) -> np.ndarray:
    """float32 [N, 6]: top and left of the crop as fractions, brightness, contrast, saturation, hue in turns."""
    u = np.stack([uniform(mix(seeds.numpy(), draw)) for draw in range(6)], axis=1)
    u[:, 1] = u[:, 0] if options.diagonal_crop else u[:, 1]
    room = np.float32(1) - np.sqrt(np.float32(options.crop_area))
    ranges = (
        *((0, room), (0, room), (-options.brightness, options.brightness)),
        *(options.contrast, options.saturation, (-options.hue, options.hue)),
    )
    low, high = np.array(ranges, np.float32).T
    return low + u.astype(np.float32) * (high - low)


def _applied(draws: np.ndarray, crop_area: float, size: tuple[int, int]) -> tuple[Tensor, ...]:
    """What `_augment` needs for images of `size`: the windows of the crops, and the rest as float32 [N, 4, 1, 1, 1]."""
    window = _crop_window(draws[:, 0], draws[:, 1], np.sqrt(np.float32(crop_area)), size)
    return *window, torch.from_numpy(draws[:, 2:, None, None, None].copy())


def _augment(columns: Tensor, draws: Sequence[Tensor]) -> Tensor:
    """The chain on float32 [N, W, 3, H] in 0..255, which it consumes, to [N, 3, H, W] in [0, 256).

    Values are clipped to [0, 1] after every step.
    """
    x = _crop_and_resize(columns, draws[:4], exact=False)
    brightness, contrast, saturation, hue = draws[4].unbind(1)
    x.add_(brightness).clamp_(0, 1)
    mean = x.mean((-2, -1), keepdim=True)
    x.mul_(contrast).add_(mean - mean * contrast).clamp_(0, 1)
    return _shift_saturation_and_hue(x, saturation[:, 0], hue[:, 0]).mul_(_FULL)


def _shift_saturation_and_hue(x: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Scale the HSV saturation of float32 [N, 3, H, W] in [0, 1] (clipped to 1) and turn its hue, in place.

    Both keep V = max(r, g, b), so one conversion serves the two steps. With the range C = V - min, the angle from red
    in sixths of a turn is (V - 2 min - r + g + b) / C, positive on the green side and negative on the blue one; this
    form needs no case for each channel. A channel at angle a (red 0, green 2, blue -2) gets min + C * ramp, where the
    ramp of the distance d = |angle - a| falls from 1 at d = 1 to 0 at d = 2, and rises again beyond half a turn.
    """
    red, green, blue = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    spread = value - low
    divisor = spread.clamp(min=torch.finfo(x.dtype).tiny)
    angle = torch.sub(value, low, alpha=2).sub_(red).add_(green).add_(blue).div_(divisor)
    angle = torch.copysign(angle, green - blue).add_(6 * hue)
    # S = C / V, so S * factor <= 1 means factor <= V / C.
    spread.mul_(torch.minimum(value / divisor, saturation))
    low = value.sub_(spread)
    x.copy_(angle[:, None])  # all channels have been read
    x[:, 1].sub_(2)
    x[:, 2].add_(2)
    x.abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
    return torch.addcmul(low[:, None], spread[:, None], x, out=x)


def _per_image(
    function: Callable[..., Tensor], images: Tensor, size: tuple[int, int], arguments: tuple[Tensor, ...] = ()
) -> Tensor:
    """Apply `function`, from uint8 [N, 3, H, W] to float [N, 3, *size], and truncate its result to uint8.

    At once on a GPU; image by image on the CPU, whose caches hold only one. `arguments` have one row per image and are
    given to `function` likewise.
    """
    if images.dtype != torch.uint8 or images.ndim < 3 or images.shape[-3] != 3:
        raise ValueError(f"expected images uint8 [..., 3, H, W], got {images.dtype} {list(images.shape)}")
    flat = images.reshape(-1, *images.shape[-3:])
    arguments = tuple(_send(argument, images.device) for argument in arguments)
    result = torch.empty((len(flat), 3, *size), dtype=torch.uint8, device=images.device)
    step = 1 if images.device.type == "cpu" else max(len(flat), 1)
    for i in range(0, len(flat), step):
        part = slice(i, i + step)
        values = function(flat[part], [argument[part] for argument in arguments]) if arguments else function(flat[part])
        result[part] = values.to(torch.int32)  # torch has vector code for float to int32, not for float to uint8
    return result.view(*images.shape[:-2], *size)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor on `device`. Page-locked on the way to a GPU, or the copy would wait for all work queued there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# --- seeds -----------------------------------------------------------------------------------------------------------


def sample_seeds(seed: int, epoch: int | Tensor, indices: Tensor) -> Tensor:
    """int64 [B]: the augmentation seed of every sample, a pure function of (run seed, epoch, global window index)."""
    return _seeds(seed, torch.as_tensor(epoch), indices)


def _seeds(*values: int | Tensor) -> Tensor:
    arrays = [value.numpy() if isinstance(value, Tensor) else value for value in values]
    return torch.from_numpy(mix(*arrays).view(np.int64))
