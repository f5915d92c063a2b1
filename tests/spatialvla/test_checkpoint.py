"""Official files: names and sizes, strict loading, saving, configuration."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prismo.merging.merge import merge
from prismo.models.lora import LoraSpec, add_lora, save_adapter
from prismo.models.spatialvla import (
    LORA_TARGETS,
    SpatialVLAConfig,
    SpatialVLAForConditionalGeneration,
    SpatialVLAProcessor,
)
from prismo.models.spatialvla.checkpoint import model_folder, official_name
from prismo.models.spatialvla.modeling import read_config
from prismo.testing.tiny_spatialvla import tiny_config
from prismo.util.schema import JsonObject, read_json

PARAMETERS_4B = 4_027_854_731


def official_shapes(model: SpatialVLAForConditionalGeneration) -> dict[str, list[int]]:
    return {official_name(name): list(parameter.shape) for name, parameter in model.named_parameters()}


def test_published_index_matches_name_by_name(published: Path) -> None:
    index = read_json(published / "model.safetensors.index.json", JsonObject)
    model = SpatialVLAForConditionalGeneration.empty(read_config(published))
    shapes = official_shapes(model)
    assert len(shapes) == 1382
    assert shapes.keys() == index["weight_map"].keys()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS_4B
    assert index["metadata"]["total_size"] == 2 * PARAMETERS_4B
    assert all(p.is_meta for p in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())  # no file stores them
    # The built-in sizes are those of the published file.
    assert official_shapes(SpatialVLAForConditionalGeneration.empty(SpatialVLAConfig())) == shapes


def test_published_shapes_known_from_the_paper_and_files() -> None:
    shapes = official_shapes(SpatialVLAForConditionalGeneration.empty(SpatialVLAConfig()))
    layer = "vision_zoe_model.backbone.encoder.layer.23.attention"
    expected = {
        "language_model.lm_head.weight": [265347, 2304],
        "language_model.model.layers.25.self_attn.k_proj.weight": [1024, 2304],
        "multi_modal_projector.linear.weight": [2304, 1152],
        "position_embedding_3d.position_embedding_head.0.weight": [1152, 204],
        "position_embedding_3d.position_embedding_head.3.bias": [1152],
        "spatial_embed_tokens.weight": [8194, 2304],
        "vision_tower.vision_model.encoder.layers.26.mlp.fc1.weight": [4304, 1152],
        "vision_zoe_model.backbone.embeddings.cls_token": [1, 1, 1024],
        f"{layer}.attention.relative_position_bias.relative_position_bias_table": [2212, 16],
        f"{layer}.attention.query.bias": [1024],
        f"{layer}.output.dense.weight": [1024, 1024],
        "vision_zoe_model.backbone.encoder.layer.0.output.dense.weight": [1024, 4096],
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert f"{layer}.attention.key.bias" not in shapes


def test_published_config_round_trip(published: Path, tmp_path: Path) -> None:
    config = read_config(published)
    assert (config.geometry, config.prefix_mask) == ("parity", "bidirectional")
    (tmp_path / "config.json").write_text(json.dumps(config.to_diff_dict()))
    again = read_config(tmp_path)
    assert again.to_diff_dict() == config.to_diff_dict()
    stored, original = read_json(tmp_path / "config.json", JsonObject), read_json(published / "config.json", JsonObject)
    for key, value in original.items():
        if isinstance(value, dict) and key != "auto_map":
            for name, inner in value.items():
                if not name.startswith("_") and inner is not None and name in stored[key]:
                    assert _plain(stored[key][name], inner), (key, name)
        elif key != "transformers_version":
            assert stored[key] == value, key


def _plain(ours: object, theirs: object) -> bool:
    """Equal where both say something (nested dictionaries may lack keys that transformers dropped)."""
    if isinstance(theirs, dict):
        return all(_plain(ours[key], value) for key, value in theirs.items() if key in ours and value is not None)
    return ours == theirs


def test_config_switches_and_contradictions() -> None:
    assert tiny_config().num_image_tokens == 256
    with pytest.raises(ValueError, match="parity"):
        SpatialVLAConfig(geometry="parrity")
    with pytest.raises(ValueError, match="prefix_mask"):
        SpatialVLAConfig(prefix_mask="full")
    with pytest.raises(ValueError, match="must end the vocabulary"):
        SpatialVLAConfig(spatial_token_num=259)
    with pytest.raises(ValueError, match="ego3d_patch_reso 4"):
        SpatialVLAConfig(ego3d_patch_reso=4)
    with pytest.raises(ValueError, match="use_spatial_token"):
        SpatialVLAConfig(use_spatial_token=False)


def test_round_trip_is_bit_exact_and_leaves_the_source_alone(tiny_spatialvla: Path, tmp_path: Path) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in tiny_spatialvla.iterdir()}
    model = SpatialVLAForConditionalGeneration.from_pretrained(tiny_spatialvla)
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in tiny_spatialvla.iterdir()} == before
    model.save_pretrained(tmp_path)
    source, saved = load_file(tiny_spatialvla / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert saved.keys() == source.keys() == official_shapes(model).keys()
    assert all(torch.equal(saved[name], source[name]) for name in source)
    assert read_json(tmp_path / "config.json", JsonObject) == read_json(tiny_spatialvla / "config.json", JsonObject)
    rows = saved["language_model.model.embed_tokens.weight"][model.config.action_token_begin_idx :]
    assert torch.equal(rows, saved["spatial_embed_tokens.weight"])


def test_switches_at_loading(tiny_spatialvla: Path) -> None:
    loaded = SpatialVLAForConditionalGeneration.from_pretrained(tiny_spatialvla, geometry="exact", prefix_mask="causal")
    assert (loaded.config.geometry, loaded.config.prefix_mask) == ("exact", "causal")
    with pytest.raises(ValueError, match="geometry"):
        SpatialVLAForConditionalGeneration.from_pretrained(tiny_spatialvla, geometry="precise")


def test_shards_and_a_given_state_dict(
    model: SpatialVLAForConditionalGeneration, tiny_spatialvla: Path, tmp_path: Path
) -> None:
    half = {name: value.bfloat16() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=half, max_shard_size="2MB")
    index = read_json(tmp_path / "model.safetensors.index.json", JsonObject)
    assert len(set(index["weight_map"].values())) > 2
    loaded = SpatialVLAForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(value, half[name]) for name, value in loaded.state_dict().items())
    shutil.copy(tiny_spatialvla / "config.json", tmp_path)  # says float32
    assert SpatialVLAForConditionalGeneration.from_pretrained(tmp_path).dtype == torch.float32
    Path(tmp_path / index["weight_map"]["spatial_embed_tokens.weight"]).unlink()
    with pytest.raises(FileNotFoundError, match="download the checkpoint again"):
        SpatialVLAForConditionalGeneration.from_pretrained(tmp_path)


def test_one_error_names_all_tensors_that_do_not_fit(tiny_spatialvla: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_spatialvla / "config.json", tmp_path)
    tensors = load_file(tiny_spatialvla / "model.safetensors")
    del tensors["language_model.model.norm.weight"]
    tensors["vision_tower.head.probe"] = torch.zeros(1)
    tensors["multi_modal_projector.linear.bias"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit its config") as error:
        SpatialVLAForConditionalGeneration.from_pretrained(tmp_path)
    for part in (
        "1 missing: language_model.model.norm.weight",
        "1 unknown: vision_tower.head.probe",
        "1 of another shape: multi_modal_projector.linear.bias [3] instead of [64]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("kind", LORA_TARGETS)
def test_every_lora_target_can_be_merged(
    kind: str, tiny_spatialvla: Path, fresh: SpatialVLAForConditionalGeneration, tmp_path: Path
) -> None:
    spec = LoraSpec(4, 4, target_modules=LORA_TARGETS[kind])
    add_lora(fresh, spec)
    save_adapter(fresh, tmp_path / "run", spec, base=str(tiny_spatialvla))
    SpatialVLAProcessor.from_pretrained(tiny_spatialvla).save_pretrained(tmp_path / "run")
    merged = merge(tiny_spatialvla, tmp_path / "run", tmp_path / "merged", progress=False).folder
    SpatialVLAForConditionalGeneration.from_pretrained(merged)


def test_a_trained_table_that_is_not_there(
    tiny_spatialvla: Path, fresh: SpatialVLAForConditionalGeneration, tmp_path: Path
) -> None:
    """The base's action embeddings were merged in its place."""
    spec = LoraSpec(4, 4, target_modules=LORA_TARGETS["linear"], modules_to_save=("spatial_embed_tokens",))
    add_lora(fresh, spec)
    save_adapter(fresh, tmp_path, spec, base=str(tiny_spatialvla))
    SpatialVLAProcessor.from_pretrained(tiny_spatialvla).save_pretrained(tmp_path)
    path = tmp_path / "lora_adapter" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "spatial_embed" not in name}, path)
    with pytest.raises(ValueError, match=r"spatial_embed_tokens\.weight has shape None, expected \[8194, 64\]"):
        merge(tiny_spatialvla, tmp_path, tmp_path / "merged", progress=False)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("config.json", {"text_config": 3}, "text_config should be an object"),
        (
            "config.json",
            {"vision_config": {"hidden_size": "32"}},
            "vision_config.hidden_size should be a valid",
        ),
        ("config.json", {"spatial_token_num": -1}, "spatial_token_num should be greater than or equal to 1"),
        ("config.json", {"vision_zoe_config": {"backbone_config": 5}}, "describes no SpatialVLA"),
        ("config.json", {"torch_dtype": "bfloat17"}, "describes no SpatialVLA"),
        ("processor_config.json", {"action_chunk_size": 0}, "action_chunk_size should be greater than or equal to 1"),
        ("processor_config.json", {"action_chunk_size": "4"}, "action_chunk_size should be a valid integer"),
        ("processor_config.json", {"bin_policy": {"translation": [1, 2]}}, "bin_policy.translation should be"),
        ("processor_config.json", {"intrinsic_config": {"default": {"intrinsic": [[1, 0], [0, 1]]}}}, "intrinsic"),
        ("processor_config.json", {"statistics": [1]}, "statistics should be an object"),
        ("tokenizer_config.json", None, "tokenizer_config.json: not valid JSON"),
        ("tokenizer.json", None, "is no tokenizer file"),
    ],
)
def test_damaged_settings(tiny_spatialvla: Path, tmp_path: Path, file: str, change: dict | None, says: str) -> None:
    """One sentence each, before any weights are read."""
    folder = Path(shutil.copytree(tiny_spatialvla, tmp_path / "copy"))
    text = (folder / file).read_text()
    (folder / file).write_text(text[: len(text) // 2] if change is None else json.dumps(json.loads(text) | change))
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        SpatialVLAProcessor.from_pretrained(folder)
    assert str(folder / file) in str(error.value)


def test_what_is_no_checkpoint(tiny_spatialvla: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a checkpoint folder nor a hub id"):
        model_folder(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        SpatialVLAForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "openvla"}')
    with pytest.raises(ValueError, match="'openvla', expected 'spatialvla'"):
        SpatialVLAForConditionalGeneration.from_pretrained(tmp_path)
    shutil.copy(tiny_spatialvla / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        SpatialVLAForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tiny_spatialvla / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="truncated or broken"):
        SpatialVLAForConditionalGeneration.from_pretrained(tmp_path)


def test_bf16_weights_keep_fp32_rope(tiny_spatialvla: Path, fresh: SpatialVLAForConditionalGeneration) -> None:
    rotary = fresh.language_model.model.rotary_emb
    exact = rotary.inv_freq.clone()
    loaded = SpatialVLAForConditionalGeneration.from_pretrained(tiny_spatialvla, dtype=torch.bfloat16)
    assert torch.equal(loaded.language_model.model.rotary_emb.inv_freq, exact)
    fresh.bfloat16()
    assert fresh.dtype == torch.bfloat16
    assert torch.equal(rotary.inv_freq, exact)  # a plain cast would have rounded them


def test_random_models_are_reproducible_and_frozen_where_they_must_be() -> None:
    first = SpatialVLAForConditionalGeneration.random(tiny_config(), dtype=torch.float32, seed=3)
    second = SpatialVLAForConditionalGeneration.random(tiny_config(), dtype=torch.float32, seed=3)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.requires_grad != name.startswith("vision_zoe_model."), name


def test_official_names_are_in_the_file(tiny_spatialvla: Path) -> None:
    with safe_open(tiny_spatialvla / "model.safetensors", framework="pt") as stored:
        names = set(stored.keys())
    assert "vision_zoe_model.backbone.encoder.layer.0.attention.attention.query.weight" in names
    assert not any(".beit." in name for name in names)
