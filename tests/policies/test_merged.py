"""A run evaluated from its adapter and from a merged folder is the same policy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from prismo.embodiment import LIBERO
from prismo.merging.merge import merge
from prismo.models.folder import TRAINING_CONFIG
from prismo.policies.checkpoint import open_checkpoint
from prismo.policies.flags import PolicyFlags
from prismo.policies.settings import resolve_settings
from prismo.util.files import write_json
from tests.policies.conftest import SUITE


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
    run = Path(shutil.copytree(token_run, tmp_path / "run--100_chkpt"))
    if recorded is not None:
        write_json(run / TRAINING_CONFIG, recorded)
    merged = merge(checkpoints["vanilla"], run, tmp_path / "merged", progress=False, verify=False).folder
    settings = [resolve_settings(PolicyFlags(), open_checkpoint(f), LIBERO, SUITE) for f in (run, merged)]
    assert settings[0] == settings[1]
    assert open_checkpoint(run).attention == open_checkpoint(merged).attention
    if recorded is not None:
        assert settings[1].attention == recorded["attention"]
        assert settings[1].chunk == recorded["chunk"]
        assert settings[1].num_images == recorded["num_images_in_input"]
        assert settings[1].center_crop == recorded["image_aug"]
    # The original's own scripts may go by the model code of the folder.
    assert (merged / "modeling_prismatic.py").exists() == (recorded is not None and recorded["attention"] == "causal")
