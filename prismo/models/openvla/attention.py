"""Attention masks of OpenVLA's Llama: causal, or bidirectional as OpenVLA-OFT needs it.

The original relies on a patched transformers that still calls itself 4.40.1; with the stock one everything runs and
success collapses to about half. Here the kind of attention is an argument, and it means the same for every kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prismo.models.self_test import AttentionKind


def attention_mask_for(implementation: str, kind: AttentionKind, keys: Tensor | None, queries: Tensor) -> Tensor | None:
    """The mask in the form that transformers' attention function `implementation` takes.

    Args:
        implementation: "sdpa", "eager" or a flash-attention name.
        kind: who sees whom.
        keys: True at real tokens [B, S], or None without padding. S exceeds Q while decoding over a cache.
        queries: hidden states [B, Q, D] (for size, dtype and device).

    Returns:
        None where the kernel needs no mask (a causal one without padding follows `module.is_causal`); flash: the 2-D
        padding mask; sdpa: boolean, broadcastable to [B, 1, Q, S], True = may attend; eager: the same, additive float.

    Raises:
        ValueError: unknown implementation.
    """
    if "flash" in implementation:
        return keys
    if implementation not in ("sdpa", "eager"):
        raise ValueError(f"attn_implementation {implementation!r}; expected 'sdpa', 'eager' or 'flash_attention_2'")
    length = queries.shape[1]
    causal = kind == "causal" and length > 1
    if keys is None and not (causal and implementation == "eager"):
        return None
    if keys is None:
        keys = torch.ones(1, length, dtype=torch.bool, device=queries.device)
    allowed = keys[:, None, None]
    if causal:
        total = allowed.shape[-1]
        allowed = allowed & torch.ones(length, total, dtype=torch.bool, device=queries.device).tril(total - length)
    if implementation == "sdpa":
        return allowed
    blocked = torch.finfo(queries.dtype).min
    return torch.zeros(allowed.shape, dtype=queries.dtype, device=queries.device).masked_fill(~allowed, blocked)
