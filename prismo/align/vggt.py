"""VGGT's aggregator: the frozen geometry teacher of Spatial Forcing, and the loader of its published weights.

VGGT (Wang et al. 2025, arXiv 2503.11651) reads all views of a scene together. Only the feature extractor is built here:
a DINOv2 patch embedder, then pairs of a frame block (attention inside one view) and a global block (attention across
views). `prismo.align.SpatialForcing` calls `features`; `prismo.align.teachers` lists the loader.

Shape legend: B samples, V views, P = 1 camera + registers + patches tokens of one view, C width, h x w patch grid.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from prismo.align.recipe import layer_index
from prismo.models.vit import Block, RopeTable, VisionTransformer, ViTConfig
from prismo.util.text import first_line

HEAD_DIM = 64  # the same in every VGGT size; the number of heads follows from the width
_PREFIX = "aggregator."
_HEADS = ("camera_head.", "point_head.", "depth_head.", "track_head.")  # in the official file, not needed for features
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class VGGTConfig:
    """Sizes of an aggregator; the defaults are VGGT-1B's.

    Attributes:
        width: channels of the residual stream; a layer's output has twice as many.
        depth: pairs of frame and global blocks.
        patch_depth: blocks of the DINOv2 patch embedder.
        mlp_width: hidden units of every MLP.
        image_size: pixels per side that the position embedding was made for; images are resized to it.
        patch_size: pixels per side of one patch.
        registers: register tokens per view, in the patch embedder and in the aggregator.
    """

    width: int = 1024
    depth: int = 24
    patch_depth: int = 24
    mlp_width: int = 4096
    image_size: int = 518
    patch_size: int = 14
    registers: int = 4


class VGGTAggregator(nn.Module):
    """The feature extractor of VGGT, with the parameter names of the published file (without `aggregator.`).

    Attributes:
        width: channels of the features, 2 C (frame block and global block side by side).
        layers: how many outputs there are to choose from.
        patch_start_idx: camera and register tokens in front of the patches of each view.
    """

    def __init__(self, config: VGGTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VGGTConfig()
        heads = config.width // HEAD_DIM
        self.patch_embed = VisionTransformer(
            ViTConfig(
                width=config.width,
                depth=config.patch_depth,
                heads=heads,
                mlp_width=config.mlp_width,
                image_size=config.image_size,
                patch_size=config.patch_size,
                layout="dinov2",
                cls_token=True,
                registers=config.registers,
                layer_scale="gamma",
                eps=1e-6,
            )
        )
        # Two variants of each special token: one for the first view (the reference frame), one for all others.
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, config.width))
        self.register_token = nn.Parameter(torch.zeros(1, 2, config.registers, config.width))
        self.frame_blocks, self.global_blocks = (
            nn.ModuleList(
                Block(config.width, heads, config.mlp_width, eps=1e-5, layer_scale="gamma", qk_norm=True)
                for _ in range(config.depth)
            )
            for _ in range(2)
        )
        self.width = 2 * config.width
        self.layers = config.depth
        self.patch_start_idx = 1 + config.registers

    def compile_blocks(self) -> None:
        """Compile each block with torch.compile; all blocks of a kind share one compiled function."""
        for blocks in (self.patch_embed.blocks, self.frame_blocks, self.global_blocks):
            for block in blocks:
                block.compile(dynamic=False)

    def forward(self, images: Tensor, layer: int = -1, view_mask: Tensor | None = None) -> Tensor:
        """The output of one aggregator layer. Nothing behind that layer is computed.

        Args:
            images: [B, V, 3, H, W] in [0, 1], H and W multiples of the patch size.
            layer: index into the aggregator outputs, negative from the end.
            view_mask: boolean [B, V], False = a missing view. The features of the other views are those of a scene
                without it: its tokens are no keys of the global attention, and the first view that is there becomes
                the reference frame. The features of a missing view itself mean nothing.

        Returns:
            [B, V, P, 2C], special tokens included.
        """
        last = layer_index(layer, self.layers)
        batch, views = images.shape[:2]
        grid = tuple(side // self.config.patch_size for side in images.shape[-2:])
        dtype = self.camera_token.dtype
        if view_mask is not None:
            view_mask = view_mask | ~view_mask.any(dim=1, keepdim=True)  # attention over no key at all would be NaN
        # With low-precision weights autocast would only widen LayerNorm outputs to fp32, twice the memory traffic.
        with nullcontext() if dtype == torch.float32 else torch.autocast(images.device.type, enabled=False):
            x = self._tokens(images, view_mask)
            tokens = x.shape[1]
            rope = [_rope_table(*grid, self.patch_start_idx, n, images.device, dtype) for n in (1, views)]
            keys = None if view_mask is None else view_mask.repeat_interleave(tokens, dim=1)[:, None, None, :]
            for frame_block, global_block in zip(
                self.frame_blocks[: last + 1], self.global_blocks[: last + 1], strict=True
            ):
                frame = frame_block(x, rope[0])
                x = global_block(frame.view(batch, views * tokens, -1), rope[1], mask=keys)
                x = x.view(batch * views, tokens, -1)
            return torch.cat([frame, x], dim=-1).unflatten(0, (batch, views))

    def features(self, images: Tensor, layer: int, view_mask: Tensor | None = None) -> Tensor:
        """Patch features of images of any size: [B, V, 3, H, W] in [0, 1] -> [B, V, h, w, 2C] (see `Teacher`)."""
        images = resize(images, self.config.image_size, self.config.patch_size)
        rows, columns = (side // self.config.patch_size for side in images.shape[-2:])
        return self(images, layer, view_mask)[:, :, self.patch_start_idx :].unflatten(2, (rows, columns))

    def _tokens(self, images: Tensor, view_mask: Tensor | None) -> Tensor:
        """Normalise, embed the patches and put camera and register tokens in front: [B*V, P, C]."""
        batch, views = images.shape[:2]
        mean, std = _normalisation(images.device)
        pixels = ((images.float() - mean) / std).flatten(0, 1).to(self.camera_token.dtype)
        patches = self.patch_embed(pixels, final_norm=True)
        if view_mask is None:
            first = (torch.arange(views, device=images.device) == 0).expand(batch, views)
        else:
            first = view_mask & (view_mask.cumsum(dim=1) == 1)
        special = torch.cat([self.camera_token, self.register_token], dim=2)
        special = torch.where(first[..., None, None], special[:, :1], special[:, 1:])
        return torch.cat([special.flatten(0, 1), patches], dim=1)


def resize(images: Tensor, size: int, patch_size: int) -> Tensor:
    """Bicubic resize of [B, V, 3, H, W] so that the longer side is `size`, the other a multiple of `patch_size`.

    This is VGGT's own preprocessing for square images. Like it, the result is not clamped: bicubic kernels overshoot
    [0, 1] a little at edges.
    """
    height, width = images.shape[-2:]
    longest = max(height, width)
    target = tuple(max(1, round(side * size / longest / patch_size)) * patch_size for side in (height, width))
    if target == (height, width):
        return images
    flat = F.interpolate(images.flatten(0, 1).float(), size=target, mode="bicubic", align_corners=False)
    return flat.unflatten(0, images.shape[:2])


@lru_cache(maxsize=8)
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet mean and standard deviation, cached so that no step copies from the host."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (_MEAN, _STD))
    return mean, std


@lru_cache(maxsize=32)
def _rope_table(
    rows: int, columns: int, special: int, views: int, device: torch.device, dtype: torch.dtype
) -> RopeTable:
    """Tables of `apply_rope`, each [views * P, HEAD_DIM]: patch (y, x) at (y + 1, x + 1), special tokens at (0, 0).

    Frequencies are 100^(-2i / 32), i = 0..15, as in RoPE2D (CroCo v2, arXiv 2211.10408).
    """
    quarter = HEAD_DIM // 4
    frequency = 100.0 ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    patches = torch.cartesian_prod(
        torch.arange(1, rows + 1, device=device), torch.arange(1, columns + 1, device=device)
    )
    positions = torch.cat([patches.new_zeros(special, 2), patches]).repeat(views, 1)
    angles = positions[..., None] * frequency  # [views * P, (y, x), quarter]
    angles = torch.cat([angles, angles], dim=-1).flatten(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def load_vggt(
    path: str | Path | None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    compile: bool = False,
) -> VGGTAggregator:
    """Load the aggregator from the official `model.pt` or a `.safetensors` file; sizes follow from the tensors.

    Args:
        path: the file, or a folder that holds `model.safetensors` or `model.pt`. The weights of VGGT's heads in it are
            ignored; the aggregator must be complete.
        dtype: torch.float32 (computes like the original, also under autocast) or torch.bfloat16 (faster, half the
            memory; tests/align/test_vggt.py states the difference).
        device: where to put the weights; on "meta" they are not even read.
        compile: see `VGGTAggregator.compile_blocks`; the first call then takes about a minute.

    Returns:
        A frozen aggregator in eval mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or is not a VGGT checkpoint; names tensors.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"VGGT runs in torch.float32 or torch.bfloat16, not {dtype}")
    path = _weights_file(path)
    state = _read_aggregator(path, shapes_only=torch.device(device).type == "meta")
    with torch.device("meta"):
        model = VGGTAggregator(infer_config(state, path))
    _check_tensors({name: value.shape for name, value in model.state_dict().items()}, state, path)
    model.load_state_dict({name: value.to(device, dtype) for name, value in state.items()}, assign=True)
    if compile:
        model.compile_blocks()
    return model.requires_grad_(False).eval()


def read_config(path: str | Path) -> VGGTConfig:
    """Sizes of the aggregator in a weights file; raises like `load_vggt`."""
    return load_vggt(path, device="meta").config


def infer_config(state: Mapping[str, Tensor], path: str | Path = "the file") -> VGGTConfig:
    """Sizes of the aggregator whose tensors (names without `aggregator.`) are given.

    Raises:
        ValueError: the tensors that show the sizes are missing or impossible.
    """

    def shape(name: str, dims: int) -> torch.Size:
        if name not in state:
            raise ValueError(f"{path} is no complete VGGT checkpoint: tensor {_PREFIX}{name} is missing")
        if state[name].ndim != dims:
            raise ValueError(
                f"{path}: tensor {_PREFIX}{name} has shape {list(state[name].shape)}, expected {dims} axes"
            )
        return state[name].shape

    width, _, _, patch_size = shape("patch_embed.patch_embed.proj.weight", 4)
    positions = shape("patch_embed.pos_embed", 3)[1] - 1
    if width % HEAD_DIM or math.isqrt(max(positions, 0)) ** 2 != positions:
        raise ValueError(
            f"{path}: width {width} and {positions} patch positions are impossible for VGGT (the width is a multiple "
            f"of {HEAD_DIM}, the patch grid a square)"
        )
    return VGGTConfig(
        width=width,
        depth=_count(state, "frame_blocks."),
        patch_depth=_count(state, "patch_embed.blocks."),
        mlp_width=shape("patch_embed.blocks.0.mlp.fc1.weight", 2)[0],
        image_size=math.isqrt(positions) * patch_size,
        patch_size=patch_size,
        registers=shape("register_token", 4)[2],
    )


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered blocks there are under `prefix`."""
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _weights_file(path: str | Path | None) -> Path:
    if path is not None:
        path = Path(path)
        for candidate in [path / "model.safetensors", path / "model.pt"] if path.is_dir() else [path]:
            if candidate.is_file():
                return candidate
    raise FileNotFoundError(
        f"no VGGT weights at {path} (expected model.pt, a .safetensors file, or a folder with one of them). "
        "Fetch them with: hf download facebook/VGGT-1B model.pt --local-dir ckpts/vggt"
    )


def _read_aggregator(path: Path, shapes_only: bool) -> dict[str, Tensor]:
    """Tensors under `aggregator.` (prefix removed), mapped into memory rather than read.

    Args:
        shapes_only: read no weights; the tensors lie on the device "meta".

    Raises:
        ValueError: damaged, or with tensors that are neither the aggregator's nor those of VGGT's heads.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                read = _shape_of if shapes_only else safe_open.get_tensor
                state = {name: read(file, name) for name in names if name.startswith(_PREFIX)}
        else:
            # weights_only: a checkpoint from the internet must not run code. Only zip files can be mapped.
            mapped = zipfile.is_zipfile(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            names = list(state) if isinstance(state, Mapping) else []
    except Exception as error:  # over what is no checkpoint torch's unpickler stumbles with anything, KeyError too
        raise ValueError(f"cannot read VGGT weights from {path} ({first_line(error)}); fetch the file again") from error
    unknown = [name for name in names if not str(name).startswith((_PREFIX, *_HEADS))]
    aggregator = {
        name.removeprefix(_PREFIX): value
        for name, value in (state.items() if names else ())
        if str(name).startswith(_PREFIX) and isinstance(value, Tensor)
    }
    if unknown or not aggregator:
        raise ValueError(
            f"{path} is not a VGGT checkpoint: expected tensors named {_PREFIX}* (and those of the heads), found "
            f"{_some(unknown) if unknown else 'none of them'}"
        )
    return aggregator


def _shape_of(file: safe_open, name: str) -> Tensor:
    return torch.empty(file.get_slice(name).get_shape(), device="meta")


def _check_tensors(expected: Mapping[str, torch.Size], state: Mapping[str, Tensor], path: Path) -> None:
    """Raise one error that names all kinds of difference between the file and the architecture."""
    problems = {
        "missing": expected.keys() - state.keys(),
        "unknown": state.keys() - expected.keys(),
        "of wrong shape": {n for n in expected.keys() & state.keys() if state[n].shape != expected[n]},
    }
    found = [f"{kind}: {_some(_PREFIX + n for n in names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"{path} does not hold a VGGT aggregator. Tensors {'; '.join(found)}")


def _some(names: Iterable[object]) -> str:
    """The first names of a long list, for error texts."""
    names = sorted(map(str, names))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
