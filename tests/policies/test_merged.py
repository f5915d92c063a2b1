"""A run evaluated from its adapter and from a merged folder is the same policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prismo.data.normalize import dump_statistics
from prismo.embodiment import LIBERO
from prismo.models.component_files import TRAINING_CONFIG
from prismo.models.lora import LoraSpec, add_lora, save_adapter
from prismo.models.merge import merge
from prismo.models.openvla import OpenVLAForActionPrediction
from prismo.models.tiny import tiny_statistics
from prismo.policies import PolicyFlags, open_checkpoint, resolve_settings
from prismo.util.files import write_json
from tests.policies.conftest import SUITE

KEY = "libero_spatial_no_noops"


@pytest.fixture(scope="module")
def token_run(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on vanilla OpenVLA, whose folder holds the vanilla model code, without any side module."""
    folder = tmp_path_factory.mktemp("merged") / "run--100_chkpt"
    model = OpenVLAForActionPrediction.from_pretrained(checkpoints["vanilla"], dtype=torch.float32, self_test=False)
    spec = LoraSpec(rank=4)
    add_lora(model, spec)
    save_adapter(model, folder, spec, base=str(checkpoints["vanilla"]))
    dump_statistics({KEY: tiny_statistics(LIBERO)}, folder / "dataset_statistics.json")
    return folder


@pytest.mark.parametrize(
    "recorded",
    [
        {"attention": "bidirectional", "num_images_in_input": 1, "image_aug": False, "chunk": 8},
        {"attention": "bidirectional", "num_images_in_input": 2, "image_aug": True, "chunk": 16},
        {"attention": "causal", "num_images_in_input": 1, "image_aug": True, "chunk": 1},
        None,  # as the original leaves it
    ],
)
def test_the_merged_folder_says_what_the_run_said(token_run, checkpoints, tmp_path, recorded) -> None:
    """Its training_config.json stayed behind, and the base's vanilla code next to it was believed: 0 %."""
    if recorded is not None:
        write_json(token_run / TRAINING_CONFIG, recorded)
    else:
        (token_run / TRAINING_CONFIG).unlink(missing_ok=True)
    merged = merge(checkpoints["vanilla"], token_run, tmp_path / "merged", progress=False, verify=False).folder
    settings = [resolve_settings(PolicyFlags(), open_checkpoint(f), LIBERO, SUITE) for f in (token_run, merged)]
    assert settings[0] == settings[1]
    assert open_checkpoint(token_run).attention == open_checkpoint(merged).attention
    if recorded is not None:
        assert settings[1].attention == recorded["attention"]
        assert settings[1].chunk == recorded["chunk"]
        assert settings[1].num_images == recorded["num_images_in_input"]
        assert settings[1].center_crop == recorded["image_aug"]
    # The original's own scripts may go by the model code of the folder.
    assert (merged / "modeling_prismatic.py").exists() == (recorded is not None and recorded["attention"] == "causal")
