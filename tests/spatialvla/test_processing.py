"""Processor files, prompts, images, labels, un-normalisation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prismo.data.dataset import open_dataset
from prismo.data.synthetic import write_synthetic_libero
from prismo.models.spatialvla import LIBERO_AGENTVIEW, ActionTokenizer, SpatialVLAProcessor
from prismo.models.spatialvla.action_tokenizer import VARIABLES
from tests.spatialvla.conftest import INSTRUCTIONS


def reject(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_files_are_read_with_infinity_and_written_without(
    processor: SpatialVLAProcessor, tiny_spatialvla: Path, tmp_path: Path
) -> None:
    assert "Infinity" in (tiny_spatialvla / "processor_config.json").read_text()
    assert np.isinf(processor.statistics["rh20t_rlds/1.0.0"].action.std[:3]).all()
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text(), parse_constant=reject)
    assert set(saved) == set(json.loads((tiny_spatialvla / "processor_config.json").read_text()))
    assert len(saved["statistics"]) == 28
    shutil.copy(tiny_spatialvla / "config.json", tmp_path)
    again = SpatialVLAProcessor.from_pretrained(tmp_path)
    assert again.cameras == processor.cameras
    assert again.companions == processor.companions
    assert again.prompt_ids(INSTRUCTIONS[2]) == processor.prompt_ids(INSTRUCTIONS[2])
    for key, stats in processor.statistics.items():
        np.testing.assert_array_equal(again.statistics[key].action.q99, stats.action.q99)
    for name in VARIABLES:
        np.testing.assert_array_equal(again.action_tokenizer.edges[name], processor.action_tokenizer.edges[name])


def test_damaged_files(tiny_spatialvla: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_spatialvla, tmp_path / "copy")
    (folder / "tokenizer.json").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:2523\nsize 36157680\n"
    )
    with pytest.raises(ValueError, match="Git LFS pointer"):
        SpatialVLAProcessor.from_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer file"):
        SpatialVLAProcessor.from_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        SpatialVLAProcessor.from_pretrained(folder)
    shutil.copy(tiny_spatialvla / "tokenizer.json", folder)
    stored = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**stored, "bin_policy": None}))
    with pytest.raises(ValueError, match="lacks bin_policy"):
        SpatialVLAProcessor.from_pretrained(folder)
    uneven = ActionTokenizer.uniform({**dict.fromkeys(VARIABLES, 4)}).bin_policy()
    (folder / "processor_config.json").write_text(json.dumps({**stored, "bin_policy": uneven}))
    with pytest.raises(ValueError, match="130 tokens, the model 8194"):
        SpatialVLAProcessor.from_pretrained(folder)


def test_prompt(processor: SpatialVLAProcessor) -> None:
    ids = processor.prompt_ids("Pick up the BLACK bowl")
    assert ids[:256] == [processor.config.image_token_index] * 256
    assert ids[256] == 2
    assert ids[-1] == 108
    assert processor.tokenizer.decode(ids[257:]) == "pick up the black bowl\n"
    assert ids == processor.prompt_ids("pick up the black bowl")
    assert processor.tokenizer.decode(processor.prompt_ids("Öl & 7 €")[257:]) == "öl & 7 €\n"  # byte fallback
    with pytest.raises(ValueError, match="image token"):
        processor.prompt_ids("look at <image>")
    with pytest.raises(ValueError, match="shorten it"):
        processor.query_text(["x " * 1500])


def test_training_text(processor: SpatialVLAProcessor) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 4, 7))
    text = processor.training_text(INSTRUCTIONS, actions)
    ids = processor.action_tokenizer.encode(actions).reshape(3, 12) + processor.config.action_token_begin_idx
    for i, instruction in enumerate(INSTRUCTIONS):
        prompt = processor.prompt_ids(instruction)
        end = len(prompt) + 13
        assert text.input_ids[i, :end].tolist() == [*prompt, *ids[i], 1]
        assert text.labels[i].tolist() == [-100] * len(prompt) + [*ids[i], 1] + [-100] * (text.labels.shape[1] - end)
        assert text.attention_mask[i].tolist() == [1] * end + [0] * (text.labels.shape[1] - end)
        assert text.token_type_ids[i, :end].tolist() == [0] * len(prompt) + [1] * 13
    decoded = processor.normalized_actions(ids)
    np.testing.assert_array_equal(
        decoded, processor.action_tokenizer.decode(processor.action_tokenizer.encode(actions))
    )


def test_chunks_at_the_end_of_an_episode_keep_real_actions_and_mask_the_rest(
    processor: SpatialVLAProcessor, tmp_path: Path
) -> None:
    write_synthetic_libero(tmp_path, episodes=1, steps=12, image_size=32)
    dataset = open_dataset(tmp_path, "libero_spatial_no_noops", chunk=4, use_tail=True)
    samples = [dataset[i] for i in range(len(dataset))]
    first = torch.stack([sample.actions[0] for sample in samples]).numpy()  # every action of the episode once
    for step, sample in enumerate(samples):
        present = min(4, len(samples) - step)
        assert sample.action_mask.tolist() == [True] * present + [False] * (4 - present)
        np.testing.assert_array_equal(sample.actions[:present].numpy(), first[step : step + present])
        pad = ~sample.action_mask.numpy()[None]
        text = processor.training_text(["pick"], sample.actions.numpy()[None], pad)
        supervised = text.labels[0][text.labels[0] != -100].tolist()
        offsets = processor.action_tokenizer.encode(first[step : step + present]).reshape(-1)
        assert supervised == [*(offsets + processor.config.action_token_begin_idx), 1]


def test_pixel_values(processor: SpatialVLAProcessor, frames: list[np.ndarray]) -> None:
    pixels = processor.pixel_values(frames)
    assert pixels.shape == (3, 3, 224, 224)
    expected = np.asarray(Image.fromarray(frames[0]).resize((224, 224), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0).numpy(), expected / np.float32(255), atol=1e-7)
    same = processor.pixel_values([Image.fromarray(frames[2]), Image.new("L", (224, 224), 255)])
    assert same[0].max() == 0
    assert same[1].min() == 1
    scaled = processor.scale(torch.tensor([[0, 128, 255]], dtype=torch.uint8))
    torch.testing.assert_close(scaled, torch.tensor([[0, 128 / 255, 1]]))


def test_unnorm_key_absent_or_unknown_lists_all_28(processor: SpatialVLAProcessor) -> None:
    ids = np.zeros((1, 12), int)
    for key in (None, "libero_spatial"):
        with pytest.raises(ValueError, match="unnorm_key") as error:
            processor.decode_actions(ids, key)
        assert all(known in str(error.value) for known in processor.statistics)
    with pytest.raises(ValueError, match=r"Did you mean 'droid/1\.0\.0'"):
        processor.decode_actions(ids, "droidd/1.0.0")


def test_actions_in_physical_units(processor: SpatialVLAProcessor) -> None:
    ids = np.array([[1443, 5772, 8193, 1443, 5772, 8192] * 2]) + processor.config.action_token_begin_idx
    actions = processor.decode_actions(torch.from_numpy(ids), "droid/1.0.0")
    assert actions.shape == (1, 4, 7)
    stats = processor.statistics["droid/1.0.0"].action
    normalized = processor.action_tokenizer.decode(np.array([1443, 5772, 8193]))
    expected = 0.5 * (normalized[:6] + 1) * (stats.q99 - stats.q01)[:6] + stats.q01[:6]
    np.testing.assert_allclose(actions[0, 0, :6], expected, rtol=1e-6)
    assert actions[0, :, 6].tolist() == [1, 0, 1, 0]


def test_cameras_and_datasets_of_a_fine_tuned_checkpoint(
    processor: SpatialVLAProcessor, tiny_spatialvla: Path, tmp_path: Path
) -> None:
    key = "libero_spatial_no_noops/1.0.0"
    assert processor.camera(key) == processor.camera() == processor.camera("bridge_orig/1.0.0")
    grid = ActionTokenizer.uniform()
    tuned = processor.for_dataset(key, processor.statistics["droid/1.0.0"], LIBERO_AGENTVIEW, grid)
    assert key not in processor.statistics
    tuned.save_pretrained(tmp_path)
    shutil.copy(tiny_spatialvla / "config.json", tmp_path)
    loaded = SpatialVLAProcessor.from_pretrained(tmp_path)
    assert loaded.camera(key) == LIBERO_AGENTVIEW
    assert loaded.intrinsics(loaded.camera(key), 2)[1, 0, 0] == pytest.approx(270.39, abs=0.01)
    np.testing.assert_allclose(loaded.action_tokenizer.edges["phi"], grid.edges["phi"])
    zeros = np.full((1, 12), processor.config.action_token_begin_idx)
    np.testing.assert_array_equal(loaded.decode_actions(zeros, "libero_spatial"), loaded.decode_actions(zeros, key))
