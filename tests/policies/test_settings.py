"""Flags that are left out come from the checkpoint; flags that contradict it are errors, not 0 %."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from prismo.embodiment import ALOHA, LIBERO, Embodiment
from prismo.models.folder import TRAINING_CONFIG
from prismo.policies.checkpoint import open_checkpoint
from prismo.policies.flags import PolicyFlags
from prismo.policies.loading import prepare_policy
from prismo.policies.settings import resolve_settings


def resolved(folder: Path, key: str | None = "libero_spatial", **flags: object):
    return resolve_settings(PolicyFlags(**flags), open_checkpoint(folder), LIBERO, key)


def test_nothing_given(checkpoints) -> None:
    oft = resolved(checkpoints["l1"])
    assert (oft.head, oft.num_images, oft.proprio, oft.center_crop, oft.chunk) == ("l1", 2, True, True, 8)
    assert oft.unnorm_key == "libero_spatial_no_noops"
    vanilla = resolved(checkpoints["vanilla"])
    assert (vanilla.head, vanilla.num_images, vanilla.proprio, vanilla.chunk) == ("discrete", 1, False, 1)
    assert vanilla.unnorm_key == "libero_spatial"
    assert resolved(checkpoints["diffusion"], num_diffusion_steps_train=20).diffusion_steps_inference == 20


def test_the_originals_command_line_is_accepted(checkpoints) -> None:
    flags = {"use_l1_regression": True, "use_diffusion": False, "use_film": False, "num_images_in_input": 2}
    assert resolved(checkpoints["l1"], **flags, use_proprio=True, center_crop=True) == resolved(checkpoints["l1"])


@pytest.mark.parametrize(
    ("kind", "flags", "says"),
    [
        ("l1", {"use_l1_regression": False}, "L1 head"),
        ("l1", {"use_proprio": False}, "proprio_projector for 8 numbers"),
        ("diffusion", {"use_diffusion": False}, "diffusion head"),
        ("l1", {"attention": "causal", "use_l1_regression": False}, "bidirectional"),
    ],
)
def test_contradictions_need_force(checkpoints, kind, flags, says) -> None:
    with pytest.raises(ValueError, match=says) as error:
        resolved(checkpoints[kind], **flags)
    assert "--force True" in str(error.value)
    forced = resolved(checkpoints[kind], **flags, force=True)
    assert forced != resolved(checkpoints[kind])


@pytest.mark.parametrize(
    ("kind", "flags", "says"),
    [
        ("l1", {"use_diffusion": True}, "L1 head"),
        ("l1", {"use_diffusion": True, "use_l1_regression": True}, "exclude each other"),
        ("diffusion", {"use_l1_regression": True}, "diffusion head"),
        ("discrete", {"use_l1_regression": True}, "no action_head file"),
        ("discrete", {"use_proprio": True}, "no proprio_projector"),
        ("vanilla", {"use_film": True}, "no vision_backbone file"),
        ("l1", {"attention": "causal"}, "causal attention cannot feed an action head"),
    ],
)
def test_the_impossible_is_refused_even_with_force(checkpoints, kind, flags, says) -> None:
    with pytest.raises(ValueError, match=says):
        resolved(checkpoints[kind], **flags, force=True)


def test_all_contradictions_at_once(checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["l1"], tmp_path / "copy")
    (folder / TRAINING_CONFIG).write_text(json.dumps({"num_images_in_input": 2, "image_aug": True}))
    with pytest.raises(ValueError, match="contradict") as error:
        resolved(folder, num_images_in_input=1, center_crop=False, use_proprio=False)
    for flag in ("--num_images_in_input 1", "--center_crop False", "--use_proprio False"):
        assert flag in str(error.value)
    forced = resolved(folder, num_images_in_input=1, center_crop=False, use_proprio=False, force=True)
    assert (forced.num_images, forced.center_crop, forced.proprio) == (1, False, False)


def test_unnorm_key(checkpoints) -> None:
    assert resolved(checkpoints["l1"], unnorm_key="libero_spatial_no_noops").unnorm_key == "libero_spatial_no_noops"
    with pytest.raises(ValueError, match=r"Available: libero_spatial_no_noops"):
        resolved(checkpoints["l1"], unnorm_key="libero_gaol")
    with pytest.raises(ValueError, match=r"trained on libero_spatial_no_noops, asked for libero_goal\..*--unnorm_key"):
        resolved(checkpoints["l1"], "libero_goal")


def test_statistics_that_cannot_be_used(checkpoints) -> None:
    """Refused as such, before weights are read, and not taken for those of another dataset."""
    checkpoint = open_checkpoint(checkpoints["l1"])
    ((name, stats),) = checkpoint.statistics.items()
    action = dataclasses.replace(stats.action, q99=np.full(7, np.nan))
    broken = dataclasses.replace(checkpoint, statistics={name: dataclasses.replace(stats, action=action)})
    for flags in (PolicyFlags(), PolicyFlags(unnorm_key=name)):
        with pytest.raises(ValueError, match=rf"the statistics of '{name}' cannot be used: action q99\[0\] is nan"):
            resolve_settings(flags, broken, LIBERO, "libero_spatial")
    by_extremes = dataclasses.replace(LIBERO, normalization="bounds")
    assert resolve_settings(PolicyFlags(), broken, by_extremes, "libero_spatial").unnorm_key == name


def test_another_robot(checkpoints) -> None:
    with pytest.raises(ValueError, match="trained for another robot"):
        resolve_settings(PolicyFlags(), open_checkpoint(checkpoints["l1"]), ALOHA, "libero_spatial")


def test_before_any_file_is_read(checkpoints) -> None:
    with pytest.raises(ValueError, match="--pretrained_checkpoint is missing"):
        prepare_policy(PolicyFlags(), LIBERO)
    with pytest.raises(ValueError, match="Did you mean 'openvla'"):
        prepare_policy(PolicyFlags(model_family="openvlaa", pretrained_checkpoint="x"), LIBERO)
    with pytest.raises(ValueError, match="--model_family svla, but"):
        prepare_policy(PolicyFlags(model_family="svla", pretrained_checkpoint=str(checkpoints["l1"])), LIBERO)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"device": "tpu"}, "--device is 'tpu'; expected cpu, cuda or cuda:N"),
        ({"device": "cuda:x"}, "--device is 'cuda:x'"),
        ({"device": "meta"}, "--device is 'meta'"),
        ({"device": "mps"}, "--device is 'mps'"),
        ({"device": "cuda:99"}, r"--device cuda:99, but torch finds \w+ GPUs? here"),
        ({"num_images_in_input": 0}, "--num_images_in_input is 0; expected at least 1"),
        ({"num_diffusion_steps_train": 0}, "--num_diffusion_steps_train is 0"),
        ({"num_diffusion_steps_inference": -1}, "--num_diffusion_steps_inference is -1; expected at least 1"),
        ({"lora_rank": -1}, "--lora_rank is -1"),
        ({"intrinsics": "x"}, "unknown intrinsics 'x'. Available: checkpoint, libero"),
        ({"ensemble_alpha": float("nan")}, "--ensemble_alpha is nan; expected at least 0"),
        ({"ensemble_alpha": float("inf")}, "--ensemble_alpha is inf"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "exclude each other"),
    ],
)
def test_impossible_flags_are_refused_before_any_file_is_read(flags, says) -> None:
    with pytest.raises(ValueError, match=says):
        prepare_policy(PolicyFlags(pretrained_checkpoint="/nowhere", **flags), LIBERO)


def test_a_base_for_merged_weights_is_refused(checkpoints) -> None:
    """It would be ignored, and the user would take the result for that of another base."""
    flags = PolicyFlags(pretrained_checkpoint=str(checkpoints["l1"]), base_checkpoint="/nope")
    with pytest.raises(ValueError, match=r"--base_checkpoint /nope, but the weights in .* are merged"):
        prepare_policy(flags, LIBERO, "libero_spatial")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"intrinsics": "libero"}, "--intrinsics libero .only for SpatialVLA."),
        ({"adaptive_ensemble": True}, "--adaptive_ensemble True .only for SpatialVLA."),
        ({"ensemble_alpha": 0.2}, "--ensemble_alpha 0.2 .only for SpatialVLA."),
    ],
)
def test_flags_of_another_family(checkpoints, flags, says) -> None:
    """They were ignored."""
    with pytest.raises(ValueError, match=says):
        prepare_policy(PolicyFlags(pretrained_checkpoint=str(checkpoints["l1"]), **flags), LIBERO, "libero_spatial")


def test_the_robot_of_the_checkpoint(checkpoints, tmp_path: Path) -> None:
    """An own robot is known from the files alone; nothing said how its numbers were scaled."""
    own = Embodiment("mine", 7, 8, 8, "bounds", 15.0, gripper_dims=(6,), gripper_env_sign=1)
    folder = shutil.copytree(checkpoints["l1"], tmp_path / "copy")
    flags = PolicyFlags(pretrained_checkpoint=str(folder))
    assert prepare_policy(flags).robot == LIBERO  # published files: by the name of their dataset
    assert prepare_policy(flags, LIBERO).robot == LIBERO
    (folder / TRAINING_CONFIG).write_text(json.dumps({"embodiment": dataclasses.asdict(own), "chunk": 8}))
    assert prepare_policy(flags).robot == own
    # In another place it is that place's robot, but the numbers of the model mean what they meant in training.
    driven = prepare_policy(flags, LIBERO).robot
    assert driven == dataclasses.replace(LIBERO, normalization="bounds")
    (folder / TRAINING_CONFIG).unlink()
    statistics = json.loads((folder / "dataset_statistics.json").read_text())
    (folder / "dataset_statistics.json").write_text(json.dumps({"mine": statistics["libero_spatial_no_noops"]}))
    with pytest.raises(ValueError, match="unknown robot of dataset 'mine'"):
        prepare_policy(flags)
