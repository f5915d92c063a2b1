"""FiLM: published names, neutral start on request, and trained backbones with their LoRA merged on loading."""

import pytest
import torch

from prismo.models.component_files import read_component, save_component
from prismo.models.film import add_film, load_film_backbone
from prismo.models.lora import LoraSpec, add_lora, freeze_never_used, save_adapter
from prismo.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction
from tests.golden import sizes
from tests.models.adapted import action_states, randomize_lora

SPEC = LoraSpec(rank=4, alpha=2)


def test_wrapped_backbone_has_the_published_names_and_shapes():
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(OpenVLAConfig(**sizes("config.json")))
        add_film(model)
    ours = {name: list(value.shape) for name, value in model.vision_backbone.state_dict().items()}
    assert ours == sizes("film_shapes.json")


def test_full_size_film_adds_the_published_number_of_parameters():
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(OpenVLAConfig())
        before = sum(p.numel() for p in model.parameters())
        add_film(model)
    assert sum(p.numel() for p in model.parameters()) - before == 456_241_920


def test_identity_init_changes_nothing_and_the_default_does(tiny_model, tiny_base, batch):
    before = action_states(tiny_model, batch)
    add_film(tiny_model, identity_init=True)
    torch.testing.assert_close(action_states(tiny_model, batch), before)
    other = OpenVLAForActionPrediction.from_pretrained(tiny_base, dtype=torch.float32, self_test=False)
    add_film(other)
    assert (action_states(other, batch) - before).abs().max() > 0.01
    with pytest.raises(ValueError, match="already has FiLM"):
        add_film(other)


def test_every_block_computed_is_modulated_by_the_sample_of_its_own(tiny_model, batch):
    film = add_film(tiny_model)
    pixels = batch.pixel_values[:1].repeat(2, 2, 1, 1)  # the same two views twice
    condition = torch.randn(2, tiny_model.llm_dim, generator=torch.Generator().manual_seed(0))
    both = film(pixels, condition)
    torch.testing.assert_close(both[:1], film(pixels[:1], condition[:1]))
    torch.testing.assert_close(both[1:], film(pixels[1:], condition[1:]))
    assert (both[0] - both[1]).abs().max() > 0.01
    both.sum().backward()
    for tower in film.towers:
        used = [block.scale.weight.grad is not None for block in tower.blocks]
        assert used == [True] * (len(used) - 1) + [False]


def test_language_mean_with_and_without_padding(tiny_model):
    embeddings = torch.arange(5.0)[None, :, None].repeat(1, 1, 3)
    action, real = torch.tensor([[0, 0, 1, 0, 0]]).bool(), torch.tensor([[1, 1, 1, 1, 0]]).bool()
    film = add_film(tiny_model)
    assert film.language_mean(embeddings, action, real)[0, 0].item() == pytest.approx((0 + 1 + 3 + 4) / 4)
    film.exclude_padding = True
    assert film.language_mean(embeddings, action, real)[0, 0].item() == pytest.approx((0 + 1 + 3) / 3)


@pytest.mark.parametrize("film_first", [True, False])
def test_film_layers_train_whatever_the_order(tiny_model, film_first):
    for step in (add_film, lambda m: add_lora(m, SPEC))[:: 1 if film_first else -1]:
        step(tiny_model)
    trainable = {name for name, p in tiny_model.named_parameters() if p.requires_grad}
    assert "vision_backbone.vision_backbone.featurizer.blocks.0.scale.weight" in trainable
    assert "vision_backbone.vision_backbone.featurizer.blocks.0.block.attn.qkv.lora_A.default.weight" in trainable
    assert "vision_backbone.vision_backbone.featurizer.blocks.0.block.attn.qkv.base_layer.weight" not in trainable
    freeze_never_used(tiny_model, lm_head_used=False)
    assert not tiny_model.vision_backbone.towers[0].blocks[-1].scale.weight.requires_grad


@pytest.mark.parametrize("with_adapter", [True, False])
def test_a_trained_backbone_loads_with_its_lora_merged(tiny_model, tiny_base, batch, tmp_path, with_adapter):
    spec = SPEC if with_adapter else LoraSpec(rank=4)  # without an adapter folder the recipe's alpha holds
    add_film(tiny_model)
    add_lora(tiny_model, spec)
    randomize_lora(tiny_model)
    trained = tiny_model.vision_backbone
    save_component(trained, tmp_path, "vision_backbone", "latest")
    if with_adapter:
        save_adapter(tiny_model, tmp_path, spec, base="base")
    loaded = OpenVLAForActionPrediction.from_pretrained(tiny_base, dtype=torch.float32, self_test=False)
    load_film_backbone(loaded, tmp_path)
    assert not any("lora" in name for name, _ in loaded.vision_backbone.named_parameters())
    condition = torch.randn(2, tiny_model.llm_dim, generator=torch.Generator().manual_seed(0))
    ours, expected = (backbone(batch.pixel_values, condition) for backbone in (loaded.vision_backbone, trained))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_half_of_the_lora_layers_of_a_backbone(tiny_model, tmp_path):
    add_film(tiny_model)
    add_lora(tiny_model, SPEC)
    path = save_component(tiny_model.vision_backbone, tmp_path, "vision_backbone", "latest")
    state = read_component(path)
    del state[next(name for name in state if name.endswith("attn.qkv.lora_B.default.weight"))]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"LoRA factors of .*attn\.qkv do not fit"):
        load_film_backbone(tiny_model, tmp_path)


def test_a_backbone_of_another_size_is_refused(tiny_model, tmp_path):
    save_component(torch.nn.Linear(2, 2), tmp_path, "vision_backbone", "latest")
    with pytest.raises(ValueError, match="does not fit FiLMVisionBackbone"):
        load_film_backbone(tiny_model, tmp_path)
