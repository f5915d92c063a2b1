"""Move a model to another action grid: interpolate the rows of its action embeddings at the new bin centres.

Used when fine-tuning on a dataset whose actions are distributed differently ("spatial embedding adaption" of the
paper). The grid alone can also be exchanged, then token k keeps its embedding and means the k-th quantile of the new
distribution: pass the new tokeniser to the processor and do not call this.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prismo.models.spatialvla.action_tokenizer import GROUPS, ActionTokenizer
from prismo.models.spatialvla.modeling import SpatialVLAForConditionalGeneration


def interpolate_rows(table: Tensor, old: ActionTokenizer, new: ActionTokenizer) -> Tensor:
    """Rows [8194, D] for the bins of `new` from rows for the bins of `old`; the two gripper rows stay.

    Linear in each of the three variables of a block, with the outermost rows continued to the ends of the range.
    A tensor grid needs no triangulation: three small matrices do it, exactly. Rows are stored with the first variable
    slowest ("ij"); the official code pairs them with points in numpy's default "xy" order, which scrambles phi, roll
    and pitch (its adapted rows are further from the truth than untouched ones).

    Raises:
        ValueError: the grids have different numbers of bins, or the table another number of rows.
    """
    if old.bins != new.bins:
        raise ValueError(f"the grids must have equal numbers of bins, found {old.bins} and {new.bins}")
    if len(table) != old.size:
        raise ValueError(f"the table has {len(table)} rows, the grid {old.size} tokens")
    result = table.to(torch.float64, copy=True)
    for (group, names), rows in zip(GROUPS.items(), old.slots[:2], strict=True):
        a, b, c = (_weights(old.centers(name), new.centers(name)).to(table.device) for name in names)
        volume = result[rows].unflatten(0, old.shape(group))
        result[rows] = torch.einsum("ia,jb,kc,abcd->ijkd", a, b, c, volume).flatten(0, 2)
    return result.to(table.dtype)


def _weights(old: np.ndarray, new: np.ndarray) -> Tensor:
    """Matrix [new, old] of linear interpolation: column i is the interpolated i-th unit vector."""
    return torch.from_numpy(np.stack([np.interp(new, old, unit) for unit in np.eye(len(old))], axis=1))


@torch.no_grad()
def rediscretize(
    model: SpatialVLAForConditionalGeneration, old: ActionTokenizer, new: ActionTokenizer, lm_head: bool = False
) -> None:
    """Adapt the action embeddings of `model` in place, and with `lm_head` the output rows too (the authors do not)."""
    table = model.spatial_embed_tokens.weight
    table.copy_(interpolate_rows(table, old, new))
    if lm_head:
        rows = model.language_model.lm_head.weight[model.config.action_token_begin_idx :]
        rows.copy_(interpolate_rows(rows, old, new))
