"""What a checkpoint needs is read from its files, whatever they are called."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from prismo.embodiment import LIBERO
from prismo.models.folder import TRAINING_CONFIG
from prismo.policies.checkpoint import checkpoint_hash, open_checkpoint, weights_folder
from prismo.testing.tiny import make_tiny_policy


@pytest.mark.parametrize(
    ("kind", "head", "attention", "proprio", "action_dim"),
    [
        ("l1", "l1", "bidirectional", 8, 7),
        ("diffusion", "diffusion", "bidirectional", 8, 7),
        ("discrete", "discrete", "bidirectional", None, None),
        ("vanilla", "discrete", "causal", None, None),
    ],
)
def test_kinds_are_told_apart(checkpoints, kind, head, attention, proprio, action_dim) -> None:
    found = open_checkpoint(checkpoints[kind])
    assert (found.head, found.attention, found.proprio_dim, found.action_dim) == (head, attention, proprio, action_dim)
    assert found.family == "openvla"
    assert not found.film
    assert found.adapter is None
    assert found.record.num_images_in_input is None  # no file says it


def test_nothing_says_which_attention(checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["vanilla"], tmp_path / "copy")
    (folder / "modeling_prismatic.py").unlink()
    assert open_checkpoint(folder).attention is None


def test_the_trainers_configuration_wins(checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["l1"], tmp_path / "copy")
    assert open_checkpoint(folder).center_crop is None
    stored = {"num_images_in_input": 1, "image_aug": False, "num_diffusion_steps_train": 20}
    (folder / TRAINING_CONFIG).write_text(json.dumps(stored))
    found = open_checkpoint(folder)
    assert (found.record.num_images_in_input, found.center_crop) == (1, False)
    assert found.record.num_diffusion_steps_train == 20


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_images_in_input": "2"}, "num_images_in_input should be a valid integer"),
        ({"num_images_in_input": 0}, "num_images_in_input should be greater than or equal to 1"),
        ({"image_aug": "False"}, "image_aug should be a valid boolean"),
        ({"chunk": 1.5}, "chunk should be a valid integer"),
        ({"attention": "both"}, "attention should be 'bidirectional' or 'causal'"),
        ({"intrinsics": "mine"}, "intrinsics should be"),
        ({"embodiment": {"control_hz": 0}}, "embodiment.control_hz should be greater than 0"),
        ({"embodiment": {"control_hz": "NaN"}}, "embodiment.control_hz should be"),
        ({"embodiment": {"action_dim": 0}}, "embodiment.action_dim should be greater"),
        ({"embodiment": {"gripper_env_sign": 7}}, "embodiment.gripper_env_sign should be -1 or 1"),
        ({"embodiment": {"normalization": "q99"}}, "embodiment.normalization should be"),
        ({"embodiment": {"gripper_dims": [7]}}, "embodiment.gripper_dims .7. are not among its 7 action numbers"),
    ],
)
def test_a_damaged_training_config(checkpoints, tmp_path: Path, change, says) -> None:
    folder = shutil.copytree(checkpoints["vanilla"], tmp_path / "copy")
    if "embodiment" in change:
        change = {"embodiment": dataclasses.asdict(LIBERO) | change["embodiment"]}
    (folder / TRAINING_CONFIG).write_text(json.dumps(change))
    with pytest.raises(ValueError, match=says):
        open_checkpoint(folder)


def test_damaged_modules(checkpoints, tmp_path: Path) -> None:
    """An empty file counted as one that is not there: evaluation without state, or with discrete tokens."""
    folder = shutil.copytree(checkpoints["l1"], tmp_path / "copy")
    for stem in ("action_head", "proprio_projector"):
        path = folder / f"{stem}--latest_checkpoint.pt"
        whole = path.read_bytes()
        torch.save({}, path)
        with pytest.raises(ValueError, match=f"{stem}.* holds no tensors"):
            open_checkpoint(folder)
        path.write_bytes(whole)
    torch.save({"fc2.weight": torch.zeros(3)}, folder / "proprio_projector--latest_checkpoint.pt")
    with pytest.raises(ValueError, match=r"holds no matrix fc1\.weight"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("kind", "record", "stem"),
    [
        ("l1", {"use_l1_regression": True, "use_proprio": True}, "action_head"),
        ("l1", {"use_l1_regression": True, "use_proprio": True}, "proprio_projector"),
        ("diffusion", {"use_l1_regression": False, "use_diffusion": True}, "noisy_action_projector"),
    ],
)
def test_a_module_of_the_training_is_missing(checkpoints, tmp_path: Path, kind, record, stem) -> None:
    """Without its head it was a policy of action tokens, without the projector one without state."""
    folder = shutil.copytree(checkpoints[kind], tmp_path / "copy")
    (folder / TRAINING_CONFIG).write_text(json.dumps(record))
    open_checkpoint(folder)
    (folder / f"{stem}--latest_checkpoint.pt").unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {stem}--\*_checkpoint.pt, which its training_config.json says"):
        open_checkpoint(folder)


def test_files_that_are_cut_off_are_found_first(checkpoints, tmp_path: Path) -> None:
    """Not after a simulator has been started and 15 GB have been read."""
    for name in ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "config.json"):
        folder = shutil.copytree(checkpoints["l1"], tmp_path / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:-50])
        with pytest.raises(ValueError, match=name):
            open_checkpoint(folder)


def test_a_base_that_has_moved(token_run: Path, checkpoints, tmp_path: Path) -> None:
    run = shutil.copytree(token_run, tmp_path / "run--100_chkpt")
    path = run / "lora_adapter" / "adapter_config.json"
    for base in (str(tmp_path / "gone"), "ckpts/openvla-7b"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
        with pytest.raises(FileNotFoundError, match=rf"base model .* {base} is neither .*--base_checkpoint"):
            open_checkpoint(run)
    found = open_checkpoint(run, base=str(checkpoints["vanilla"]))
    assert weights_folder(found) == checkpoints["vanilla"]


def test_crop_from_the_folders_name(checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["l1"], tmp_path / "openvla-7b+libero--image_aug--10000_chkpt")
    assert open_checkpoint(folder).center_crop is True


def test_any_step_in_the_file_names(checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["l1"], tmp_path / "copy")
    for stem in ("action_head", "proprio_projector"):
        (folder / f"{stem}--latest_checkpoint.pt").rename(folder / f"{stem}--123457_checkpoint.pt")
    assert open_checkpoint(folder).head == "l1"
    shutil.copy(folder / "action_head--123457_checkpoint.pt", folder / "action_head--5_checkpoint.pt")
    with pytest.raises(ValueError, match=r"several files for action_head"):
        open_checkpoint(folder)


def test_statistics_of_the_base_are_not_taken(tmp_path: Path) -> None:
    """A merged OFT checkpoint keeps the base model's norm_stats in config.json; dataset_statistics.json wins."""
    folder = make_tiny_policy(tmp_path / "policy")
    config = json.loads((folder / "config.json").read_text())
    config["norm_stats"] = {"bridge_orig": config["norm_stats"]["libero_spatial_no_noops"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert list(open_checkpoint(folder).statistics) == ["libero_spatial_no_noops"]
    (folder / "dataset_statistics.json").unlink()
    assert list(open_checkpoint(folder).statistics) == ["bridge_orig"]


def test_errors_name_what_is_missing(checkpoints, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a checkpoint folder nor a hub id"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"expected config\.json"):
        open_checkpoint(tmp_path)
    folder = shutil.copytree(checkpoints["vanilla"], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_stats": None}))
    with pytest.raises(FileNotFoundError, match=r"no statistics \(dataset_statistics\.json"):
        open_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type 'llama'"):
        open_checkpoint(folder)


def test_hub_id_in_the_cache(checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository of any owner and any file names; here from the hub's cache, as on a node without network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--spatial-forcing-7b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(checkpoints["l1"], repository / "snapshots" / ("0" * 40))
    found = open_checkpoint("somebody/spatial-forcing-7b")
    assert found.head == "l1"
    assert found.folder.is_relative_to(repository)
    with pytest.raises(FileNotFoundError, match="could not be fetched"):
        open_checkpoint("somebody/else")


def test_hash_sees_every_part(checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints["l1"], tmp_path / "copy")
    before = checkpoint_hash(open_checkpoint(folder))
    assert before == checkpoint_hash(open_checkpoint(checkpoints["l1"]))
    make_tiny_policy(tmp_path / "other", seed=1)
    for name in ("proprio_projector--latest_checkpoint.pt", "model-00001-of-00002.safetensors"):
        copy = shutil.copytree(folder, tmp_path / f"with {name}")
        shutil.copy(tmp_path / "other" / name, copy / name)
        assert checkpoint_hash(open_checkpoint(copy)) != before, name
