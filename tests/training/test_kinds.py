"""Every kind of policy trains, saves, resumes, merges and predicts."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from prismo.data.normalize import load_statistics
from prismo.data.synthetic import write_synthetic_libero
from prismo.embodiment import LIBERO
from prismo.models.component_files import read_component
from prismo.policies.base import PolicyInput
from prismo.policies.flags import PolicyFlags
from prismo.policies.loading import prepare_policy
from prismo.training.config import FinetuneAlignConfig, parse_config
from prismo.training.openvla import OPENVLA
from prismo.training.run import _open_datasets
from prismo.training.run_folder import RunFolder
from tests.training.conftest import DATASET, assert_same_state, metrics, train

L1 = {}
DIFFUSION = {"use_l1_regression": False, "use_diffusion": True, "num_diffusion_steps_train": 5}
DISCRETE = {"use_l1_regression": False}
ONE_IMAGE = {"num_images_in_input": 1, "use_proprio": False}
NO_ALIGN = {"align_loss_coeff": 0}
FILM = {"use_film": True}
KINDS = {
    "l1": L1,
    "l1-film-one-image-no-align": L1 | FILM | ONE_IMAGE | NO_ALIGN,
    "diffusion-align": DIFFUSION | {"diffusion_sample_freq": 1},  # shape error in the original (defect 7)
    "diffusion-film-one-image-no-align": DIFFUSION | FILM | ONE_IMAGE | NO_ALIGN,
    "discrete-align-checkpointing": DISCRETE | {"gradient_checkpointing": True},
    "discrete-film-proprio-no-align": DISCRETE | FILM | NO_ALIGN | {"film_exclude_padding": False},
}


def predict(folder: Path, images: int, proprio: bool) -> np.ndarray:
    """A chunk of the policy in a checkpoint folder, whose settings come from its files alone."""
    policy = prepare_policy(PolicyFlags(pretrained_checkpoint=str(folder)), LIBERO, DATASET).load()
    random = np.random.default_rng(0)
    frames = tuple(random.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(images))
    policy.start_episode(0, 0)
    return policy.predict([PolicyInput(frames, np.linspace(0, 0.5, 8) if proprio else None, "pick up the bowl")], [0])


@pytest.mark.parametrize("kind", KINDS)
def test_train_save_resume_merge_predict(flags, tmp_path, kind):
    changes = KINDS[kind] | {"batch_size": 1, "max_steps": 3, "save_freq": 2, "keep_states": 2}
    assert train(flags(tmp_path, **changes)) == 0
    merged = RunFolder(tmp_path / "run").step_folder(3)
    uninterrupted = merged.rename(tmp_path / "uninterrupted")
    assert train(flags(tmp_path, resume=True, merge_lora_during_training=True, **changes)) == 0  # from update 2 on
    assert_same_state(merged, uninterrupted)
    # A diffusion head gives actions only by denoising, which is logged every diffusion_sample_freq updates.
    sampled = kind != "diffusion-film-one-image-no-align"
    assert ("curr_action_l1_loss" in metrics(tmp_path / "run")[1]) == sampled
    images, proprio = changes.get("num_images_in_input", 2), changes.get("use_proprio", True)
    actions = predict(merged, images, proprio)
    assert actions.shape == (1, 8, 7)
    assert np.isfinite(actions).all()
    unmerged = tmp_path / "unmerged"
    shutil.copytree(merged, unmerged, ignore=shutil.ignore_patterns("model*", "config.json", "merge.json"))
    np.testing.assert_allclose(predict(unmerged, images, proprio), actions, atol=1e-4)


def test_merged_checkpoint_carries_its_own_statistics(flags, tmp_path, tiny_base):
    """In the original config.json keeps those of the base model's datasets (defect 13)."""
    assert train(flags(tmp_path, max_steps=1, merge_lora_during_training=True, align_loss_coeff=0)) == 0
    folder = RunFolder(tmp_path / "run").step_folder(1)
    assert set(load_statistics(tiny_base / "config.json")) == {"bridge_orig"}
    assert set(load_statistics(folder / "config.json")) == {DATASET}


def test_resume_of_a_published_checkpoint(flags, tmp_path, caplog):
    """`--resume True --resume_step N --vla_path <merged folder>` as the original documents it, saying what is new."""
    assert train(flags(tmp_path, max_steps=2, merge_lora_during_training=True, run_id_override="old")) == 0
    published = RunFolder(tmp_path / "old").step_folder(2)
    for ours in ("trainer_state", "lora_adapter"):
        shutil.rmtree(published / ours)
    (published / "training_config.json").unlink()
    head = read_component(published / "action_head--2_checkpoint.pt")
    arguments = flags(tmp_path, vla_path=published, resume=True, resume_step=2, max_steps=3)
    position = arguments.index("--run_id_override")
    del arguments[position : position + 2]
    with caplog.at_level(logging.WARNING):
        assert train([*arguments, "--learning_rate", "1e-9"]) == 0
    assert "has no trainer state: restored are the merged weights, action_head--2_checkpoint.pt" in caplog.text
    # The run goes on under the checkpoint's own name, and counts on.
    continued = RunFolder(tmp_path / "old").step_folder(3)
    again = read_component(continued / "action_head--3_checkpoint.pt")
    assert all(np.allclose(again[name].numpy(), value.numpy(), atol=1e-6) for name, value in head.items())
    adapter = json.loads((continued / "lora_adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(published.resolve())


def test_latest_checkpoint_is_not_merged_into_its_own_base(flags, tmp_path, caplog):
    """The original applies adapters twice here (defect 5)."""
    latest = {"save_latest_checkpoint_only": True, "merge_lora_during_training": True}
    assert train(flags(tmp_path, max_steps=1, **latest)) == 0
    shutil.rmtree(tmp_path / "run" / "trainer_state")
    with caplog.at_level(logging.ERROR):
        assert train(flags(tmp_path, vla_path=tmp_path / "run", resume=True, resume_step=1, **latest)) == 2
    assert "the base model of its own adapters" in caplog.text


def test_mixed_sizes_are_resized_to_what_the_model_sees(flags, tiny_base: Path, tmp_path: Path) -> None:
    """To a smaller size first, a model of 384 pixels would see 224 of them, stretched."""
    root = tmp_path / "data"
    write_synthetic_libero(root, DATASET, episodes=2, steps=12, image_size=32)
    write_synthetic_libero(root, "libero_goal_no_noops", episodes=2, steps=12, image_size=48)
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(f"datasets: {{{DATASET}: 1, libero_goal_no_noops: 1}}")
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((tiny_base / "config.json").read_text())
    for tower in config["vision_towers"]:
        tower["image_size"] = 56
    (base / "config.json").write_text(json.dumps(config))
    parsed = parse_config(FinetuneAlignConfig, flags(tmp_path / "runs", data_root_dir=root, dataset_name=mixture))
    (mixed,) = _open_datasets(parsed, OPENVLA, base)
    assert mixed.pixel_shape == (2, 56, 56, 3)
    (alone,) = _open_datasets(dataclasses.replace(parsed, dataset_name=DATASET), OPENVLA, base)
    assert alone.pixel_shape == (2, 32, 32, 3), "where all agree, they keep the stored size"
