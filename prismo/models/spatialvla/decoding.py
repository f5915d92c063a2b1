"""From observations to action chunks: our own greedy loop over a key-value cache, and the adaptive action ensemble.

Called by the policy (`prismo.policies`), by validation during training and by the tests. transformers' `generate` is
not used: it hands over an empty cache at the first step, prepares masks of its own and looks at up to 256 tokens.

Shape legend: B batch, L prompt tokens, D language width, K actions of a chunk, T = 3 K action tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from prismo.data.normalize import resolve_unnorm_key
from prismo.models.spatialvla.ego3d import CameraIntrinsics
from prismo.models.spatialvla.modeling import SpatialVLAForConditionalGeneration, attention_bias, token_positions
from prismo.models.spatialvla.processing import SpatialVLAProcessor, SpatialVLATextBatch


@torch.no_grad()
def greedy_action_tokens(
    model: SpatialVLAForConditionalGeneration,
    text: SpatialVLATextBatch,
    pixel_values: Tensor,
    intrinsics: Tensor,
    slots: Sequence[slice],
    tokens: int,
    *,
    unconstrained: bool = False,
) -> Tensor:
    """Decode `tokens` action tokens of every sample at once.

    Args:
        model: in evaluation mode.
        text: prompts, padded on the right (`SpatialVLAProcessor.query_text`), on the model's device.
        pixel_values: [B, 3, 224, 224] in 0..1.
        intrinsics: [B, 3, 3].
        slots: valid offsets of the tokens of one action, in turn (`ActionTokenizer.slots`). The head computes only
            their rows: at most 4096 of 265,347.
        tokens: T.
        unconstrained: choose among the whole vocabulary as the official code does; a sample that emits <eos> is filled
            up with padding, which decodes to an extreme pose.

    Returns:
        int64 ids [B, T].
    """
    first, eos, pad = model.config.action_token_begin_idx, model.config.eos_token_id, model.config.pad_token_id
    cache, mask = DynamicCache(), text.attention_mask
    position = mask.sum(-1, keepdim=True)  # of the last prompt token
    embeds = model.embed(text.input_ids, model.image_features(pixel_values, intrinsics))
    bias = attention_bias(mask, None, model.config.prefix_mask, embeds.dtype)
    hidden, _ = model.run_llm(embeds, bias, token_positions(mask), cache=cache)
    last = hidden.take_along_dim(position[..., None] - 1, dim=1)[:, 0]
    finished = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    ids: list[Tensor] = []
    for step in range(tokens):
        if unconstrained:
            token = model.lm_logits(last).argmax(-1).masked_fill(finished, pad)
            finished = finished | (token == eos)
        else:
            slot = slots[step % len(slots)]
            rows = slice(first + slot.start, first + slot.stop)
            token = model.lm_logits(last, rows).argmax(-1) + rows.start
        ids.append(token)
        if step + 1 < tokens:
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
            unseen = torch.finfo(embeds.dtype).min
            bias = torch.zeros(mask.shape, dtype=embeds.dtype, device=mask.device).masked_fill(mask == 0, unseen)
            states, _ = model.run_llm(
                model.embed(token[:, None]), bias[:, None, None], position + step + 1, cache=cache
            )
            last = states[:, 0]
    return torch.stack(ids, dim=1)


def predict_actions(
    model: SpatialVLAForConditionalGeneration,
    processor: SpatialVLAProcessor,
    images: Sequence[Image.Image | np.ndarray],
    instructions: Sequence[str],
    unnorm_key: str | None,
    *,
    camera: CameraIntrinsics | None = None,
    unconstrained: bool = False,
) -> np.ndarray:
    """Action chunks in physical units.

    Args:
        images: B RGB images (PIL or uint8 [H, W, 3]) of the primary camera.
        instructions: B task descriptions.
        unnorm_key: whose statistics scale the actions, e.g. `droid/1.0.0`.
        camera: intrinsics; None takes those that the checkpoint holds for `unnorm_key`, else its default.
        unconstrained: see `greedy_action_tokens`.

    Returns:
        float64 [B, K, 7]: translation, rotation and gripper as in the dataset of `unnorm_key` (gripper 1 = open).

    Raises:
        ValueError: unnorm_key absent or unknown (lists all keys), or unequal numbers of images and instructions.
    """
    key = resolve_unnorm_key(processor.statistics, unnorm_key)
    if len(images) != len(instructions):
        raise ValueError(f"expected one image per instruction, found {len(images)} and {len(instructions)}")
    matrices = processor.intrinsics(camera or processor.camera(key), len(images))
    ids = greedy_action_tokens(
        model,
        processor.query_text(instructions).to(model.device),
        processor.pixel_values(images).to(model.device),
        matrices.to(model.device),
        processor.action_tokenizer.slots,
        processor.action_tokens,
        unconstrained=unconstrained,
    )
    return processor.decode_actions(ids, key)


class AdaptiveEnsemble:
    """Action for the present step from the chunks predicted at the last steps (CogACT, arXiv 2411.19650).

    Every chunk that reaches the present step votes with weight exp(alpha * cosine), where the cosine compares its
    action with the newest one, so that predictions of another mode of the policy count less. One object serves one
    episode at a time.
    """

    def __init__(self, horizon: int = 4, alpha: float = 0.1) -> None:
        """Args:
        horizon: chunks that vote; not more than a chunk is long.
        alpha: sharpness; 0 is a plain mean.
        """
        if horizon < 1:
            raise ValueError(f"the ensemble's horizon must be at least 1, found {horizon}")
        self.alpha = alpha
        self._chunks: deque[np.ndarray] = deque(maxlen=horizon)

    def reset(self) -> None:
        """Forget everything. Call it at the start of each episode: old chunks would steer the first steps."""
        self._chunks.clear()

    def __call__(self, chunk: np.ndarray) -> np.ndarray:
        """Add the chunk [K, A] predicted now and return the action [A] of this step."""
        self._chunks.append(np.asarray(chunk, np.float64))
        # The newest chunk starts now; the one before has moved on by one step, and so on.
        votes = [past[age] for age, past in enumerate(reversed(self._chunks)) if age < len(past)]
        actions = np.stack(votes)
        newest = actions[0]
        lengths = np.linalg.norm(actions, axis=1) * np.linalg.norm(newest)
        cosine = actions @ newest / (lengths + 1e-7)
        weights = np.exp(self.alpha * cosine)
        return weights @ actions / weights.sum()
