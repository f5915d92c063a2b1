"""LoRA: the recipe's layers and counts, published files in both directions, and what never learns."""

import json
import logging

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from prismo.models.lora import (
    LoraSpec,
    add_lora,
    freeze_never_used,
    load_adapter,
    lora_parameters,
    merged_weight,
    never_used_modules,
    read_adapter_spec,
    save_adapter,
)
from prismo.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction
from tests.golden import sizes
from tests.models.adapted import action_states, randomize_lora

SPEC = LoraSpec(rank=4)


def meta_model(config: OpenVLAConfig) -> OpenVLAForActionPrediction:
    with torch.device("meta"):
        return OpenVLAForActionPrediction(config)


@pytest.fixture
def adapted(tiny_model):
    add_lora(tiny_model, SPEC)
    randomize_lora(tiny_model)
    return tiny_model


@pytest.fixture
def checkpoint(adapted, tmp_path):
    save_adapter(adapted, tmp_path, SPEC, base="openvla/openvla-7b")
    return tmp_path


def fresh(tiny_base) -> OpenVLAForActionPrediction:
    return OpenVLAForActionPrediction.from_pretrained(tiny_base, dtype=torch.float32, self_test=False)


def rewrite(checkpoint, change) -> None:
    """Apply `change` to the adapter's tensors on disk."""
    path = checkpoint / "lora_adapter" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_full_size_model_gets_the_modules_and_parameters_of_the_recipe():
    model = meta_model(OpenVLAConfig())
    assert sum(p.numel() for p in model.parameters()) == 7_541_237_184
    add_lora(model, LoraSpec(rank=32))
    lora = lora_parameters(model)
    assert len(lora) == 2 * 439
    assert sum(p.numel() for p in lora.values()) == 110_828_288
    assert sum(p.numel() for p in model.parameters()) == 7_652_065_472
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 439
    convolution = lora["vision_backbone.featurizer.patch_embed.proj.lora_A.weight"]
    assert convolution.shape == (32, 3, 14, 14)
    assert LoraSpec(rank=32).scale == 0.5
    assert LoraSpec(rank=8).scale == 1.0


def test_adapter_names_and_shapes_are_those_of_the_published_files():
    golden = sizes("lora_shapes.json")
    model = meta_model(OpenVLAConfig(**sizes("config.json")))
    add_lora(model, LoraSpec(rank=sizes("adapter_config.json")["r"]))
    ours = {f"base_model.model.{name}": list(p.shape) for name, p in lora_parameters(model).items()}
    copy = "base_model.model.language_model.lm_head.base_layer.weight"
    assert ours == {name: shape for name, shape in golden.items() if name != copy}


@pytest.mark.parametrize("lm_head_used", [False, True])
def test_exactly_the_never_used_modules_get_no_gradient(adapted, batch, lm_head_used):
    states = action_states(adapted, batch)
    loss = adapted.logits(states).square().mean() if lm_head_used else states.square().mean()
    loss.backward()
    without = {name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None}
    frozen = freeze_never_used(adapted, lm_head_used=lm_head_used)
    assert without == {name for name, _ in adapted.named_parameters() if ".lora_" in name and _within(name, frozen)}
    assert any("blocks.2" in name for name in without)
    assert any("attn_pool" in name for name in without)
    assert any("lm_head" in name for name in without) is not lm_head_used
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trainable)


def _within(name: str, modules: list[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def test_lora_weights_are_fp32_on_a_bf16_base_and_the_base_is_frozen(tiny_base):
    model = OpenVLAForActionPrediction.from_pretrained(tiny_base, self_test=False)
    add_lora(model, SPEC)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    with pytest.raises(ValueError, match="already has LoRA"):
        add_lora(model, SPEC)


def test_a_new_adapter_changes_nothing(tiny_model, batch):
    before = action_states(tiny_model, batch)
    add_lora(tiny_model, SPEC)
    torch.testing.assert_close(action_states(tiny_model, batch), before)


def test_saved_adapter_has_the_published_layout(checkpoint, adapted):
    folder = checkpoint / "lora_adapter"
    assert {p.name for p in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    tensors = load_file(folder / "adapter_model.safetensors")
    assert set(tensors) == {f"base_model.model.{name}" for name in lora_parameters(adapted)}
    assert "base_model.model.language_model.lm_head.base_layer.weight" not in tensors
    config = json.loads((folder / "adapter_config.json").read_text())
    # peft 0.11 fails on keys that it does not know.
    assert set(config) == set(sizes("adapter_config.json"))
    assert sorted(config["target_modules"]) == sorted(sizes("adapter_config.json")["target_modules"])
    assert (config["r"], config["lora_alpha"]) == (4, 4)


def test_stock_peft_reads_our_adapter(checkpoint, adapted, tiny_base, batch):
    stock = PeftModel.from_pretrained(fresh(tiny_base), checkpoint / "lora_adapter")
    torch.testing.assert_close(action_states(stock.base_model.model, batch), action_states(adapted, batch))


def test_load_gives_the_same_predictions_and_settings(checkpoint, adapted, tiny_base, batch):
    model = fresh(tiny_base)
    assert load_adapter(model, checkpoint) == LoraSpec(4, 4, 0.0, tuple(sorted(SPEC.target_modules)))
    torch.testing.assert_close(action_states(model, batch), action_states(adapted, batch))


def test_bf16_adapters_with_a_copy_of_lm_head_load(checkpoint, adapted, tiny_base, batch, caplog):
    copy = "base_model.model.language_model.lm_head.base_layer.weight"

    def as_the_original(tensors):
        own = adapted.language_model.lm_head.base_layer.weight
        return {name: value.bfloat16() for name, value in tensors.items()} | {copy: own.bfloat16()}

    rewrite(checkpoint, as_the_original)
    model = fresh(tiny_base)
    with caplog.at_level(logging.WARNING):
        load_adapter(model, checkpoint)
    assert not caplog.records
    assert {p.dtype for p in lora_parameters(model).values()} == {torch.float32}
    torch.testing.assert_close(action_states(model, batch), action_states(adapted, batch), atol=0.05, rtol=0.05)

    rewrite(checkpoint, lambda tensors: tensors | {copy: tensors[copy] + 1})
    with caplog.at_level(logging.WARNING):
        load_adapter(fresh(tiny_base), checkpoint)
    assert "another base model" in caplog.text


def test_adapters_without_the_never_used_modules_load(checkpoint, adapted, tiny_base, batch):
    unused = never_used_modules(adapted, lm_head_used=False)

    def drop(tensors):
        return {n: v for n, v in tensors.items() if not _within(n.removeprefix("base_model.model."), unused)}

    before = len(load_file(checkpoint / "lora_adapter" / "adapter_model.safetensors"))
    rewrite(checkpoint, drop)
    assert len(load_file(checkpoint / "lora_adapter" / "adapter_model.safetensors")) < before
    model = fresh(tiny_base)
    load_adapter(model, checkpoint)
    torch.testing.assert_close(action_states(model, batch), action_states(adapted, batch))


def test_adapters_that_do_not_fit_are_refused(checkpoint, tiny_base):
    name = "base_model.model.language_model.model.layers.1.self_attn.q_proj.lora_A.weight"
    original = load_file(checkpoint / "lora_adapter" / "adapter_model.safetensors")
    rewrite(checkpoint, lambda t: t | {name: torch.zeros(4, 33)})
    with pytest.raises(
        ValueError, match=r"layers.1.self_attn.q_proj.lora_A.weight has .*\[4, 33\], expected \[4, 32\]"
    ):
        load_adapter(fresh(tiny_base), checkpoint)
    rewrite(checkpoint, lambda _: {n: v for n, v in original.items() if n != name})
    with pytest.raises(ValueError, match=r"incomplete: language_model.model.layers.1.self_attn.q_proj.lora_A"):
        load_adapter(fresh(tiny_base), checkpoint)
    rewrite(checkpoint, lambda _: original | {name.replace("layers.1", "layers.9"): torch.zeros(4, 32)})
    with pytest.raises(ValueError, match=r"adapts language_model.model.layers.9"):
        load_adapter(fresh(tiny_base), checkpoint)
    rewrite(checkpoint, lambda _: original | {name: torch.full((4, 32), torch.nan)})
    with pytest.raises(ValueError, match=r"lora_adapter: .*layers.1.self_attn.q_proj.lora_A.weight holds NaN"):
        load_adapter(fresh(tiny_base), checkpoint)


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_dora", True), ("use_rslora", True), ("rank_pattern", {"q_proj": 8}), ("init_lora_weights", "pissa")],
)
def test_other_kinds_of_lora_are_refused(checkpoint, key, value):
    path = checkpoint / "lora_adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=f"{key} is .*only plain LoRA"):
        read_adapter_spec(checkpoint / "lora_adapter")


def test_missing_and_broken_files(checkpoint, tiny_model):
    folder = checkpoint / "lora_adapter"
    with pytest.raises(FileNotFoundError, match="checkpoint folder that holds lora_adapter"):
        load_adapter(tiny_model, folder)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        load_adapter(tiny_model, checkpoint)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled adapters"):
        load_adapter(tiny_model, checkpoint)


def test_half_an_adapter_is_refused_even_where_it_is_not_used(checkpoint, tiny_base):
    """Modules that never learn may be absent, which hid that one factor was."""
    rewrite(checkpoint, lambda t: {n: v for n, v in t.items() if "attn_pool.q.lora_A" not in n})
    with pytest.raises(ValueError, match=r"holds .*attn_pool\.q\.lora_B\.weight without .*lora_A"):
        load_adapter(fresh(tiny_base), checkpoint)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("r", "4", "r should be a valid integer"),
        ("r", 0, "r should be greater than or equal to 1"),
        ("r", 8, "has rank 4, adapter_config.json says 8"),
        ("lora_alpha", "NaN", "lora_alpha"),
        ("lora_alpha", -2, "lora_alpha"),
        ("target_modules", 5, "target_modules"),
        ("target_modules", [], "target_modules"),
        ("lora_dropout", 1.5, "lora_dropout should be less than 1"),
        ("modules_to_save", "lm_head", "modules_to_save should be a valid"),
    ],
)
def test_impossible_adapter_settings(checkpoint, tiny_base, key, value, says):
    path = checkpoint / "lora_adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=says):
        load_adapter(fresh(tiny_base), checkpoint)


@pytest.mark.parametrize("bad", [{"rank": 0}, {"dropout": 1.0}])
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match="lora_"):
        LoraSpec(**bad)


def test_merged_weight_is_the_rounded_exact_sum_for_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(700, 513, generator=generator).bfloat16()
    a, b = torch.randn(32, 513, generator=generator) * 0.1, torch.randn(700, 32, generator=generator) * 0.1
    exact = weight.double() + 0.5 * (b.double().unsqueeze(2) * a.double()).sum(dim=1)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(merged_weight(weight, a, b, 0.5))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], exact.bfloat16())
    assert torch.equal(results[0], results[1])
