"""Masks, inputs, loss and gradients of the network (its numbers are checked in test_golden_spatialvla.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.beit.modeling_beit import BeitDropPath, BeitRelativePositionBias

from prismo.models.spatialvla import LORA_TARGETS, SpatialVLAForConditionalGeneration, SpatialVLAProcessor
from prismo.models.spatialvla.depth import ConstantPositionBias, _zoe_input, predict_depth
from prismo.models.spatialvla.modeling import attention_bias, token_positions
from tests.spatialvla.conftest import INSTRUCTIONS

Inputs = dict[str, Tensor]


@pytest.fixture(scope="module")
def actions() -> np.ndarray:
    values = np.clip(np.random.default_rng(0).normal(0, 0.35, (3, 4, 7)), -1, 1)
    values[..., 6] = values[..., 6] > 0
    return values


@pytest.fixture(scope="module")
def batch(processor: SpatialVLAProcessor, frames: list[np.ndarray], actions: np.ndarray) -> Inputs:
    """A training batch of three samples of different length."""
    text = processor.training_text(INSTRUCTIONS, actions)
    return {**vars(text), "pixel_values": processor.pixel_values(frames), "intrinsics": intrinsics(processor, 3)}


def intrinsics(processor: SpatialVLAProcessor, count: int) -> Tensor:
    return processor.intrinsics(processor.camera(), count)


def allowed(mask: Tensor, types: Tensor | None, prefix: str) -> list[list[int]]:
    """1 where a row sees a column, first sample."""
    return (attention_bias(mask, types, prefix, torch.float32)[0, 0] == 0).int().tolist()


def test_prefix_masks() -> None:
    mask, types = torch.tensor([[1, 1, 1, 1, 0]]), torch.tensor([[0, 0, 1, 1, 1]])
    padding = [1, 1, 1, 1, 0]  # a padded row sees something, so that its softmax is finite; nothing reads it
    assert allowed(mask, types, "bidirectional") == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        padding,
    ]
    assert allowed(mask, types, "causal")[:2] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert allowed(mask, types, "causal")[2:] == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], padding]
    # Inference: no suffix, everything sees everything but the padding.
    assert allowed(mask, None, "bidirectional")[0] == padding
    # The padding of the authors' collator has token type 0; it must stay invisible.
    assert allowed(mask, torch.tensor([[0, 0, 1, 1, 0]]), "bidirectional")[2] == [1, 1, 1, 0, 0]


def test_positions_count_real_tokens_from_one() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert token_positions(mask).tolist() == [[1, 2, 3, 3], [0, 1, 2, 3]]


def test_prefix_sees_later_prefix_tokens_only_if_bidirectional(
    fresh: SpatialVLAForConditionalGeneration, batch: Inputs
) -> None:
    inputs = {name: value[:1] for name, value in batch.items() if name != "labels"}
    prefix = int((inputs["token_type_ids"] == 0).sum())
    other = inputs["input_ids"].clone()
    other[0, prefix - 2] = 120  # a text token of the prompt
    suffix = inputs["input_ids"].clone()
    suffix[0, prefix + 4] = fresh.config.action_token_begin_idx  # a later action token
    for mode, changes in (("bidirectional", True), ("causal", False)):
        fresh.config.prefix_mask = mode
        with torch.no_grad():
            states = [fresh(**{**inputs, "input_ids": ids}).last_hidden_state[0] for ids in (other, suffix)]
            base = fresh(**inputs).last_hidden_state[0]
        assert ((states[0][: prefix - 2] - base[: prefix - 2]).abs().max() > 1e-4) == changes
        assert (states[0][prefix:] - base[prefix:]).abs().max() > 1e-4
        torch.testing.assert_close(states[1][: prefix + 4], base[: prefix + 4], rtol=0, atol=0)
        assert (states[1][prefix + 4 :] - base[prefix + 4 :]).abs().max() > 1e-4


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_padding_changes_nothing(fresh: SpatialVLAForConditionalGeneration, batch: Inputs, mode: str) -> None:
    fresh.config.prefix_mask = mode
    with torch.no_grad():
        together = fresh(**batch)
        for i in range(3):
            length = int(batch["attention_mask"][i].sum())
            fields = {name: value[i : i + 1] for name, value in batch.items()}
            for name in ("input_ids", "attention_mask", "token_type_ids", "labels"):
                fields[name] = fields[name][:, :length]
            alone = fresh(**fields)
            torch.testing.assert_close(
                together.last_hidden_state[i, :length], alone.last_hidden_state[0], rtol=1e-4, atol=1e-4
            )
            # On the left it must not matter either.
            padded = {name: F.pad(value, (5, 0)) for name, value in fields.items() if value.ndim == 2}
            padded["labels"][:, :5] = -100
            left = fresh(**{**fields, **padded})
            torch.testing.assert_close(left.loss, alone.loss, rtol=1e-4, atol=1e-5)


def test_loss_is_cross_entropy_of_thirteen_tokens(model: SpatialVLAForConditionalGeneration, batch: Inputs) -> None:
    output = model(**batch)
    assert output.logits.shape == (3 * 13, model.config.text_config.vocab_size)
    assert output.logits.dtype == torch.float32
    logits = model.lm_logits(output.last_hidden_state[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert output.logits.abs().max() <= 30
    assert output.targets.view(3, 13)[:, -1].tolist() == [model.config.eos_token_id] * 3


def test_image_tokens_are_the_scaled_projection_and_actions_have_their_own_table(
    model: SpatialVLAForConditionalGeneration, batch: Inputs
) -> None:
    features = torch.randn(3, 256, model.llm_dim)
    vectors = model.embed(batch["input_ids"], features)
    torch.testing.assert_close(vectors[:, :256], features, rtol=0, atol=0)
    first = model.config.action_token_begin_idx
    suffix = batch["input_ids"][0] >= first
    rows = model.spatial_embed_tokens.weight[batch["input_ids"][0][suffix] - first]
    torch.testing.assert_close(vectors[0][suffix], rows * model.llm_dim**0.5)
    bos = model.get_input_embeddings().weight[model.config.bos_token_id]
    torch.testing.assert_close(vectors[0, 256], bos * model.llm_dim**0.5)
    with pytest.raises(ValueError, match="768 image tokens for 512 image features"):
        model.embed(batch["input_ids"], features[:2])


def test_black_and_white_images_give_other_logits(
    model: SpatialVLAForConditionalGeneration, processor: SpatialVLAProcessor
) -> None:
    text = processor.query_text(["put it on the plate"] * 2)
    pixels = torch.stack((torch.zeros(3, 224, 224), torch.ones(3, 224, 224)))
    hidden = model(text.input_ids, pixels, intrinsics(processor, 2), text.attention_mask).last_hidden_state
    black, white = model.lm_logits(hidden[:, -1])
    assert (black - white).abs().max() > 1e-2


def test_intrinsics_and_geometry_matter(
    fresh: SpatialVLAForConditionalGeneration, processor: SpatialVLAProcessor, batch: Inputs
) -> None:
    pixels, matrix = batch["pixel_values"][:1], intrinsics(processor, 1)
    with torch.no_grad():
        parity = fresh.image_features(pixels, matrix)
        zoomed = fresh.image_features(pixels, matrix * torch.tensor([[1.2], [1.2], [1.0]]))
        fresh.config.geometry = "exact"
        exact = fresh.image_features(pixels, matrix)
        depth = torch.full((1, 224, 224), 0.8)
        given = fresh.image_features(pixels, matrix, depth)
    assert (parity - zoomed).abs().max() > 1e-3
    assert (parity - exact).abs().max() > 0
    assert (given - exact).abs().max() > 1e-3


def test_depth_does_not_depend_on_batch_mates(fresh: SpatialVLAForConditionalGeneration, frames: list) -> None:
    """Images whose domain votes differ, each with its own head."""
    zoe, rng = fresh.vision_zoe_model, np.random.default_rng(5)
    pixels = torch.from_numpy(rng.random((3, 3, 224, 224), dtype=np.float32)) * torch.tensor([0.1, 1, 0.6]).view(
        3, 1, 1, 1
    )
    images = nn.functional.interpolate((pixels - 0.5) / 0.5, size=96)
    with torch.no_grad():
        logits = zoe(images).domain_logits
        margins = (logits[:, 0] - logits[:, 1]).sort().values
        # Move the decision between the first and the other images.
        zoe.metric_head.mlp_classifier.linear2.bias[1] += (margins[0] + margins[1]) / 2
    alone = torch.cat([predict_depth(zoe, pixels[i : i + 1]) for i in range(3)])
    together = predict_depth(zoe, pixels)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    # The vote over the batch, as the original takes it, would have given one of them another depth.
    with torch.no_grad():
        voted = zoe(_zoe_input(pixels, 96))
    assert len(set(voted.domain_logits.argmax(-1).tolist())) == 2
    assert (voted.predicted_depth - alone).abs().amax((1, 2)).max() > 1e-3


def test_constant_position_bias_follows_its_table(fresh: SpatialVLAForConditionalGeneration, batch: Inputs) -> None:
    pixels = batch["pixel_values"][:1]
    before = fresh.predict_depth(pixels)
    biases = [module for module in fresh.modules() if isinstance(module, ConstantPositionBias)]
    assert len(biases) == 4
    for bias in biases:
        kept = bias((6, 6))
        assert bias((6, 6)) is kept
        torch.testing.assert_close(kept, BeitRelativePositionBias.forward(bias, (6, 6)), rtol=0, atol=0)
    assert torch.equal(fresh.predict_depth(pixels), before)
    with torch.no_grad():
        biases[0].relative_position_bias_table.normal_(0, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(biases[0]((6, 6)), BeitRelativePositionBias.forward(biases[0], (6, 6)), rtol=0, atol=0)
    assert not torch.equal(fresh.predict_depth(pixels), before)


def test_zoedepth_stays_in_evaluation_mode_without_gradients(
    fresh: SpatialVLAForConditionalGeneration, batch: Inputs
) -> None:
    assert any(isinstance(module, BeitDropPath) for module in fresh.vision_zoe_model.modules())
    fresh.train()
    assert fresh.language_model.training
    assert not any(module.training for module in fresh.vision_zoe_model.modules())
    first, second = (fresh.predict_depth(batch["pixel_values"]) for _ in range(2))
    assert torch.equal(first, second)
    fresh.freeze()
    fresh(**batch).loss.backward()
    missing = [n for n, p in fresh.named_parameters() if p.requires_grad and p.grad is None]
    frozen = [n for n, p in fresh.named_parameters() if not p.requires_grad]
    assert not missing
    assert {name.split(".")[0] for name in frozen} == {"vision_zoe_model", "language_model"}
    assert [n for n in frozen if n.startswith("language_model")] == ["language_model.model.embed_tokens.weight"]
    fresh.freeze(llm_embed=False, vision_tower=True)
    assert fresh.get_input_embeddings().weight.requires_grad
    assert not any(p.requires_grad for p in fresh.vision_tower.parameters())


def test_hidden_layers_for_alignment(fresh: SpatialVLAForConditionalGeneration, batch: Inputs) -> None:
    layers = fresh.num_layers
    output = fresh(**batch, hidden_layers=(0, 1, layers, -2))
    assert set(output.image_hidden_states) == {0, 1, layers, -2}
    for state in output.image_hidden_states.values():
        assert state.shape == (3, 256, fresh.llm_dim)
    torch.testing.assert_close(output.image_hidden_states[layers], output.last_hidden_state[:, :256])
    torch.testing.assert_close(output.image_hidden_states[-2], output.image_hidden_states[layers - 1])
    features = fresh.image_features(batch["pixel_values"], batch["intrinsics"])
    torch.testing.assert_close(output.image_hidden_states[0], features)
    assert fresh(**batch).image_hidden_states == {}
    with pytest.raises(IndexError, match="hidden layer 99"):
        fresh(**batch, hidden_layers=(99,))


def gradients(model: SpatialVLAForConditionalGeneration, batch: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of action loss plus a stand-in for the alignment loss on layer 1."""
    model.zero_grad()
    output = model(**batch, hidden_layers=(1,))
    loss = output.loss + 0.5 * output.image_hidden_states[1].pow(2).mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_nothing(fresh: SpatialVLAForConditionalGeneration, batch: Inputs) -> None:
    fresh.train()
    fresh.freeze()
    loss, plain = gradients(fresh, batch)
    fresh.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    hook = fresh.language_model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    again, recomputed = gradients(fresh, batch)
    hook.remove()
    assert len(calls) == 2  # forward, and once more in the backward pass
    torch.testing.assert_close(again, loss)
    assert recomputed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_lora_goes_where_the_authors_meant_trains_and_merges(
    tiny_spatialvla: object,
    fresh: SpatialVLAForConditionalGeneration,
    batch: Inputs,
    tmp_path: object,
) -> None:
    vla = get_peft_model(fresh, LoraConfig(r=4, lora_alpha=4, target_modules=LORA_TARGETS["linear"]))
    adapted = {name.split(".lora_")[0] for name, _ in vla.named_parameters() if ".lora_" in name}
    inner = {name.removeprefix("base_model.model.") for name in adapted}
    assert not any("vision_zoe" in name for name in inner)
    # 7 per Gemma2 layer, 6 per SigLIP layer, the projector and two layers of the position encoding.
    assert len(inner) == 2 * 7 + 2 * 6 + 1 + 2
    vla.train()
    optimizer = torch.optim.AdamW([p for p in vla.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(6):
        loss = vla(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3, losses
    vla.eval()
    with torch.no_grad():
        trained = vla(**batch).loss
        merged = vla.merge_and_unload()
        merged.save_pretrained(tmp_path)
        loaded = SpatialVLAForConditionalGeneration.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(**batch).loss, trained, rtol=1e-4, atol=1e-4)


def test_autocast_over_fp32_weights(fresh: SpatialVLAForConditionalGeneration, batch: Inputs) -> None:
    fresh.train()
    fresh.freeze()
    with torch.autocast("cpu", torch.bfloat16):
        output = fresh(**batch, hidden_layers=(1,))
    assert output.loss.dtype == output.logits.dtype == torch.float32
    output.loss.backward()
    with torch.no_grad():
        exact = fresh(**batch).loss
    torch.testing.assert_close(output.loss, exact, rtol=0.02, atol=0.02)


def test_without_depth(fresh: SpatialVLAForConditionalGeneration, batch: Inputs) -> None:
    fresh.config.use_vision_zoe = False
    config = fresh.config
    small = SpatialVLAForConditionalGeneration.random(config, dtype=torch.float32)
    assert not any(name.startswith(("vision_zoe", "position_embedding_3d")) for name, _ in small.named_parameters())
    small.train()
    small.freeze()
    assert torch.isfinite(small(**batch).loss)
