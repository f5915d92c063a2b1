"""Spatial Forcing as a plug-in: a cosine loss between a VLA's vision tokens and a frozen teacher's features.

Li et al. 2025, arXiv 2510.12276. The first of the trainer's auxiliary losses (`prismo.align.auxiliary`); any other VLA
can use it, too (docs/align.md). Nothing of it is needed at inference.

Shape legend: B samples, V views, P VLA patches per view, T = V * P tokens, D the teacher's width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prismo.align.auxiliary import Auxiliary, ForwardPass
from prismo.align.pooling import pool
from prismo.align.recipe import AlignRecipe, layer_index
from prismo.align.teachers import Teacher, load_teacher
from prismo.align.tokens import vision_tokens

logger = logging.getLogger(__name__)

# Bicubic resizing of [0, 1] overshoots to at most -0.45 and 1.45, and by much at few pixels: in noise of black and
# white 2 % are below -0.2. Of other conventions (-1 to 1, ImageNet) most pictures leave the range, and grey ones have
# more below there.
_RANGE = (-0.5, 1.5)
_LOW, _MOST_BELOW = -0.2, 0.05
_EPS = 1e-6


class AlignProjector(nn.Module):
    """MLP from the VLA's hidden states to the teacher's width: [LayerNorm], Linear, GELU, Linear.

    Its state dict is that of the published `align_projector--*_checkpoint.pt` files (`fc1`, `fc2`, where used
    `vlm_norm`); read and write them with `load_component` and `save_component` of `prismo.models.component_files`.

    Args:
        hidden_size: width of the VLA's hidden states.
        width: the teacher's width (2048 for VGGT-1B).
        use_vlm_norm: LayerNorm in front.
    """

    def __init__(self, hidden_size: int, width: int, *, use_vlm_norm: bool) -> None:
        super().__init__()
        self.vlm_norm = nn.LayerNorm(hidden_size) if use_vlm_norm else None
        self.fc1 = nn.Linear(hidden_size, width)
        self.fc2 = nn.Linear(width, width)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] of any float dtype -> [..., width] in the weights' dtype, or autocast's."""
        hidden = hidden.to(self.fc1.weight.dtype)
        if self.vlm_norm is not None:
            hidden = self.vlm_norm(hidden)
        return self.fc2(F.gelu(self.fc1(hidden)))


def token_cosine(projected: Tensor, target: Tensor) -> Tensor:
    """Cosine over the channel (last) axis in fp32, whatever autocast says: [..., D], [..., D] -> [...]."""
    with torch.autocast(projected.device.type, enabled=False):
        return (F.normalize(projected.float(), dim=-1, eps=_EPS) * F.normalize(target.float(), dim=-1, eps=_EPS)).sum(
            -1
        )


class SpatialForcing(Auxiliary):
    """The alignment loss for any VLA.

    Only the projector is trained, saved and synchronised: the teacher is neither in `parameters()` nor in
    `state_dict()`, and stays frozen and in eval mode. `.to(device)` moves both.

    Args:
        teacher: a frozen feature extractor, see `prismo.align.load_teacher`.
        hidden_size: width of the VLA's hidden states.
        recipe: settings; the default is the published recipe.
        grid: rows and columns of the VLA's patches; None = a square.

    Raises:
        TypeError: `teacher` is no teacher.
        ValueError: the recipe asks for a layer that the teacher does not have.
    """

    def __init__(
        self,
        teacher: Teacher,
        hidden_size: int,
        recipe: AlignRecipe | None = None,
        *,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if not (isinstance(teacher, nn.Module) and isinstance(teacher, Teacher)):
            raise TypeError(f"expected a teacher (an nn.Module with width, layers, features), found {type(teacher)}")
        self.recipe = recipe or AlignRecipe.spatial_forcing()
        layer_index(self.recipe.vggt_layers_align, teacher.layers)
        self.layers, self.grid = (self.recipe.vla_layers_align,), grid
        # In a tuple, out of nn.Module's sight: else a gigabyte of frozen weights would be saved, broadcast and clipped.
        self._teacher = (teacher.requires_grad_(False).eval(),)
        self.projector = AlignProjector(hidden_size, teacher.width, use_vlm_norm=self.recipe.use_vlm_norm)
        device = next((p.device for p in teacher.parameters()), None)
        self.projector.to(device)
        self._inputs_checked = False

    @classmethod
    def from_flags(cls, flags: Any, hidden_size: int, device: torch.device) -> SpatialForcing:
        precision, path = flags.teacher_precision(device), flags.teacher_path
        teacher = load_teacher(flags.teacher, path, dtype=precision, device=device, compile=flags.compile_vggt)
        return cls(teacher, hidden_size, flags.align_recipe)

    @property
    def teacher(self) -> Teacher:
        """The frozen teacher."""
        return self._teacher[0]

    def components(self) -> dict[str, nn.Module]:
        return {"align_projector": self.projector}

    def loss(self, seen: ForwardPass, *, with_map: bool) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        hidden, shift = seen.hidden[self.layers[0]], self.recipe.gain_feat_1move
        tokens = vision_tokens(hidden, seen.count, start=seen.start, shift=shift)
        loss, metrics = self(seen.images, tokens, view_mask=seen.view_mask, return_map=with_map)
        return loss, metrics, metrics.pop("align_cosine_map", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpatialForcing:
        """Let the teacher follow to another device; its dtype stays (it is chosen when it is loaded)."""
        super()._apply(fn, recurse)
        self.teacher.to(device=self.projector.fc1.weight.device)
        return self

    def forward(
        self,
        images: Tensor,
        vision_hidden: Tensor,
        mask: Tensor | None = None,
        *,
        view_mask: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        return_map: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Alignment loss of one batch. Masks are boolean, True = counts.

        Padded content has no influence: missing views are no part of the teacher's scene, padding pixels are white for
        it, and tokens whose patch (or, with `gain_feat_1move`, whose neighbour's hidden state) is padding do not count.

        Args:
            images: [B, V, 3, H, W] floats in [0, 1], the pictures that the VLA sees. Other devices are fine.
            vision_hidden: [B, V * P, hidden_size], hidden states of the vision tokens, views one after the other,
                patches row-major (see `vision_tokens`).
            mask: [B, V * P], tokens that count.
            view_mask: [B, V], views that exist.
            pixel_mask: [B, V, H, W], real pixels; padding of non-square pictures is False.
            return_map: add the cosine of every token to the metrics, for pictures.

        Returns:
            The loss `align_loss_coeff * mean(1 - cosine)`, fp32, ready to be added to the action loss: the mean over
            the tokens that count of each sample, then over the samples that have any; 0 where none has.
            Metrics, detached: `align_loss` (without the coefficient), `align_cosine`, `align_cosine_view{i}`, and with
            `return_map` `align_cosine_map` [B, V, rows, columns], 0 where masked.

        Raises:
            ValueError: shapes that do not fit; in the first batch also images of another value range. (Later batches
                are not checked for range, which would stop the GPU in every step.)
        """
        grid = self._check_shapes(images, vision_hidden, mask, view_mask, pixel_mask)
        images = images.to(vision_hidden.device, non_blocking=True)
        mask, view_mask, pixel_mask = (
            value if value is None else value.to(vision_hidden.device, non_blocking=True)
            for value in (mask, view_mask, pixel_mask)
        )
        if pixel_mask is not None:
            exists = pixel_mask.any(dim=(-2, -1))
            view_mask = exists if view_mask is None else view_mask & exists
        images = _blank(images, view_mask, pixel_mask)
        self._check_first_batch(images, vision_hidden)
        target = self.targets(images, grid, view_mask)
        counts = self._tokens_that_count(mask, view_mask, pixel_mask, grid)
        if counts is not None:
            vision_hidden = torch.where(counts[..., None], vision_hidden, 0)  # 0 * NaN would still be NaN
        cosine = token_cosine(self.projector(vision_hidden), target)
        return self._reduce(cosine, counts, images.shape[1], grid if return_map else None)

    @torch.no_grad()
    def targets(self, images: Tensor, grid: tuple[int, int], view_mask: Tensor | None = None) -> Tensor:
        """The teacher's features on the VLA's grid: [B, V, 3, H, W] in [0, 1] -> [B, V * rows * columns, D], fp32."""
        if self.teacher.training:  # somebody else's .train() reached it
            self.teacher.eval()
        features = self.teacher.features(images, self.recipe.vggt_layers_align, view_mask)
        return pool(features, grid, position=self.recipe.use_vggt_pe)

    def _tokens_that_count(
        self, mask: Tensor | None, view_mask: Tensor | None, pixel_mask: Tensor | None, grid: tuple[int, int]
    ) -> Tensor | None:
        """All masks as one over tokens, [B, T]; None = all count. With a pixel mask there is a view mask, too."""
        if view_mask is None:
            return mask
        patches = view_mask.repeat_interleave(grid[0] * grid[1], dim=1)
        if pixel_mask is not None:
            patches = patches & F.interpolate(pixel_mask.float(), size=grid, mode="nearest").bool().flatten(1)
        if self.recipe.gain_feat_1move:
            # Token j holds the hidden state of patch j + 1, which must be real as well.
            patches = patches & F.pad(patches[:, 1:], (0, 1), value=True)
        return patches if mask is None else mask & patches

    def _reduce(
        self, cosine: Tensor, counts: Tensor | None, views: int, map_grid: tuple[int, int] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics from the cosine of each token, [B, T]."""
        weight = torch.ones_like(cosine) if counts is None else counts.float()
        total = weight.sum(dim=1)
        per_sample = ((1 - cosine) * weight).sum(dim=1) / total.clamp(min=1)
        loss = per_sample.sum() / (total > 0).sum().clamp(min=1)
        with torch.no_grad():
            cosine = cosine.detach() * weight
            by_view = cosine.unflatten(1, (views, -1)).sum(dim=(0, 2)), weight.unflatten(1, (views, -1)).sum(dim=(0, 2))
            view_cosine = by_view[0] / by_view[1].clamp(min=1)
            metrics = {"align_loss": loss.detach(), "align_cosine": cosine.sum() / weight.sum().clamp(min=1)}
            metrics |= {f"align_cosine_view{i}": view_cosine[i] for i in range(views)}
            if map_grid is not None:
                metrics["align_cosine_map"] = cosine.unflatten(1, (views, *map_grid))
        return self.recipe.align_loss_coeff * loss, metrics

    def _check_shapes(self, images: Tensor, vision_hidden: Tensor, *masks: Tensor | None) -> tuple[int, int]:
        """Validate all shapes and dtypes; returns the VLA's patch grid."""
        if images.ndim != 5 or images.shape[2] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images must be floats [batch, views, 3, height, width] in [0, 1], found {images.dtype} "
                f"{list(images.shape)}" + (" (divide uint8 by 255)" if images.dtype == torch.uint8 else "")
            )
        batch, views, _, *pixels = images.shape
        hidden_size = self.projector.fc1.in_features
        if vision_hidden.ndim != 3 or vision_hidden.shape[0] != batch or vision_hidden.shape[2] != hidden_size:
            raise ValueError(
                f"vision_hidden must be [batch={batch}, views*patches, hidden_size={hidden_size}], found "
                f"{list(vision_hidden.shape)}"
            )
        tokens = vision_hidden.shape[1]
        side = math.isqrt(tokens // views)
        grid = self.grid or (side, side)
        if tokens == 0 or grid[0] * grid[1] * views != tokens:
            shown = f"{grid[0]} x {grid[1]} patches" if self.grid else "square patch grids (else pass grid=)"
            raise ValueError(
                f"{tokens} vision tokens do not fit {views} views of {shown}; leave out proprio, time and text tokens"
            )
        expected = {"mask": [batch, tokens], "view_mask": [batch, views], "pixel_mask": [batch, views, *pixels]}
        for value, (name, shape) in zip(masks, expected.items(), strict=True):
            if value is not None and (list(value.shape) != shape or value.dtype != torch.bool):
                raise ValueError(f"{name} must be boolean {shape}, found {value.dtype} {list(value.shape)}")
        return grid

    def _check_first_batch(self, images: Tensor, vision_hidden: Tensor) -> None:
        """What costs a synchronisation, or is worth saying only once."""
        if self._inputs_checked:
            return
        low, high = images.min().item(), images.max().item()
        below = (images < _LOW).float().mean().item()
        if not (_RANGE[0] <= low and high <= _RANGE[1] and below <= _MOST_BELOW):
            raise ValueError(
                f"images must be in [0, 1], found values from {low:.3g} to {high:.3g}. Pass the pictures before the "
                "VLA's normalisation: x * std + mean; (x + 1) / 2 where they are -1 to 1, x / 255 for 0 to 255"
            )
        if self.training and torch.is_grad_enabled() and not vision_hidden.requires_grad:
            logger.warning(
                "vision_hidden carries no gradient, so the alignment trains only its projector and not the VLA; "
                "hand over hidden states that are not detached (re-entrant gradient checkpointing detaches them)"
            )
        self._inputs_checked = True


def _blank(images: Tensor, view_mask: Tensor | None, pixel_mask: Tensor | None) -> Tensor:
    """White where a view or a pixel is missing, so that nothing of its content reaches the teacher."""
    if pixel_mask is not None:
        images = torch.where(pixel_mask[:, :, None], images, 1)
    if view_mask is not None:
        images = torch.where(view_mask[:, :, None, None, None], images, 1)
    return images
