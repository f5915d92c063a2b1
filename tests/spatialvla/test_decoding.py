"""Greedy decoding (batched, cached, constrained) and the adaptive ensemble."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from prismo.models.spatialvla import (
    LIBERO_AGENTVIEW,
    AdaptiveEnsemble,
    SpatialVLAForConditionalGeneration,
    SpatialVLAProcessor,
    TokenDecoder,
    predict_actions,
)
from prismo.models.spatialvla.modeling import attention_bias, token_positions
from tests.spatialvla.conftest import INSTRUCTIONS

KEY = "droid/1.0.0"


def decode(
    model: SpatialVLAForConditionalGeneration,
    processor: SpatialVLAProcessor,
    frames: list[np.ndarray],
    instructions: tuple[str, ...] = INSTRUCTIONS,
    unconstrained: bool = False,
) -> Tensor:
    return decoder(model, processor, unconstrained)(
        processor.query_text(instructions),
        processor.pixel_values(frames),
        processor.intrinsics(processor.camera(), len(frames)),
    )


def decoder(
    model: SpatialVLAForConditionalGeneration, processor: SpatialVLAProcessor, unconstrained: bool = False
) -> TokenDecoder:
    return TokenDecoder(model, processor.action_tokenizer.slots, processor.action_tokens, unconstrained=unconstrained)


@pytest.fixture(scope="module")
def ids(model: SpatialVLAForConditionalGeneration, processor: SpatialVLAProcessor, frames: list[np.ndarray]) -> Tensor:
    return decode(model, processor, frames)


def test_every_token_fits_its_slot(ids: Tensor, processor: SpatialVLAProcessor) -> None:
    assert ids.shape == (3, 12)
    offsets = ids.view(3, 4, 3) - processor.config.action_token_begin_idx
    for i, slot in enumerate(processor.action_tokenizer.slots):
        assert ((offsets[..., i] >= slot.start) & (offsets[..., i] < slot.stop)).all()
    assert len(ids.unique(dim=0)) == 3  # images and instructions have an influence


@pytest.mark.parametrize("unconstrained", [False, True])
def test_batch_equals_one_by_one(
    model: SpatialVLAForConditionalGeneration,
    processor: SpatialVLAProcessor,
    frames: list[np.ndarray],
    unconstrained: bool,
) -> None:
    together = decode(model, processor, frames, unconstrained=unconstrained)
    for i in range(3):
        alone = decode(model, processor, [frames[i]], (INSTRUCTIONS[i],), unconstrained)
        assert alone[0].tolist() == together[i].tolist()


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_cache_equals_recomputation(
    fresh: SpatialVLAForConditionalGeneration,
    processor: SpatialVLAProcessor,
    frames: list[np.ndarray],
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A naive loop that runs the whole sequence for every token and cuts the full logits."""
    fresh.config.prefix_mask = mode
    head, states = fresh.lm_logits, []
    with monkeypatch.context() as patch:
        patch.setattr(fresh, "lm_logits", lambda hidden, rows: states.append(hidden) or head(hidden, rows))
        ids = decode(fresh, processor, frames[::2], INSTRUCTIONS[::2])
    sequence = torch.tensor([processor.prompt_ids(INSTRUCTIONS[0])])
    prompt, first = sequence.shape[1], processor.config.action_token_begin_idx
    assert prompt < len(processor.prompt_ids(INSTRUCTIONS[2]))  # so that the cached run has padding in the middle
    with torch.no_grad():
        matrices = processor.intrinsics(processor.camera(), 1)
        features = fresh.image_features(processor.pixel_values(frames[:1]), matrices)
        for step in range(12):
            mask, types = torch.ones_like(sequence), torch.zeros_like(sequence)
            types[:, prompt:] = 1
            bias = attention_bias(mask, types, mode, torch.float32)
            hidden, _ = fresh.run_llm(fresh.embed(sequence, features), bias, token_positions(mask))
            torch.testing.assert_close(states[step][0], hidden[0, -1], rtol=1e-4, atol=1e-5)
            slot = processor.action_tokenizer.slots[step % 3]
            token = fresh.lm_logits(hidden[:, -1])[:, first + slot.start : first + slot.stop].argmax(-1)
            token = token + first + slot.start
            assert token.item() == ids[0, step]
            sequence = torch.cat((sequence, token[:, None]), dim=1)


def test_modes_of_attention_differ(
    fresh: SpatialVLAForConditionalGeneration, processor: SpatialVLAProcessor, frames: list[np.ndarray], ids: Tensor
) -> None:
    fresh.config.prefix_mask = "causal"
    assert not torch.equal(decode(fresh, processor, frames), ids)


def test_unconstrained_pads_after_the_end(
    fresh: SpatialVLAForConditionalGeneration, processor: SpatialVLAProcessor, frames: list[np.ndarray]
) -> None:
    free = decode(fresh, processor, frames, unconstrained=True)
    # Make <eos> win wherever the second token was chosen, and only there.
    with torch.no_grad():
        winner = int(free[0, 1])
        head = fresh.language_model.lm_head.weight
        head[processor.config.eos_token_id] = 1.5 * head[winner]
    stopped = decode(fresh, processor, frames, unconstrained=True)[0]
    end = stopped.tolist().index(processor.config.eos_token_id)
    assert end <= 1
    assert (stopped[end + 1 :] == processor.config.pad_token_id).all()
    offsets = decode(fresh, processor, frames)[0] - processor.config.action_token_begin_idx
    assert (offsets >= 0).all()  # constrained decoding cannot stop


def test_adapters_on_the_head_are_not_bypassed(
    fresh: SpatialVLAForConditionalGeneration, processor: SpatialVLAProcessor, frames: list[np.ndarray], ids: Tensor
) -> None:
    vla = get_peft_model(fresh, LoraConfig(r=2, target_modules=r"language_model\.lm_head"))
    with torch.no_grad():
        for name, parameter in vla.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    adapted = decode(vla, processor, frames)
    assert not torch.equal(adapted, ids)
    assert torch.equal(decode(vla.merge_and_unload(), processor, frames), adapted)


def test_predict_actions(
    model: SpatialVLAForConditionalGeneration, processor: SpatialVLAProcessor, frames: list[np.ndarray], ids: Tensor
) -> None:
    actions = predict_actions(decoder(model, processor), processor, frames, INSTRUCTIONS, KEY)
    assert actions.shape == (3, 4, 7)
    np.testing.assert_allclose(actions, processor.decode_actions(ids, KEY))
    stats = processor.statistics[KEY].action
    assert (actions[..., :6] >= stats.q01[:6] - 1e-6).all()
    assert (actions[..., :6] <= stats.q99[:6] + 1e-6).all()
    other = predict_actions(decoder(model, processor), processor, frames, INSTRUCTIONS, KEY, camera=LIBERO_AGENTVIEW)
    assert not np.array_equal(actions, other)
    for key in (None, "libero_spatial"):
        with pytest.raises(ValueError, match="unnorm_key") as error:
            predict_actions(decoder(model, processor), processor, frames, INSTRUCTIONS, key)
        assert all(known in str(error.value) for known in processor.statistics)
    with pytest.raises(ValueError, match="found 3 and 1"):
        predict_actions(decoder(model, processor), processor, frames, INSTRUCTIONS[:1], KEY)


def test_bf16_runs(tiny_spatialvla: Path, processor: SpatialVLAProcessor, frames: list[np.ndarray]) -> None:
    half = SpatialVLAForConditionalGeneration.from_pretrained(tiny_spatialvla, dtype=torch.bfloat16)
    together = decode(half, processor, frames)
    assert together.shape == (3, 12)
    assert torch.equal(together, decode(half, processor, frames))


@pytest.mark.gpu
@pytest.mark.parametrize("unconstrained", [False, True])
def test_cuda_graph_equals_eager(
    tiny_spatialvla: Path, processor: SpatialVLAProcessor, frames: list[np.ndarray], unconstrained: bool
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    vla = SpatialVLAForConditionalGeneration.from_pretrained(tiny_spatialvla, device="cuda")
    slots = processor.action_tokenizer.slots
    eager, graph = (TokenDecoder(vla, slots, 12, unconstrained=unconstrained, cuda_graph=on) for on in (False, True))
    for count in (3, 1, 3):  # another batch size in between; the first graph is used again
        text = processor.query_text(INSTRUCTIONS[:count]).to("cuda")
        inputs = (
            processor.pixel_values(frames[:count]).cuda(),
            processor.intrinsics(processor.camera(), count).cuda(),
        )
        assert torch.equal(graph(text, *inputs), eager(text, *inputs))
    assert len(graph._graphs) == 2


def test_ensemble_weights() -> None:
    rng = np.random.default_rng(0)
    chunks = rng.normal(size=(5, 4, 7))
    ensemble = AdaptiveEnsemble(horizon=4, alpha=0.7)
    for step, chunk in enumerate(chunks):
        action = ensemble(chunk)
        votes = np.stack([chunks[step - age][age] for age in range(min(4, step + 1))])
        cosine = [vote @ votes[0] / np.linalg.norm(vote) / np.linalg.norm(votes[0]) for vote in votes]
        weights = np.exp(0.7 * np.array(cosine))
        np.testing.assert_allclose(action, (weights[:, None] * votes).sum(0) / weights.sum(), atol=1e-6)


def test_ensemble_prefers_agreement_and_forgets_on_reset() -> None:
    same, opposite = np.tile([1.0, 0, 0], (4, 1)), np.tile([-1.0, 0, 0], (4, 1))
    ensemble = AdaptiveEnsemble(horizon=4, alpha=5)
    ensemble(opposite)
    assert ensemble(same)[0] > 0.99
    ensemble.reset()
    np.testing.assert_array_equal(ensemble(opposite), opposite[0])
    np.testing.assert_array_equal(AdaptiveEnsemble(alpha=0)(np.zeros((4, 3))), np.zeros(3))
    short = AdaptiveEnsemble(horizon=4)
    for value in (1.0, 2.0, 3.0):
        last = short(np.full((2, 3), value))  # a chunk of two reaches one step ahead
    assert 2 < last[0] < 3
    with pytest.raises(ValueError, match="at least 1"):
        AdaptiveEnsemble(horizon=0)
