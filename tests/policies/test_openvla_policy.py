"""Policies: what they see is what training saw, and what they answer does not depend on the company in the batch."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from prismo.data.dataset import open_dataset
from prismo.data.images import center_crop, encode_jpeg, prepare_images
from prismo.data.normalize import dump_statistics, normalize
from prismo.data.rlds_writer import libero_episode, libero_features, write_rlds
from prismo.embodiment import LIBERO
from prismo.merging.merge import merge
from prismo.models.component_files import read_component, save_component
from prismo.models.film import add_film
from prismo.models.heads import L1RegressionActionHead
from prismo.models.lora import LoraSpec, add_lora, save_adapter
from prismo.models.openvla import OpenVLAForActionPrediction
from prismo.models.random_weights import fill_random
from prismo.policies.base import PolicyInput, environment_actions
from prismo.testing.tiny import tiny_statistics
from tests.models.adapted import randomize_lora
from tests.policies.conftest import observe

KINDS = ("l1", "diffusion", "discrete", "vanilla")


def views(inputs: list[PolicyInput], policy) -> list[PolicyInput]:
    """The inputs with as many cameras as the policy takes."""
    return [PolicyInput(item.images[: policy.num_images], item.state, item.instruction) for item in inputs]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_one_by_one(policies, observations, kind) -> None:
    policy, inputs = policies[kind], views(observations, policies[kind])
    for slot in range(3):
        policy.start_episode(slot, seed=slot)
    together = policy.predict(inputs, [0, 1, 2])
    assert together.shape == (3, policy.robot.chunk, 7)
    assert together.dtype == np.float64
    assert policy.robot.chunk == (1 if kind == "vanilla" else 8)
    for slot in (2, 0, 1):
        policy.start_episode(slot, seed=slot)
        alone = policy.predict([inputs[slot]], [slot])
        np.testing.assert_allclose(alone[0], together[slot], atol=1e-4)
    assert np.ptp(together, axis=0).max() > 1e-3, "the observation has no influence"


def test_the_policy_sees_what_training_saw(policies, load, checkpoints, tmp_path: Path) -> None:
    """The same camera frames and states through an RLDS dataset and through a policy."""
    steps, frames = 9, [observe(seed, "pick up the milk").images for seed in range(9)]
    state = np.random.default_rng(0).normal(0, 0.5, (steps, 8)).astype(np.float32)
    episode = libero_episode(
        [encode_jpeg(main) for main, _ in frames],
        [encode_jpeg(wrist) for _, wrist in frames],
        state,
        np.zeros((steps, 7)),
        np.zeros((steps, 7)),
        "pick up the milk",
        "demo_0.hdf5",
    )
    name = "libero_spatial_no_noops"
    write_rlds(tmp_path / name / "1.0.0", name, libero_features(256, 256), [episode])
    stats = tiny_statistics(LIBERO)
    dataset = open_dataset(tmp_path, name, use_tail=True, statistics={name: stats})
    images = prepare_images(torch.stack([dataset[i].images for i in range(steps)]), 224)
    processor = policies["l1"]._processor.image_processor

    inputs = [
        PolicyInput(frame, s.astype(np.float64), "pick up the milk") for frame, s in zip(frames, state, strict=True)
    ]
    plain = load(checkpoints["l1"], center_crop=False)
    assert_same_pixels(plain.pixel_values(inputs), processor.normalize(images))
    cropped = policies["l1"].pixel_values(inputs)
    assert_same_pixels(cropped, processor.normalize(center_crop(images)))
    proprio = torch.stack([dataset[i].proprio for i in range(steps)])
    torch.testing.assert_close(policies["l1"]._proprio(inputs), proprio, rtol=0, atol=1e-6)


def assert_same_pixels(seen: torch.Tensor, trained: torch.Tensor) -> None:
    """Training may use a faster kernel, whose rounding moves a value in a ten thousand by one grey level."""
    difference = (seen - trained).abs()
    assert difference.max() <= 1.01 / 255 / 0.2236328125  # the smallest deviation of the two towers
    assert (difference > 0).float().mean() < 2e-4


def test_observations_are_not_changed(policies, observations) -> None:
    before = copy.deepcopy(observations)
    policies["l1"].predict(observations, [0, 1, 2])
    for old, new in zip(before, observations, strict=True):
        np.testing.assert_array_equal(old.state, new.state)
        for a, b in zip(old.images, new.images, strict=True):
            np.testing.assert_array_equal(a, b)


def test_proprio_of_a_live_robot_is_clipped(policies) -> None:
    far = PolicyInput((), np.full(8, 100.0), "")
    expected = normalize(far.state, tiny_statistics(LIBERO).proprio, "bounds_q99", rule="evaluation")
    np.testing.assert_allclose(policies["l1"]._proprio([far])[0].numpy(), expected)
    assert expected.max() == 1


def test_actions_are_unnormalised(policies, observations) -> None:
    """The tiny statistics map -1..1 to -0.9..0.9 in every dimension but the gripper."""
    policy = policies["discrete"]
    actions = policy.predict(observations, [0, 1, 2])
    limits = np.abs(actions).reshape(-1, 7).max(axis=0)
    assert limits[:6].max() <= 0.9 * (255 / 256) + 1e-6
    bins = np.linspace(-1, 1, 256)
    centers = (bins[:-1] + bins[1:]) / 2
    assert np.abs(actions[..., 6].reshape(-1, 1) - centers).min(axis=1).max() < 1e-6


def test_diffusion_noise_belongs_to_the_episode(policies, observations) -> None:
    policy = policies["diffusion"]
    answers = []
    for seed in (5, 5, 6):
        policy.start_episode(0, seed)
        answers.append(policy.predict(observations[:1], [0]))
    np.testing.assert_array_equal(answers[0], answers[1])
    assert np.abs(answers[0] - answers[2]).max() > 1e-3


def test_wrong_observations(policies, observations) -> None:
    one_camera = PolicyInput(observations[0].images[:1], observations[0].state, "push")
    with pytest.raises(ValueError, match="takes 2 camera images, found 1"):
        policies["l1"].predict([one_camera], [0])
    stateless = PolicyInput(observations[0].images, None, "push")
    with pytest.raises(ValueError, match="takes the proprioceptive state"):
        policies["l1"].predict([stateless], [0])


def test_fewer_cameras_and_no_state_by_force(load, checkpoints, observations) -> None:
    policy = load(checkpoints["l1"], num_images_in_input=1, use_proprio=False, force=True)
    actions = policy.predict([PolicyInput(observations[0].images[:1], None, "push")], [0])
    assert actions.shape == (1, 8, 7)


def test_base_and_adapter_equals_merged(tiny_base: Path, load, observations, tmp_path: Path) -> None:
    folder = adapter_checkpoint(tiny_base, tmp_path / "run", film=False)
    unmerged = load(folder).predict(observations, [0, 1, 2])
    merge(tiny_base, folder, progress=False)
    assert list(folder.glob("model*.safetensors"))
    np.testing.assert_array_equal(load(folder).predict(observations, [0, 1, 2]), unmerged)
    with pytest.raises(ValueError, match="--lora_rank 8, but it was trained with 4"):
        load(adapter_checkpoint(tiny_base, tmp_path / "again", film=False), lora_rank=8)


def test_film_with_and_without_merging(tiny_base: Path, load, observations, tmp_path: Path) -> None:
    folder = adapter_checkpoint(tiny_base, tmp_path / "run", film=True)
    policy = load(folder)
    unmerged = policy.predict(observations, [0, 1, 2])
    for slot, item in enumerate(observations):  # the language mean must not see the padding of the batch
        np.testing.assert_allclose(policy.predict([item], [slot])[0], unmerged[slot], atol=1e-4)
    merge(tiny_base, folder, progress=False)
    np.testing.assert_array_equal(load(folder, use_film=True).predict(observations, [0, 1, 2]), unmerged)


def test_adapter_of_another_base(tiny_base: Path, checkpoints, load, tmp_path: Path) -> None:
    folder = adapter_checkpoint(tiny_base, tmp_path / "run", film=False, fingerprint="0" * 64)
    with pytest.raises(ValueError, match="trained on other weights"):
        load(folder)
    with pytest.raises(FileNotFoundError, match="neither a checkpoint folder nor a hub id"):
        load(folder, base_checkpoint=str(tmp_path / "nowhere"))


def test_actions_that_are_not_finite(load, checkpoints, observations, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["l1"], tmp_path / "copy")
    head = read_component(folder / "action_head--latest_checkpoint.pt")
    head["model.fc2.bias"][2] = torch.nan
    torch.save(head, folder / "action_head--latest_checkpoint.pt")
    with pytest.raises(ValueError, match=r"copy predicts actions that are not finite"):
        load(folder).predict(observations, [0, 1, 2])


def test_quantised_loading_says_what_it_needs(load, checkpoints) -> None:
    with pytest.raises(ValueError, match=r"--load_in_8bit True needs (bitsandbytes|an NVIDIA GPU)"):
        load(checkpoints["l1"], load_in_8bit=True, device="cpu")


def test_gripper_of_the_environment() -> None:
    """1 = open in the data; LIBERO opens at -1."""
    actions = np.array([[0.5] * 6 + [1.0], [0.5] * 6 + [0.0], [0.5] * 6 + [0.7], [0.5] * 6 + [0.5]])
    commands = environment_actions(actions, LIBERO)
    np.testing.assert_array_equal(commands[:, 6], [-1, 1, -1, 0])
    np.testing.assert_array_equal(commands[:, :6], actions[:, :6])
    assert actions[0, 6] == 1.0


def adapter_checkpoint(base: Path, folder: Path, *, film: bool, fingerprint: str | None = None) -> Path:
    """What a training run saves without merging: adapter, L1 head, statistics, and with FiLM the vision backbone."""
    folder.mkdir()
    model = OpenVLAForActionPrediction.from_pretrained(base, dtype=torch.float32, self_test=False)
    spec = LoraSpec(rank=4)
    add_lora(model, spec)
    if film:
        fill_random(add_film(model), 3)
    randomize_lora(model)
    save_adapter(model, folder, spec, base=str(base), base_fingerprint=fingerprint)
    if film:
        save_component(model.vision_backbone, folder, "vision_backbone", 10)
    head = L1RegressionActionHead(model.llm_dim)
    fill_random(head, 5)
    save_component(head, folder, "action_head", 10)
    dump_statistics({"libero_spatial_no_noops": tiny_statistics(LIBERO)}, folder / "dataset_statistics.json")
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)
    return folder
