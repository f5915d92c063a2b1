"""SpatialVLA as a policy: statistics, ensemble and camera."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from prismo.data.images import observation_image
from prismo.embodiment import LIBERO
from prismo.models.folder import TRAINING_CONFIG
from prismo.models.spatialvla import LIBERO_AGENTVIEW
from prismo.policies.base import PolicyInput
from prismo.policies.checkpoint import checkpoint_hash, open_checkpoint
from prismo.policies.flags import PolicyFlags
from prismo.policies.loading import PolicySpec, prepare_policy
from prismo.testing.tiny_spatialvla import make_tiny_spatialvla
from tests.policies.conftest import observe

SUITE = "libero_spatial"
ZERO_SHOT = "droid/1.0.0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_spatialvla(tmp_path_factory.mktemp("svla") / "spatialvla-4b-224-pt")


def prepared(folder: Path, **flags: object) -> PolicySpec:
    return prepare_policy(PolicyFlags(pretrained_checkpoint=str(folder), **flags), LIBERO, SUITE)


@pytest.fixture(scope="module")
def inputs() -> list[PolicyInput]:
    prompts = ("pick up the black bowl", "open the drawer", "turn on the stove and put the bowl on it")
    return [observe(seed, prompt, images=1) for seed, prompt in enumerate(prompts)]


def test_zero_shot_must_be_asked_for(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It ran on another dataset's statistics with a warning."""
    with pytest.raises(
        ValueError, match=rf"was trained on .* and 24 more, asked for {SUITE}.*--unnorm_key droid/1\.0\.0"
    ):
        prepared(folder, model_family="svla")
    with caplog.at_level(logging.WARNING):
        spec = prepared(folder, model_family="svla", unnorm_key=ZERO_SHOT)
    assert spec.settings.unnorm_key == "droid/1.0.0"
    assert "about 0 %" in caplog.text
    assert (spec.settings.chunk, spec.settings.num_images, spec.settings.center_crop) == (1, 1, True)


def test_a_fine_tuned_checkpoint_uses_its_suite(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "fine-tuned")
    config = json.loads((copy / "processor_config.json").read_text())
    config["statistics"]["libero_spatial_no_noops/1.0.0"] = config["statistics"]["droid/1.0.0"]
    (copy / "processor_config.json").write_text(json.dumps(config))
    assert prepared(copy).settings.unnorm_key == "libero_spatial_no_noops/1.0.0"
    assert checkpoint_hash(prepared(copy).checkpoint) != checkpoint_hash(open_checkpoint(folder))
    with pytest.raises(ValueError, match=r"Available: .*droid/1\.0\.0"):
        prepared(copy, unnorm_key="libero_goal")


def test_flags_that_contradict_the_training(folder: Path, tmp_path: Path) -> None:
    """Camera and crop could disagree with training without a word."""
    copy = shutil.copytree(folder, tmp_path / "fine-tuned")
    for recorded, wrong, right in (
        ({"image_aug": False, "intrinsics": "checkpoint"}, {"center_crop": True}, {"center_crop": False}),
        ({"image_aug": True, "intrinsics": "checkpoint"}, {"intrinsics": "libero"}, {"intrinsics": "checkpoint"}),
        ({"image_aug": True, "intrinsics": "libero"}, {"center_crop": False}, {"intrinsics": "checkpoint"}),
    ):
        (copy / TRAINING_CONFIG).write_text(json.dumps(recorded))
        ((flag, value),) = wrong.items()
        with pytest.raises(ValueError, match=rf"contradict the checkpoint .*\n  --{flag} {value}, but it was trained"):
            prepared(copy, unnorm_key=ZERO_SHOT, **wrong)
        assert getattr(prepared(copy, unnorm_key=ZERO_SHOT, force=True, **wrong).settings, flag) == value
        settings = prepared(copy, unnorm_key=ZERO_SHOT, **right).settings
        assert settings == prepared(copy, unnorm_key=ZERO_SHOT).settings
        assert settings.center_crop == recorded["image_aug"]


def test_flags_of_the_other_family(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is of SpatialVLA; leave out --use_proprio True .only for OpenVLA."):
        prepared(folder, use_proprio=True)
    with pytest.raises(ValueError, match=r"leave out --use_l1_regression True, --num_images_in_input 2"):
        prepared(folder, use_l1_regression=True, num_images_in_input=2)
    assert prepared(folder, unnorm_key=ZERO_SHOT, use_l1_regression=False, use_proprio=False, num_images_in_input=1)
    with pytest.raises(ValueError, match="--model_family openvla, but"):
        prepared(folder, model_family="openvla")


def test_chunks_without_ensemble(folder: Path, inputs: list[PolicyInput]) -> None:
    policy = prepared(folder, unnorm_key=ZERO_SHOT, adaptive_ensemble=False).load()
    together = policy.predict(inputs, [0, 1, 2])
    assert together.shape == (3, 4, 7)
    for slot, item in enumerate(inputs):
        np.testing.assert_allclose(policy.predict([item], [slot])[0], together[slot], atol=1e-6)
    np.testing.assert_array_equal(policy.images(inputs)[0], observation_image(inputs[0].images[0]).permute(1, 2, 0))


def test_the_ensemble_belongs_to_the_episode(folder: Path, inputs: list[PolicyInput]) -> None:
    """A slot's second action averages two chunks; other slots and finished episodes have no vote."""
    policy = prepared(folder, unnorm_key=ZERO_SHOT, ensemble_alpha=0.0).load()
    chunks = prepared(folder, unnorm_key=ZERO_SHOT, adaptive_ensemble=False).load().predict(inputs, [0, 1, 2])
    assert policy.robot.chunk == 1
    policy.start_episode(0, seed=0)
    policy.start_episode(1, seed=0)
    first = policy.predict([inputs[0], inputs[2]], [0, 1])
    np.testing.assert_allclose(first[0, 0], chunks[0, 0], atol=1e-6)
    np.testing.assert_allclose(first[1, 0], chunks[2, 0], atol=1e-6)
    second = policy.predict([inputs[1]], [0])
    np.testing.assert_allclose(second[0, 0], (chunks[0, 1] + chunks[1, 0]) / 2, atol=1e-6)
    policy.start_episode(0, seed=0)
    np.testing.assert_allclose(policy.predict([inputs[1]], [0])[0, 0], chunks[1, 0], atol=1e-6)


def test_the_true_camera_follows_the_crop(folder: Path) -> None:
    cropped = prepared(folder, unnorm_key=ZERO_SHOT, intrinsics="libero").load()._camera
    assert cropped.matrix(224)[0, 0].item() == pytest.approx(285.0, abs=0.1)
    assert (
        prepared(folder, unnorm_key=ZERO_SHOT, intrinsics="libero", center_crop=False).load()._camera
        == LIBERO_AGENTVIEW
    )
    assert prepared(folder, unnorm_key=ZERO_SHOT).load()._camera.width == 640  # what the checkpoint stores
