"""One vision transformer for every tower of the project.

It serves OpenVLA's DINOv2-L/14-reg and SigLIP-so400m towers (`prismo.models.openvla`), VGGT's DINOv2 patch embedder and
VGGT's frame/global blocks (`prismo.align.vggt`). Parameter names are those of the published checkpoints, which differ
between the two families (timm and DINOv2), hence the `layout` switch.

Shape legend: B images (or image groups), N tokens, P patches, C width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prismo.util.schema import own_keys

RopeTable = tuple[Tensor, Tensor]
Modulation = tuple[Tensor, Tensor]


@own_keys
@dataclass(frozen=True)
class ViTConfig:
    """Sizes and conventions of one tower.

    Attributes:
        width, depth, heads, mlp_width: residual stream, blocks, attention heads, MLP hidden units.
        image_size: pixels per side that the stored position embedding was made for.
        patch_size: pixels per side of one patch.
        layout: "timm" stores positions for patches only and names registers `reg_token`; "dinov2" stores positions for
            CLS and patches and names them `register_tokens`.
        cls_token, registers: tokens in front of the patches.
        layer_scale: parameter name of LayerScale, or None without it. OpenVLA renames timm's `gamma` to `scale_factor`.
        eps: LayerNorm epsilon.
        attention_pool: SigLIP's pooling head. Published checkpoints hold its weights; no VLA ever computes it.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    image_size: int = 224
    patch_size: int = 14
    layout: Literal["timm", "dinov2"] = "timm"
    cls_token: bool = False
    registers: int = 0
    layer_scale: Literal["gamma", "scale_factor"] | None = None
    eps: float = 1e-6
    attention_pool: bool = False

    @property
    def grid(self) -> int:
        """Patches per side at `image_size`."""
        return self.image_size // self.patch_size


class LayerScale(nn.Module):
    """Per-channel gain on a residual branch (CaiT, arXiv 2103.17239), under either published parameter name."""

    def __init__(self, width: int, name: str, init: float = 1e-5) -> None:
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.full((width,), init)))

    def forward(self, x: Tensor) -> Tensor:
        return x * getattr(self, self.name)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them; `output` channels, by default as many as go in."""

    def __init__(self, width: int, hidden: int, output: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, output or width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def apply_rope(x: Tensor, table: RopeTable) -> Tensor:
    """Rotate `x` [B, H, N, D] by the 2-D table (cos, sin), each [N, D].

    The first half of D turns with the row, the second with the column; inside each half the pairs are (i, i + D/4).
    """
    cos, sin = table
    a, b = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    turned = torch.stack((-b, a), dim=-2).flatten(-3)
    return x * cos + turned * sin


class Attention(nn.Module):
    """Multi-head self-attention; optional LayerNorm and 2-D RoPE on queries and keys."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        head_dim = width // heads
        self.q_norm = nn.LayerNorm(head_dim, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: RopeTable | None = None, mask: Tensor | None = None) -> Tensor:
        """`x` [B, N, C]; `mask` boolean, broadcastable to [B, H, N, N], True = may be attended to."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        # LayerNorm and RoPE may leave q and k in fp32 while v is bf16; attention runs in the dtype of v.
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: `x + ls1(attn(norm1 x))`, then `x + ls2(mlp(norm2 x))`."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        eps: float,
        layer_scale: str | None = None,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, qk_norm=qk_norm, eps=eps)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp_width)
        self.ls2 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rope: RopeTable | None = None,
        modulation: Modulation | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x: [B, N, C].
            rope: tables of `apply_rope`.
            modulation: FiLM's (gamma, beta), each [B, 1, C], applied between the two branches.
            mask: see `Attention.forward`.
        """
        x = x + self.ls1(self.attn(self.norm1(x), rope, mask))
        if modulation is not None:
            gamma, beta = modulation
            x = x * (1 + gamma) + beta
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Non-overlapping convolution: [B, 3, H, W] -> [B, P, C], row-major."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class AttentionPool(nn.Module):
    """Weights of SigLIP's pooling head: kept so that checkpoints load and save unchanged, never computed."""

    def __init__(self, width: int, mlp_width: int, eps: float) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp_width)


class VisionTransformer(nn.Module):
    """A tower from pixels to patch tokens.

    Args:
        config: sizes and naming.

    The published checkpoints contain more than is used: OpenVLA reads the second-to-last block, so the last block, the
    final norm and the attention pool exist only as weights.
    """

    register_tokens: nn.Parameter  # with registers, in the layout "dinov2"

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        width, dinov2 = config.width, config.layout == "dinov2"
        self.patch_embed = PatchEmbed(width, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.cls_token else None
        positions = config.grid**2 + (1 if dinov2 and config.cls_token else 0)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, width))
        if config.registers:
            name = "register_tokens" if dinov2 else "reg_token"
            self.register_parameter(name, nn.Parameter(torch.zeros(1, config.registers, width)))
        if dinov2:
            self.mask_token = nn.Parameter(torch.zeros(1, width))  # in the file, used only by DINOv2's own training
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_width, eps=config.eps, layer_scale=config.layer_scale)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=config.eps)
        if config.attention_pool:
            self.attn_pool = AttentionPool(width, config.mlp_width, config.eps)
        self.gradient_checkpointing = False

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] -> tokens [B, prefix + P, C] with positions added."""
        rows, columns = pixels.shape[-2] // self.config.patch_size, pixels.shape[-1] // self.config.patch_size
        x = self.patch_embed(pixels)
        batch = x.shape[0]
        if self.config.layout == "timm":
            # timm's `no_embed_class`: positions belong to patches, prefix tokens come afterwards.
            x = x + self.pos_embed
            prefix = [t for t in (self.cls_token, getattr(self, "reg_token", None)) if t is not None]
            return torch.cat([*(t.expand(batch, -1, -1) for t in prefix), x], dim=1)
        # DINOv2 gives a position to CLS, and none to registers.
        positions = self._positions(rows, columns)
        prefix = [] if self.cls_token is None else [self.cls_token + positions[:, :1]]
        if self.config.registers:
            prefix.append(self.register_tokens)
        return torch.cat([*(t.expand(batch, -1, -1) for t in prefix), x + positions[:, -x.shape[1] :]], dim=1)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """DINOv2 positions [1, 1 + rows*columns, C], bicubically resampled when the grid is not the stored one."""
        grid = self.config.grid
        if (rows, columns) == (grid, grid):
            return self.pos_embed
        patches = self.pos_embed[:, 1:].float().unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=(rows, columns), mode="bicubic", antialias=True)
        patches = patches.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, :1], patches], dim=1)

    def forward(
        self, pixels: Tensor, *, blocks: int | None = None, final_norm: bool = False, condition: Tensor | None = None
    ) -> Tensor:
        """Patch tokens after the first `blocks` blocks.

        Args:
            pixels: normalised images [B, 3, H, W].
            blocks: how many blocks to compute; None = all.
            final_norm: apply the tower's last LayerNorm.
            condition: language embedding [B, D] for FiLM-wrapped blocks (`prismo.models.film`).

        Returns:
            [B, P, C], prefix tokens dropped.
        """
        x = self.embed(pixels)
        extra = () if condition is None else (condition,)
        for block in self.blocks[:blocks]:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, *extra, use_reentrant=False)
            else:
                x = block(x, *extra)
        if final_norm:
            x = self.norm(x)
        return x[:, int(self.config.cls_token) + self.config.registers :]
