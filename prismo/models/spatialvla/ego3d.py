"""Ego3D position encoding: depth and camera intrinsics -> 3D points in the camera frame -> one vector per image patch.

`modeling.py` adds the result to the SigLIP features (SpatialVLA, section "Ego3D Position Encoding"). Cameras are
described by `CameraIntrinsics`, which the processor turns into a matrix for the model's image size.

Shape legend: B images, G grid cells per image side, P patches, R cells per patch side, F frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prismo.models.spatialvla.configuration import Geometry

# Camera points are centred 2 m in front of the camera and scaled by 1/2 before the sinusoids.
_CENTER = (0.0, 0.0, 2.0)
_SCALE = 2.0


@dataclass(frozen=True)
class CameraIntrinsics:
    """Pinhole camera in pixels of a `width` x `height` image; (0, 0) is the outer corner of the first pixel."""

    fx: float
    fy: float
    cx: float
    cy: float
    width: float
    height: float

    @classmethod
    def from_fovy(cls, fovy_deg: float, width: int, height: int) -> CameraIntrinsics:
        """Camera of a renderer that states its vertical field of view (MuJoCo): square pixels, centred axis.

        Half of the image height is seen under half of the angle: (height / 2) / f = tan(fovy / 2).
        """
        focal = 0.5 * height / math.tan(math.radians(fovy_deg) / 2)
        return cls(focal, focal, width / 2, height / 2, width, height)

    def cropped(self, left: float, top: float, width: float, height: float) -> CameraIntrinsics:
        """Camera of a crop, given in fractions of the image (0..1). The focal length in pixels stays."""
        return CameraIntrinsics(
            self.fx,
            self.fy,
            self.cx - left * self.width,
            self.cy - top * self.height,
            width * self.width,
            height * self.height,
        )

    def center_cropped(self, area: float) -> CameraIntrinsics:
        """Camera of a centre crop that keeps `area` (0..1) of the image, as `--center_crop` does with 0.9."""
        side = math.sqrt(area)
        return self.cropped((1 - side) / 2, (1 - side) / 2, side, side)

    def matrix(self, image_size: int) -> Tensor:
        """Matrix [3, 3] float32 for this view resized to `image_size` x `image_size` (aspect ratio not kept)."""
        x, y = image_size / self.width, image_size / self.height
        return torch.tensor([[self.fx * x, 0, self.cx * x], [0, self.fy * y, self.cy * y], [0, 0, 1]])


# LIBERO renders its policy view with the camera `agentview`. The arena files give that camera a pose but no `fovy`, so
# MuJoCo's default of 45 degrees holds: f = 128 / tan(22.5 deg) = 309.02 px at 256 px, 270.39 px at 224 px. Turning the
# picture by 180 degrees, as policies do, leaves the matrix as it is because the axis is in the middle.
LIBERO_AGENTVIEW = CameraIntrinsics.from_fovy(45.0, 256, 256)
# What the authors use for every robot (a WidowX set-up at 640 x 480), stored in their checkpoints as "default".
WIDOWX = CameraIntrinsics(623.588, 623.588, 319.501, 239.545, 640, 480)


def pixel_grid(image_size: int, cells: int, geometry: Geometry, device: torch.device) -> Tensor:
    """Pixel coordinates [cells] of the centres of `cells` equal cells along one image side, fp32.

    "parity" gives the authors' grid: stored in bf16, every coordinate above 128 is rounded to an even number.
    """
    step = image_size / cells
    centers = torch.arange(cells, device=device, dtype=torch.float32) * step + step / 2
    return centers.to(torch.bfloat16).float() if geometry == "parity" else centers


def camera_points(depth: Tensor, intrinsics: Tensor, image_size: int, geometry: Geometry) -> Tensor:
    """Back-project cell depths to the camera frame.

    Args:
        depth: [B, G, G] z-depth in metres (the third coordinate of the point, not the length of the ray).
        intrinsics: [B, 3, 3] upper triangular matrix in pixels of the `image_size` image.

    Returns:
        [B, G, G, 3] fp32, metres, x right, y down, z forward.
    """
    depth = depth.float()
    intrinsics = intrinsics.to(torch.bfloat16).float() if geometry == "parity" else intrinsics.float()
    grid = pixel_grid(image_size, depth.shape[-1], geometry, depth.device)
    fx, skew, cx, fy, cy = (intrinsics[:, i, j, None, None] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2)))
    # The inverse of a pinhole matrix written out: no batched LU and no wait for the GPU.
    y = (grid[:, None] - cy) / fy
    x = (grid[None, :] - cx - skew * y) / fx
    return torch.stack((x * depth, y * depth, depth), dim=-1)


def group_patches(points: Tensor, per_side: int) -> Tensor:
    """[B, G, G, 3] -> [B, P, R * R * 3]: patches in row-major order, in each its cells row by row, xyz fastest."""
    b, g = points.shape[:2]
    grouped = points.view(b, g // per_side, per_side, g // per_side, per_side, 3).permute(0, 1, 3, 2, 4, 5)
    return grouped.reshape(b, (g // per_side) ** 2, per_side * per_side * 3)


def sinusoids(points: Tensor, n_freqs: int) -> Tensor:
    """[..., N] -> [..., N * (2F + 1)]: per number n the values n, sin(2^k n) for all k, cos(2^k n) for all k."""
    angles = points[..., None] * (2.0 ** torch.arange(n_freqs, device=points.device)).to(points.dtype)
    return torch.cat((points[..., None], angles.sin(), angles.cos()), dim=-1).flatten(-2)


class Ego3DPositionEmbedding(nn.Module):
    """Depth map -> position vectors [B, P, C] (P = 256, C = SigLIP width)."""

    def __init__(self, width: int, image_size: int, patch_size: int, per_side: int, n_freqs: int) -> None:
        super().__init__()
        self.image_size, self.per_side, self.n_freqs = image_size, per_side, n_freqs
        self.cells = image_size // patch_size * per_side
        # The attribute name and the order of the layers are those of the published tensors.
        self.position_embedding_head = nn.Sequential(
            nn.Linear(per_side * per_side * 3 * (2 * n_freqs + 1), width),
            nn.LayerNorm(width),
            nn.ReLU(),
            nn.Linear(width, width),
        )

    def encode(self, depth: Tensor, intrinsics: Tensor, geometry: Geometry, dtype: torch.dtype) -> Tensor:
        """Sinusoidal code [B, P, R * R * 3 * (2F + 1)] of a depth map [B, image_size, image_size] in metres."""
        depth = F.adaptive_avg_pool2d(depth[:, None], self.cells)[:, 0]
        points = camera_points(depth, intrinsics, self.image_size, geometry)
        points = (points - points.new_tensor(_CENTER)) / _SCALE
        if geometry == "parity":
            points = points.to(dtype)  # the released weights saw sines of rounded coordinates
        return sinusoids(group_patches(points, self.per_side), self.n_freqs).to(dtype)

    def forward(self, depth: Tensor, intrinsics: Tensor, geometry: Geometry) -> Tensor:
        # What the layers compute in: training may keep fp32 weights under bf16 autocast, and must see the same points.
        device = depth.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else next(self.position_embedding_head.parameters()).dtype
        return self.position_embedding_head(self.encode(depth, intrinsics, geometry, dtype))
