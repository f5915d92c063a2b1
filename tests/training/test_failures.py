"""What may go wrong in the middle of a run: a full disk, a batch that is not finite."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import prismo.training.openvla
from prismo.data.dataset import open_dataset
from prismo.data.loader import Loader
from prismo.training.openvla_objective import openvla_inputs
from prismo.training.run_folder import RunFolder
from tests.training.conftest import DATASET, assert_same_state, figures, state, train


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB: room for one checkpoint of the tiny model and its logs, not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("latest", [False, True])
def test_full_disk_leaves_the_checkpoint_before(flags, small_disk, caplog, latest):
    """The original writes over its only copy (defect 12)."""
    options = {"save_freq": 1, "batch_size": 1, "max_steps": 3, "save_latest_checkpoint_only": latest}
    with caplog.at_level(logging.ERROR):
        assert train(flags(small_disk, **options)) == 2
    assert "cannot write the checkpoint after update 2" in caplog.text
    assert "No space left on device" in caplog.text
    run = RunFolder(small_disk / "run")
    (intact,) = run.checkpoints()
    assert intact.step == 1
    assert str(intact.folder) in caplog.text
    assert {value.item() for name, value in state(intact.folder).items() if ":step." in name} == {1.0}
    assert not list(small_disk.glob(".*"))
    assert [path.name for path in (small_disk / "run").glob(".*")] == [".lock"]
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    assert train(flags(small_disk, resume=True, **options)) == 0
    assert run.checkpoints()[0].step == 3


def test_no_room_to_merge_does_not_end_the_run(flags, small_disk, caplog):
    with caplog.at_level(logging.ERROR):
        assert train(flags(small_disk, max_steps=2, batch_size=1, merge_lora_during_training=True)) == 0
    assert "is saved, but not merged" in caplog.text
    assert "prismo merge --base_checkpoint" in caplog.text
    (saved,) = RunFolder(small_disk / "run").checkpoints()
    assert (saved.step, saved.resumable) == (2, True)
    assert not (saved.folder / "config.json").exists()
    assert not list(saved.folder.glob("model*"))


def test_a_merge_that_fails_does_not_end_the_run(flags, tmp_path, caplog, monkeypatch):
    """Its verification finds what a broken disk or memory did."""

    def differs(*_: object, **__: object) -> None:
        raise ValueError("lm_head.weight is not base + adapter")

    monkeypatch.setattr("prismo.merging.merge._verify", differs)
    options = {"max_steps": 2, "save_freq": 1, "batch_size": 1, "merge_lora_during_training": True}
    assert train(flags(tmp_path, **options)) == 0
    assert caplog.text.count("is saved, but not merged: lm_head.weight is not base + adapter; merge it later") == 2
    assert RunFolder(tmp_path / "run").checkpoints()[0].step == 2


def test_no_room_for_a_single_checkpoint_is_said_at_the_start(flags, small_disk, caplog):
    (small_disk / "ballast").write_bytes(bytes(3_500_000))
    with caplog.at_level(logging.ERROR):
        assert train(flags(small_disk, max_steps=1)) == 2
    assert "a checkpoint takes 0.0" in caplog.text
    assert "free" in caplog.text


def test_non_finite_batch_is_named_and_the_state_before_it_saved(flags, libero, tmp_path, caplog, monkeypatch):
    """The original trains on and saves the ruins (defect 18)."""
    options = {"max_steps": 6, "batch_size": 2, "save_freq": 100}
    assert train(flags(tmp_path, run_id_override="whole", **options)) == 0
    assert train(flags(tmp_path, run_id_override="two", **(options | {"max_steps": 2}))) == 0
    calls = 0

    def spoiled(images, text, actions, **rest):
        nonlocal calls
        calls += 1
        if calls == 3:  # as a damaged recording would do
            actions[1, 2, 3] = float("nan")
        return openvla_inputs(images, text, actions, **rest)

    with monkeypatch.context() as patched, caplog.at_level(logging.ERROR):
        patched.setattr(prismo.training.openvla, "openvla_inputs", spoiled)
        assert train(flags(tmp_path, **options)) == 1
    assert "not finite in update 3. The state after update 2 is saved" in caplog.text
    batches = iter(Loader(open_dataset(libero, DATASET, num_images=2), 2, seed=7, num_workers=0))
    third = [next(batches) for _ in range(3)][-1]
    place = f"{DATASET} episode {third.episode[1]} step {third.step[1]}"
    assert f"\n  process 0: {place} (its numbers are not finite)\n" in caplog.text
    assert caplog.text.count(" episode ") == 1  # the other sample of the batch is not blamed
    run = RunFolder(tmp_path / "run")
    assert [c.step for c in run.checkpoints()] == [2]
    assert_same_state(run.step_folder(2), RunFolder(tmp_path / "two").step_folder(2))
    assert train(flags(tmp_path, resume=True, **options)) == 0  # with the batch as it is stored
    assert_same_state(run.step_folder(6), RunFolder(tmp_path / "whole").step_folder(6))
    assert figures(run.path) == figures(tmp_path / "whole")


def test_missing_camera_takes_no_part_in_the_alignment(flags, tmp_path, monkeypatch):
    """A black picture stands for a camera that is not there; its content must not change the loss."""
    seen = []

    def without_wrist(images, text, actions, **rest):
        blank = images.clone()
        blank[:, 1] = len(seen) * 90  # whatever fills it
        mask = torch.ones(images.shape[:2], dtype=torch.bool)
        mask[:, 1] = False
        inputs = openvla_inputs(blank, text, actions, **(rest | {"view_mask": mask}))
        seen.append(inputs)
        # The policy itself does see the picture; keep that out of the comparison.
        return dataclasses.replace(inputs, pixel_values=seen[0].pixel_values)

    monkeypatch.setattr(prismo.training.openvla, "openvla_inputs", without_wrist)
    losses = []
    for name in ("a", "b"):
        assert train(flags(tmp_path, run_id_override=name, max_steps=1, image_aug=False, gain_feat_1move=False)) == 0
        losses.append(figures(tmp_path / name)[1]["align_loss"])
    assert len(seen) == 2
    assert not torch.equal(seen[0].images[:, 1], seen[1].images[:, 1])
    assert losses[0] == losses[1]
