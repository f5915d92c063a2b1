"""From observations to action chunks: our own greedy loop over a key-value cache, and the adaptive action ensemble.

Called by the policy (`prismo.policies`), by validation during training and by the tests. transformers' `generate` is
not used: it hands over an empty cache at the first step, prepares masks of its own and looks at up to 256 tokens.

Shape legend: B batch, L prompt tokens, D language width, K actions of a chunk, T = 3 K action tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from prismo.data.normalize import resolve_unnorm_key
from prismo.models.spatialvla.ego3d import CameraIntrinsics
from prismo.models.spatialvla.modeling import SpatialVLAForConditionalGeneration, attention_bias, token_positions
from prismo.models.spatialvla.processing import SpatialVLAProcessor, SpatialVLATextBatch

_LENGTH_STEP = 16  # prompts are padded to a multiple of this before a graph is chosen
_MAX_GRAPHS = 8


class TokenDecoder:
    """Greedy decoding of the action tokens of a batch of samples.

    On a GPU the language model's part (prefill and all T steps, some 25,000 small kernels) is recorded once per batch
    size and prompt length as a CUDA graph and replayed: launching them one by one takes longer than running them.

    Args:
        model: in evaluation mode. Weights may change in place between calls, but must not be replaced or moved.
        slots: valid offsets of the tokens of one action, in turn (`ActionTokenizer.slots`). The head computes only
            their rows: at most 4096 of 265,347.
        tokens: T.
        unconstrained: choose among the whole vocabulary as the official code does; a sample that emits <eos> is filled
            up with padding, which decodes to an extreme pose.
        cuda_graph: None = on GPUs.
    """

    def __init__(
        self,
        model: SpatialVLAForConditionalGeneration,
        slots: Sequence[slice],
        tokens: int,
        *,
        unconstrained: bool = False,
        cuda_graph: bool | None = None,
    ) -> None:
        self.model, self.slots, self.tokens, self.unconstrained = model, tuple(slots), tokens, unconstrained
        self.cuda_graph = model.device.type == "cuda" if cuda_graph is None else cuda_graph
        self._graphs: dict[tuple[int, ...], _Recorded] = {}
        # One pool for all graphs: they never run at the same time, and results are copied out after each replay.
        self._pool = torch.cuda.graph_pool_handle() if self.cuda_graph else None

    @torch.no_grad()
    def __call__(self, text: SpatialVLATextBatch, pixel_values: Tensor, intrinsics: Tensor) -> Tensor:
        """Ids int64 [B, T].

        Args:
            text: prompts, padded on the right (`SpatialVLAProcessor.query_text`), on the model's device.
            pixel_values: [B, 3, 224, 224] in 0..1.
            intrinsics: [B, 3, 3].
        """
        embeds = self.model.embed(text.input_ids, self.model.image_features(pixel_values, intrinsics))
        if not self.cuda_graph:
            return self._decode(embeds, text.attention_mask)
        return self._replay(embeds, text.attention_mask)

    def _decode(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Prefill and T steps from input vectors [B, L, D] and their mask [B, L]; never waits for the device."""
        model, config = self.model, self.model.config
        first, length = config.action_token_begin_idx, embeds.shape[1]
        cache = _Cache(length + self.tokens - 1)
        bias = attention_bias(mask, None, config.prefix_mask, embeds.dtype)
        hidden, _ = model.run_llm(embeds, bias, token_positions(mask), cache=cache)
        position = mask.sum(-1, keepdim=True)  # of the last prompt token, counted from one
        last = hidden.take_along_dim(position[..., None] - 1, dim=1)[:, 0]
        # Every step sees the prompt without padding and the tokens up to itself.
        seen = F.pad(mask != 0, (0, self.tokens - 1))
        finished = torch.zeros_like(mask[:, 0], dtype=torch.bool)
        ids: list[Tensor] = []
        for step in range(self.tokens):
            if self.unconstrained:
                token = model.lm_logits(last).argmax(-1).masked_fill(finished, config.pad_token_id)
                finished = finished | (token == config.eos_token_id)
            else:
                slot = self.slots[step % len(self.slots)]
                rows = slice(first + slot.start, first + slot.stop)
                token = model.lm_logits(last, rows).argmax(-1) + rows.start
            ids.append(token)
            if step + 1 < self.tokens:
                seen[:, length + step] = True
                bias = torch.zeros_like(seen, dtype=embeds.dtype).masked_fill(~seen, torch.finfo(embeds.dtype).min)
                token_embeds = model.embed(token[:, None])
                states, _ = model.run_llm(token_embeds, bias[:, None, None], position + step + 1, cache=cache)
                last = states[:, 0]
        return torch.stack(ids, dim=1)

    def _replay(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """`_decode` through a recorded graph of at least this batch size and length."""
        batch, length = mask.shape
        size = 1 << (batch - 1).bit_length()
        padding = -length % _LENGTH_STEP
        mask = F.pad(mask, (0, padding, 0, size - batch))
        mask[batch:, 0] = 1  # samples that only fill up the batch need one token
        embeds = F.pad(embeds, (0, 0, 0, padding, 0, size - batch))
        key = (*mask.shape,)
        if key not in self._graphs:
            if len(self._graphs) == _MAX_GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            self._graphs[key] = self._record(embeds, mask)
        recorded = self._graphs[key]
        recorded.embeds.copy_(embeds)
        recorded.mask.copy_(mask)
        recorded.graph.replay()
        return recorded.ids[:batch].clone()

    def _record(self, embeds: Tensor, mask: Tensor) -> _Recorded:
        embeds, mask = embeds.clone(), mask.clone()
        stream = torch.cuda.Stream(mask.device)
        stream.wait_stream(torch.cuda.current_stream(mask.device))
        with torch.cuda.stream(stream):
            self._decode(embeds, mask)  # libraries set up their workspaces before anything is recorded
        torch.cuda.current_stream(mask.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            ids = self._decode(embeds, mask)
        return _Recorded(graph, embeds, mask, ids)


@dataclass(frozen=True)
class _Recorded:
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    embeds: Tensor
    mask: Tensor
    ids: Tensor


class _Cache:
    """Keys and values of every layer in memory of fixed size, as Gemma2's attention expects a cache to behave.

    Unlike transformers' caches it allocates once, does nothing on the host and has no notion of masks.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._layers: dict[int, tuple[Tensor, Tensor, int]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append [B, heads, new, dim] of a layer and return what its queries may look at."""
        if layer_idx not in self._layers:
            room = self.length - keys.shape[2]
            stored = F.pad(keys, (0, 0, 0, room)), F.pad(values, (0, 0, 0, room))
            self._layers[layer_idx] = (*stored, keys.shape[2])
            return keys, values
        all_keys, all_values, used = self._layers[layer_idx]
        end = used + keys.shape[2]
        all_keys[:, :, used:end], all_values[:, :, used:end] = keys, values
        self._layers[layer_idx] = (all_keys, all_values, end)
        return all_keys, all_values


def predict_actions(
    decoder: TokenDecoder,
    processor: SpatialVLAProcessor,
    images: Sequence[Image.Image | np.ndarray],
    instructions: Sequence[str],
    unnorm_key: str | None,
    *,
    camera: CameraIntrinsics | None = None,
) -> np.ndarray:
    """Action chunks in physical units.

    Args:
        decoder: of the model; keep it between calls.
        images: B RGB images (PIL or uint8 [H, W, 3]) of the primary camera.
        instructions: B task descriptions.
        unnorm_key: whose statistics scale the actions, e.g. `droid/1.0.0`.
        camera: intrinsics; None takes those that the checkpoint holds for `unnorm_key`, else its default.

    Returns:
        float64 [B, K, 7]: translation, rotation and gripper as in the dataset of `unnorm_key` (gripper 1 = open).

    Raises:
        ValueError: unnorm_key absent or unknown (lists all keys), or unequal numbers of images and instructions.
    """
    key = resolve_unnorm_key(processor.statistics, unnorm_key)
    if len(images) != len(instructions):
        raise ValueError(f"expected one image per instruction, found {len(images)} and {len(instructions)}")
    device = decoder.model.device
    matrices = processor.intrinsics(camera or processor.camera(key), len(images))
    ids = decoder(
        processor.query_text(instructions).to(device),
        processor.pixel_values(images).to(device),
        matrices.to(device),
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
