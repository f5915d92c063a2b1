"""SpatialVLA's loss and its teacher-forced figures against plain computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prismo.align import AlignRecipe, SpatialForcing, VGGTConfig
from prismo.align.random_teacher import random_vggt
from prismo.models.spatialvla import SpatialVLAForConditionalGeneration, SpatialVLAProcessor
from prismo.models.spatialvla.ego3d import WIDOWX
from prismo.testing.tiny_spatialvla import make_tiny_spatialvla
from prismo.training.spatialvla_objective import SpatialVLAInputs, build_spatialvla_objective, spatialvla_inputs

MASK = np.array([[False] * 4, [False, False, True, True]])  # the second chunk reaches beyond its episode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_spatialvla(tmp_path_factory.mktemp("objective") / "base")


@pytest.fixture(scope="module")
def processor(folder) -> SpatialVLAProcessor:
    return SpatialVLAProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def batch(processor) -> SpatialVLAInputs:
    random = np.random.default_rng(0)
    actions = np.concatenate([random.uniform(-1, 1, (2, 4, 6)), random.integers(0, 2, (2, 4, 1))], axis=-1)
    text = processor.training_text(["pick up the bowl", "open the top drawer"], actions, MASK)
    images = torch.from_numpy(random.integers(0, 256, (2, 1, 3, 64, 64), dtype=np.uint8))
    actions = torch.from_numpy(actions.astype(np.float32))
    return spatialvla_inputs(images, text, actions, cameras=[WIDOWX] * 2, size=224, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def vla(folder) -> SpatialVLAForConditionalGeneration:
    return SpatialVLAForConditionalGeneration.from_pretrained(folder)


def test_teacher_forced_actions(vla, processor, batch):
    objective = build_spatialvla_objective(vla, processor.action_tokenizer).train()
    with torch.no_grad():
        losses = objective(batch)
        text = batch.text
        arguments = (text.attention_mask, text.token_type_ids, text.labels)
        plain = vla(text.input_ids, batch.images[:, 0], batch.intrinsics, *arguments)
    assert losses.total.item() == pytest.approx(plain.loss.item())
    # The best valid token of every slot, where there is a loss; the target's elsewhere.
    first, slots = vla.config.action_token_begin_idx, processor.action_tokenizer.slots
    offsets = processor.action_tokenizer.encode(batch.actions.numpy()).reshape(2, 12)
    supervised = np.repeat(~MASK, 3, axis=1)
    rows = iter(plain.logits)
    right = {name: [] for name in ("translation", "rotation", "gripper")}
    for sample in range(2):
        for position in np.flatnonzero(supervised[sample]):
            slot = slots[position % 3]
            best = next(rows)[first + slot.start : first + slot.stop].argmax().item() + slot.start
            right[list(right)[position % 3]].append(best == offsets[sample, position])
            offsets[sample, position] = best
        next(rows)  # <eos>
    expected = processor.action_tokenizer.decode(offsets.reshape(2, 4, 3))
    np.testing.assert_allclose(losses.actions.numpy(), expected, atol=1e-6)
    for name, values in right.items():
        assert losses.metrics[f"{name}_accuracy"].item() == pytest.approx(np.mean(values))
    error = np.abs(expected - batch.actions.numpy())
    assert losses.metrics["curr_action_l1_loss"].item() == pytest.approx(error[:, 0].mean(), rel=1e-5)
    following = error[:, 1:][~MASK[:, 1:]]
    assert losses.metrics["next_actions_l1_loss"].item() == pytest.approx(following.mean(), rel=1e-5)
    assert objective.eval()(batch).actions is None  # then the policy has to decode


def test_alignment_meets_the_patches_without_a_shift(vla, processor, batch):
    teacher = random_vggt(config=VGGTConfig(width=64, depth=2, patch_depth=2, mlp_width=256, image_size=56))
    recipe = AlignRecipe(vla_layers_align=1, gain_feat_1move=False)
    torch.manual_seed(0)
    alignment = SpatialForcing(teacher, vla.llm_dim, recipe)
    objective = build_spatialvla_objective(vla, processor.action_tokenizer, {"alignment": alignment}).eval()
    losses = objective(batch, with_map=True)
    text = batch.text
    with torch.no_grad():
        embeds = vla.embed(text.input_ids, vla.image_features(batch.images[:, 0], batch.intrinsics))
        out = vla(text.input_ids, batch.images[:, 0], batch.intrinsics, text.attention_mask, text.token_type_ids,
                  hidden_layers=(0, 1))  # fmt: skip
        torch.testing.assert_close(out.image_hidden_states[0], embeds[:, :256])
        loss, _ = alignment(batch.images, out.image_hidden_states[1])
    assert (losses.total - losses.metrics["loss"]).item() == pytest.approx(loss.item(), rel=1e-5)
    assert losses.align_map.shape == (2, 1, 16, 16)
    losses.total.backward()
    assert alignment.projector.fc1.weight.grad.abs().sum() > 0
    vla.zero_grad()
